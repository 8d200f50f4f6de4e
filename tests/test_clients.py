"""The clients that people use, against a real service: each reads what it gets with its own parser."""

import asyncio
import contextlib
import io
import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from langchain_openai import ChatOpenAI
from openai.types.responses import Response, ResponseOutputMessage
from pydantic import BaseModel, SecretStr

from app.chat import REFUSAL
from app.settings import LLMSettings, ProfileSettings, Settings
from tests.conftest import ROOT, running, sample_settings
from tests.misbehaving_server import DONE, END, MODEL, MisbehavingServer, head, page, text, usage
from tests.node_setup import MODULES, find_node
from tests.test_docs import FENCED

OUTAGE = "How long did the Reading Room outage on 14 October 2025 last?"
OFF_TOPIC = "Who won the 1998 football World Cup?"
SOURCE = "https://wiki.lanternfish.example/post-mortems/reading-room-2025-10-14"
FOUND = {"system": "Reading Room", "minutes": 52}
PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
SNIPPETS = [(PAGE[: block.start()].rpartition("\n#")[2].partition("\n")[0], block) for block in FENCED.finditer(PAGE)]


class Outage(BaseModel):
    system: str
    minutes: int


@pytest.fixture(scope="module")
def model_server() -> Iterator[MisbehavingServer]:
    """A model behind HTTP that answers everything with one JSON object, in pieces."""
    server = MisbehavingServer()
    whole = json.dumps(FOUND)
    pieces = [text(whole[:9]), text(whole[9:])]
    server.script = [head(), *pieces, text("", "stop"), usage(20, 9), DONE, END]
    yield server
    server.stop()


@pytest.fixture(scope="module")
def json_service(model_server: MisbehavingServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service whose model can write JSON."""
    settings = sample_settings(
        tmp_path_factory.mktemp("json-service"),
        llm=LLMSettings(engine="openai", url=model_server.url, model=MODEL),
        profiles={"cleave-md": ProfileSettings(dialect="markdown", top_k=3, grounding="off")},
    )
    with running(settings) as service:
        yield service.url


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def client(live_service: str) -> Iterator[openai.OpenAI]:
    with client_of(live_service) as found:
        yield found


@pytest.fixture
def json_client(json_service: str) -> Iterator[openai.OpenAI]:
    with client_of(json_service) as found:
        yield found


def asking(question: str = OUTAGE) -> Any:
    return [{"role": "user", "content": question}]


# --- The snippets of docs/clients.md ---------------------------------------------------------------------------------


def run_python(code: str, folder: Path) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "clients.md", "exec"), {"__name__": "snippet"})
    return printed.getvalue()


def run_javascript(code: str, folder: Path) -> str:
    node = find_node()
    if node is None or not MODULES.exists():
        pytest.skip("There is no Node, or no JavaScript client: python -m tests.node_setup installs both.")
    (folder / "node_modules").symlink_to(MODULES)
    script = folder / "client.mjs"
    script.write_text(code, encoding="utf-8")
    return run_program([node, str(script)])


def run_shell(code: str, folder: Path) -> str:
    return run_program(["bash", "-ec", code])


def run_program(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


RUNNERS = {"python": run_python, "js": run_javascript, "sh": run_shell}
RUNNABLE = [
    pytest.param(heading, block["language"], block["code"], id=heading.strip("# ").replace(" ", "-"))
    for heading, block in SNIPPETS
    if block["language"] in RUNNERS
]


@pytest.mark.parametrize(("heading", "language", "code"), RUNNABLE)
def test_a_snippet_of_the_documentation_runs(
    heading: str, language: str, code: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    service = request.getfixturevalue("json_service" if "JSON" in heading else "live_service")
    assert "http://127.0.0.1:8000" in code
    output = RUNNERS[language](code.replace("http://127.0.0.1:8000", service), tmp_path)
    expected = "minutes=52" if "JSON" in heading else "reading-room-outage" if "stores" in heading else "52 minutes"
    assert expected in output


def test_the_profiles_of_the_documentation_are_valid() -> None:
    found = [yaml.safe_load(block["code"]) for _, block in SNIPPETS if block["language"] == "yaml"]
    assert [sorted(Settings(**one).profiles) for one in found] == [["cleave-webui"], ["cleave-platform"]]


def test_the_documentation_names_the_versions_that_are_tested() -> None:
    rows = re.findall(r"^\| `?([\w-]+)`? ?(?:\((\w+).*?\))? \| ([\d.]+) \|", PAGE, re.MULTILINE)
    named = {(name, kind): version for name, kind, version in rows}
    packages = json.loads((ROOT / "tests" / "clients" / "package.json").read_text(encoding="utf-8"))["dependencies"]
    assert version("openai").startswith(named["openai", "Python"])
    assert version("langchain-openai").startswith(named["langchain-openai", ""])
    assert packages["openai"].startswith(named["openai", "npm"])


# --- openai, Python --------------------------------------------------------------------------------------------------


def test_a_response_has_its_search_its_text_and_its_annotations(client: openai.OpenAI) -> None:
    response = client.responses.create(model="cleave", input=OUTAGE, include=["file_search_call.results"])
    Response.model_validate(response.model_dump(exclude={"rag"}), strict=True)
    search, message = response.output
    assert isinstance(message, ResponseOutputMessage)
    assert (response.status, response.output_text) == ("completed", message.content[0].text)  # type: ignore[union-attr]
    assert "52 minutes" in response.output_text
    assert search.type == "file_search_call"
    assert search.queries == [OUTAGE]
    assert search.results
    assert search.results[0].filename == "articles/post-mortem-reading-room-outage.md"
    assert message.content[0].type == "output_text"
    annotation = message.content[0].annotations[0]
    assert annotation.type == "url_citation"
    assert annotation.url == SOURCE
    assert response.output_text[annotation.start_index : annotation.end_index] == "[1]"
    assert (response.store, response.model_extra["rag"]["cited"]) == (False, [1])  # type: ignore[index]


def test_the_streaming_helper_reads_a_response(client: openai.OpenAI) -> None:
    with client.responses.stream(model="cleave", input=asking(), instructions="Be brief.") as stream:
        events = list(stream)
        response = stream.get_final_response()
    whole = client.responses.create(model="cleave", input=OUTAGE)
    assert response.output_text == whole.output_text
    [streamed], [sent] = response.output[-1].content, whole.output[-1].content  # type: ignore[union-attr]
    assert streamed.annotations == sent.annotations
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.file_search_call.in_progress",
        "response.file_search_call.searching",
        "response.file_search_call.completed",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.annotation.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_the_output_of_a_response_is_taken_as_input(client: openai.OpenAI) -> None:
    first = client.responses.create(model="cleave", input=OUTAGE)
    conversation = [*asking(), *(item.to_dict() for item in first.output), *asking("Which team was on call then?")]
    second = client.responses.create(model="cleave", input=conversation)
    assert second.model_extra["rag"]["rewritten_query"] == "Which team was on call then?"  # type: ignore[index]


def test_a_class_is_parsed_from_chat_and_from_a_response(
    json_client: openai.OpenAI, model_server: MisbehavingServer
) -> None:
    completion = json_client.chat.completions.parse(model="cleave", messages=asking(), response_format=Outage)
    assert completion.choices[0].message.parsed == Outage(**FOUND)
    rag = completion.model_extra["rag"]  # type: ignore[index]
    assert (rag["grounded"], rag["cited"], rag["unsupported"]) == ("unchecked", [], [])
    assert rag["presented"]
    sent = model_server.bodies()[-1]["response_format"]
    assert (sent["type"], sent["json_schema"]["name"], sent["json_schema"]["strict"]) == ("json_schema", "Outage", True)
    assert sent["json_schema"]["schema"]["required"] == ["system", "minutes"]
    response = json_client.responses.parse(model="cleave", input=OUTAGE, text_format=Outage)
    assert response.output_parsed == Outage(**FOUND)
    assert model_server.bodies()[-1]["response_format"] == sent
    json_client.chat.completions.create(model="cleave", messages=asking(), response_format={"type": "json_object"})
    assert model_server.bodies()[-1]["response_format"] == {"type": "json_object"}


def test_a_refusal_of_json_has_its_own_field(json_client: openai.OpenAI) -> None:
    completion = json_client.chat.completions.parse(model="cleave", messages=asking(OFF_TOPIC), response_format=Outage)
    message = completion.choices[0].message
    assert (message.content, message.refusal, message.parsed) == (None, REFUSAL, None)
    conversation = [*asking(OFF_TOPIC), message.to_dict(), *asking()]
    json_client.chat.completions.create(model="cleave", messages=conversation)
    with json_client.chat.completions.stream(
        model="cleave", messages=asking(OFF_TOPIC), response_format=Outage
    ) as stream:
        assert stream.get_final_completion().choices[0].message.refusal == REFUSAL
    with json_client.responses.stream(model="cleave", input=OFF_TOPIC, text_format=Outage) as answer:
        kinds = [event.type for event in answer]
        [part] = answer.get_final_response().output[-1].content  # type: ignore[union-attr]
    assert (part.type, part.refusal) == ("refusal", REFUSAL)
    assert ["response.refusal.delta" in kinds, "response.output_text.delta" in kinds] == [True, False]


def test_a_stream_of_json_is_parsed_by_the_streaming_helper(json_client: openai.OpenAI) -> None:
    with json_client.chat.completions.stream(
        model="cleave", messages=asking(), response_format=Outage, stream_options={"include_usage": True}
    ) as stream:
        completion = stream.get_final_completion()
    assert completion.choices[0].message.parsed == Outage(**FOUND)
    assert completion.usage
    assert completion.usage.total_tokens == 29


def test_sampling_reaches_a_model_behind_http(json_client: openai.OpenAI, model_server: MisbehavingServer) -> None:
    sampling: Mapping[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.2,
        "seed": 3,
        "stop": ["END"],
        "logit_bias": {"5": -100},
    }
    json_client.chat.completions.create(model=MODEL, messages=asking(), max_completion_tokens=7, **sampling)
    sent = model_server.bodies()[-1]
    assert {key: sent[key] for key in sampling} == sampling
    assert sent["max_tokens"] == 7


def test_a_model_is_described_and_a_wrong_one_named(json_client: openai.OpenAI) -> None:
    assert [one.id for one in json_client.models.list()] == ["cleave", "cleave-md", MODEL]
    assert json_client.models.retrieve("cleave-md").owned_by == "cleave"
    assert json_client.models.retrieve(MODEL).owned_by == "openai"
    with pytest.raises(openai.NotFoundError) as caught:
        json_client.models.retrieve("gpt/9")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert f"Use 'cleave' or 'cleave-md' or '{MODEL}'." in caught.value.message


def test_a_profile_answers_by_its_own_settings(json_client: openai.OpenAI) -> None:
    completion = json_client.chat.completions.create(model="cleave-md", messages=asking())
    rag = completion.model_extra["rag"]  # type: ignore[index]
    assert (completion.model, len(rag["sources"]), rag["grounded"]) == ("cleave-md", 3, "unchecked")
    completion = json_client.chat.completions.create(
        model="cleave-md", messages=asking(), extra_body={"rag": {"top_k": 2}}
    )
    assert len(completion.model_extra["rag"]["sources"]) == 2  # type: ignore[index]


def test_collections_are_vector_stores(client: openai.OpenAI) -> None:
    assert "default" in [store.id for store in client.vector_stores.list()]
    store = client.vector_stores.retrieve("default")
    assert (store.id, store.status, store.file_counts.failed) == ("default", "completed", 0)
    assert store.file_counts.total >= 14
    found = list(client.vector_stores.search("default", query=OUTAGE, max_num_results=3))
    assert len(found) == 3
    assert found[0].file_id == "articles/post-mortem-reading-room-outage.md"
    assert found[0].attributes
    assert found[0].attributes["author"] == "Noor Hallivant"
    assert "52 minutes" in found[0].content[0].text


def test_what_breaks_a_response_is_its_last_event(json_client: openai.OpenAI, model_server: MisbehavingServer) -> None:
    whole, model_server.script = model_server.script, [head(), text("It lasted "), None]
    try:
        events = list(json_client.responses.create(model=MODEL, input="Hi", stream=True))
    finally:
        model_server.script = whole
    assert events[-1].type == "response.failed"
    assert events[-1].response.error
    assert events[-1].response.error.code == "server_error"
    assert "broke off" in events[-1].response.error.message


def test_a_response_that_is_cut_says_so(json_client: openai.OpenAI, model_server: MisbehavingServer) -> None:
    whole, model_server.script = model_server.script, [head(), text("It lasted"), text("", "length"), DONE, END]
    try:
        response = json_client.responses.create(model=MODEL, input="Hi", max_output_tokens=2)
        *_, last = json_client.responses.create(model=MODEL, input="Hi", max_output_tokens=2, stream=True)
    finally:
        model_server.script = whole
    assert (response.status, response.output[0].status) == ("incomplete", "incomplete")  # type: ignore[union-attr]
    assert response.incomplete_details
    assert response.incomplete_details.reason == "max_output_tokens"
    assert last.type == "response.incomplete"


def test_a_schema_that_the_server_refuses_is_a_bad_request(
    json_client: openai.OpenAI, model_server: MisbehavingServer
) -> None:
    error = {"error": {"message": "Unsupported schema.", "param": "response_format", "code": None}}
    whole, model_server.script = model_server.script, page("400 Bad Request", error)
    try:
        with pytest.raises(openai.BadRequestError, match="Unsupported schema") as caught:
            json_client.responses.parse(model="cleave", input=OUTAGE, text_format=Outage)
    finally:
        model_server.script = whole
    assert caught.value.param == "text.format"


def test_nothing_stands_in_for_json_while_the_model_is_down(
    json_client: openai.OpenAI, model_server: MisbehavingServer
) -> None:
    whole, model_server.script = model_server.script, page("500 Internal Server Error", "")
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            json_client.chat.completions.parse(model="cleave", messages=asking(), response_format=Outage)
        prose = json_client.chat.completions.create(model="cleave", messages=asking())
    finally:
        model_server.script = whole
    assert (caught.value.status_code, caught.value.code) == (503, "llm_unavailable")
    assert prose.model_extra["rag"]["grounded"] == "quotes"  # type: ignore[index]


# --- langchain-openai ------------------------------------------------------------------------------------------------


def chain_of(url: str, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(model="cleave", base_url=f"{url}/v1", api_key=SecretStr("none"), max_retries=0, **options)


def test_langchain_invokes_and_streams(live_service: str) -> None:
    chain = chain_of(live_service)
    whole = chain.invoke(OUTAGE)
    assert "52 minutes" in whole.text
    chunks = list(chain.stream(OUTAGE))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert chunks[-1].response_metadata or whole.response_metadata["finish_reason"] == "stop"


def test_langchain_invokes_asynchronously(live_service: str) -> None:
    assert "52 minutes" in asyncio.run(chain_of(live_service).ainvoke(OUTAGE)).text


def test_langchain_reads_annotations_of_responses(live_service: str) -> None:
    message = chain_of(live_service, use_responses_api=True).invoke(OUTAGE)
    [block] = [block for block in message.content if isinstance(block, dict) and block["type"] == "text"]
    assert block["annotations"][0]["url"] == SOURCE


@pytest.mark.parametrize("options", [{}, {"use_responses_api": True}])
def test_langchain_has_a_class_filled(json_service: str, options: dict[str, Any]) -> None:
    chain = chain_of(json_service, **options).with_structured_output(Outage, method="json_schema")
    assert chain.invoke(OUTAGE) == Outage(**FOUND)


# --- openai, JavaScript ----------------------------------------------------------------------------------------------

SCRIPT = """
import OpenAI from "openai";

const client = new OpenAI({ baseURL: BASE_URL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: QUESTION }];
const found = {};

const completion = await client.chat.completions.create({ model: "cleave", messages });
found.whole = completion.choices[0].message.content;
found.annotations = completion.choices[0].message.annotations.map((one) => one.url_citation.url);

let streamed = "";
const usage = { stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create({ model: "cleave", messages, stream: true, ...usage })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  found.usage = chunk.usage;
}
found.streamed = streamed;

const events = [];
const helper = client.responses.stream({ model: "cleave", input: QUESTION });
for await (const event of helper) events.push(event.type);
const response = await helper.finalResponse();
found.response = response.output_text;
found.cited = response.output.at(-1).content[0].annotations.map((one) => one.url);
found.events = [events[0], events.at(-1)];

found.models = [];
for await (const model of client.models.list()) found.models.push(model.id);
const page = await client.vectorStores.search("default", { query: QUESTION, max_num_results: 1 });
found.file = page.data[0].file_id;
try {
  await client.chat.completions.create({ model: "gpt-9", messages });
} catch (error) {
  found.error = [error.constructor.name, error.status, error.code, error.param];
}
console.log(JSON.stringify(found));
"""


def test_the_javascript_client_reads_everything(live_service: str, tmp_path: Path) -> None:
    values = {"BASE_URL": f"{live_service}/v1", "QUESTION": OUTAGE}
    constants = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in values.items())
    found = json.loads(run_javascript(f"{constants}{SCRIPT}", tmp_path))
    assert "52 minutes" in found["whole"]
    assert found["whole"] == found["streamed"] == found["response"]
    assert found["annotations"] == found["cited"] == [SOURCE]
    assert found["usage"]["total_tokens"] == 0
    assert found["events"] == ["response.created", "response.completed"]
    assert found["models"] == ["cleave", "extractive"]
    assert found["file"] == "articles/post-mortem-reading-room-outage.md"
    assert found["error"] == ["NotFoundError", 404, "model_not_found", "model"]
