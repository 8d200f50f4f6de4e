"""The whole service on real parts: Ray Serve, vLLM with the bundled model, the embedded store, real clients."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from reportlab.pdfgen import canvas

from tests.running_service import ROOT, RunningService, running, start, write_config
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1200)]

QUESTION = "How long did the Reading Room outage on 14 October 2025 last?"
BIN = Path(sys.executable).parent
EVERYDAY_QUESTION = "Who won the 1998 football World Cup?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[RunningService]:
    with running(write_config(folder, seed=str(ROOT / "examples" / "articles"), llm={"device": "cpu"})) as found:
        yield found


@pytest.fixture
def client(service: RunningService) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=120) as found:
        yield found


def ask(url: str, question: str, **body: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": question}], **body}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120, trust_env=False)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_the_start_says_what_it_does_and_how_to_ask(service: RunningService) -> None:
    for said in (
        "starting Ray Serve",
        "retriever is ready: 14 documents",
        "language model is ready",
        "dashboard  http",
    ):
        assert said in service.output


def test_a_question_gets_a_cited_answer(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(model="cleave", messages=[{"role": "user", "content": QUESTION}])
    answer = completion.choices[0].message
    assert "52 minutes" in (answer.content or "")
    assert answer.annotations
    citation = answer.annotations[0].url_citation
    assert (answer.content or "")[citation.start_index : citation.end_index] == "[1]"
    assert citation.url.startswith("https://wiki.lanternfish.example/")
    assert completion.usage
    assert completion.usage.prompt_tokens > 100
    rag = completion.model_extra["rag"] if completion.model_extra else {}
    assert rag["cited"] == [1]
    assert rag["grounded"] in ("model", "mixed", "quotes")


def test_a_streamed_answer_has_its_sources_first_and_equals_the_other(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="cleave", messages=[{"role": "user", "content": QUESTION}])
    stream = client.chat.completions.create(
        model="cleave",
        messages=[{"role": "user", "content": QUESTION}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].model_extra
    assert chunks[0].model_extra["rag"]["sources"][0]["n"] == 1
    assert not chunks[0].choices[0].delta.content
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage == whole.usage


def test_what_the_documents_do_not_hold_is_said(service: RunningService) -> None:
    completion = ask(service.url, EVERYDAY_QUESTION)
    assert "do not hold" in completion["choices"][0]["message"]["content"]
    assert completion["rag"]["grounded"] == "refused"


def test_the_example_questions_have_their_answers(service: RunningService) -> None:
    lines = (ROOT / "examples" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    wrong = []
    for example in map(json.loads, lines):
        completion = ask(service.url, example["question"])
        text = completion["choices"][0]["message"]["content"]
        refused = completion["rag"]["grounded"] == "refused"
        if refused != (example["answer"] is None) or (example["answer"] or "").casefold() not in text.casefold():
            wrong.append((example["question"], text))
    # The bundled model may put an answer in other words; more than that would be a loss.
    assert len(wrong) <= 4, wrong


def test_the_raw_model_is_served_under_its_own_name(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["cleave", "SmolLM2-135M-Instruct"]
    completion = client.chat.completions.create(
        model=names[1], messages=[{"role": "user", "content": "Say hello."}], max_tokens=8
    )
    assert completion.usage
    assert completion.usage.completion_tokens <= 8
    assert not completion.choices[0].message.annotations


def test_a_conversation_that_is_too_long_is_refused_with_its_status(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="SmolLM2-135M-Instruct", messages=[{"role": "user", "content": "word " * 9000}], stream=True
        )
    assert caught.value.code == "context_length_exceeded"


def num_running(service: RunningService) -> int | None:
    """None when the engine is too busy to say."""
    found: int | None = service.readiness()["parts"]["llm"].get("num_running")
    return found


def num_documents(service: RunningService) -> int:
    """0 when the retriever is too busy to say."""
    return int(service.readiness()["parts"]["retriever"].get("num_documents", 0))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engine(service: RunningService, stream: bool) -> None:
    body = {
        "model": "SmolLM2-135M-Instruct",
        "messages": [{"role": "user", "content": "Write a very long story about a lighthouse."}],
        "max_tokens": 4000,
        "stream": stream,
    }
    with httpx.Client(trust_env=False, timeout=120) as client:
        if stream:
            with client.stream("POST", f"{service.url}/v1/chat/completions", json=body) as response:
                lines = response.iter_lines()  # Held on to: a dropped iterator closes the response.
                next(lines)
                wait_until(lambda: num_running(service) == 1, seconds=60)
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{service.url}/v1/chat/completions", json=body, timeout=2)
    # The rest of the story would take the engine minutes.
    wait_until(lambda: num_running(service) == 0, seconds=30)


def test_liveness_answers_while_the_engine_is_busy(service: RunningService) -> None:
    asking = [threading.Thread(target=ask, args=(service.url, QUESTION)) for _ in range(8)]
    for thread in asking:
        thread.start()
    with httpx.Client(trust_env=False, timeout=15) as client:
        while any(thread.is_alive() for thread in asking):
            assert client.get(f"{service.url}/livez").status_code == 200
    for thread in asking:
        thread.join()


def readme_blocks(language: str) -> list[str]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)


@pytest.fixture
def reader_folder(tmp_path: Path) -> Path:
    """The files that the README's commands name."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "plan.md").write_text("# Plan\n\nThe herons move in May.", encoding="utf-8")
    (tmp_path / "corpus.jsonl").write_text('{"id": "c1", "title": "C", "text": "Storks stay."}\n', encoding="utf-8")
    pdf = canvas.Canvas(str(tmp_path / "report.pdf"))
    pdf.drawString(100, 700, "The annual report counts nine storks.")
    pdf.save()
    return tmp_path


def run_as_reader(command: list[str], service: RunningService, folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "CLEAVE_URL": service.url}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# A key would shut all others out of this service: tests/test_keys.py creates the one of the README.
@pytest.mark.parametrize("block", [one for one in readme_blocks("sh") if "make " not in one and " keys " not in one])
def test_the_commands_of_the_readme_work(service: RunningService, reader_folder: Path, block: str) -> None:
    script = block.replace("http://127.0.0.1:8000", service.url).replace("curl ", "curl -sS --fail-with-body ")
    output = run_as_reader(["bash", "-euc", script], service, reader_folder)
    assert '"failed"' not in output


def test_the_python_of_the_readme_works(service: RunningService, reader_folder: Path) -> None:
    (block,) = readme_blocks("python")
    script = block.replace("http://127.0.0.1:8000", service.url)
    output = run_as_reader([sys.executable, "-c", script], service, reader_folder)
    assert "900 tokens" in output
    assert "Chunk by heading" in output


def test_the_answers_in_the_readme_are_what_the_service_says(service: RunningService, reader_folder: Path) -> None:
    shown = re.findall(r"^\$ (cleave ask .+)\n(.+)$", "\n".join(readme_blocks("console")), re.MULTILINE)
    assert len(shown) == 2
    for command, answer in shown:
        assert run_as_reader(["bash", "-euc", command], service, reader_folder).splitlines()[0] == answer


def test_while_the_engine_is_dead_answers_are_quotes_and_none_fails(service: RunningService) -> None:
    def engines() -> list[psutil.Process]:
        found = []
        for one in service.descendants():
            with contextlib.suppress(psutil.NoSuchProcess):  # Others come and go.
                if "EngineCore" in " ".join(one.cmdline()):
                    found.append(one)
        return found

    wait_until(engines, seconds=120)
    engines()[0].kill()
    during = ask(service.url, QUESTION)
    assert during["rag"]["degraded"] == ["llm_unavailable"]
    assert during["rag"]["grounded"] == "quotes"
    assert "52 minutes" in during["choices"][0]["message"]["content"]

    def has_recovered() -> bool:
        return not ask(service.url, QUESTION)["rag"]["degraded"]

    wait_until(has_recovered, seconds=300)


def essays(count: int) -> list[dict[str, Any]]:
    paragraph = "A gateway of the number {n} sends tokens to a client and waits for nobody else. " * 30
    return [{"id": f"essay-{n}", "title": f"Essay {n}", "text": paragraph.format(n=n)} for n in range(count)]


def test_a_service_killed_in_the_middle_of_an_ingestion_keeps_whole_documents(
    folder: Path, service: RunningService
) -> None:
    """Last in this file: it ends the module's service, and starts it again over the same folder."""

    def ingest() -> None:
        with httpx.Client(trust_env=False, timeout=120) as client:
            for essay in essays(200):
                try:
                    client.post(f"{service.url}/v1/documents", json={"documents": [essay]})
                except httpx.HTTPError:
                    return  # The service was killed: that is what this test is about.

    wait_until(lambda: num_documents(service), 60)
    before = num_documents(service)
    writer = threading.Thread(target=ingest)
    writer.start()
    wait_until(lambda: num_documents(service) >= before + 3, 120)
    service.kill()
    writer.join()

    with running(folder / "serve_config.yaml") as again:
        held = again.readiness()["parts"]["retriever"]
        assert held["num_documents"] >= before + 3
        listed = httpx.get(f"{again.url}/v1/documents?limit=1000", trust_env=False, timeout=60).json()
        assert listed["total"] == len(listed["data"]) == held["num_documents"]
        assert sum(one["num_chunks"] for one in listed["data"]) == held["num_chunks"]
        assert "52 minutes" in ask(again.url, QUESTION)["choices"][0]["message"]["content"]

        descendants = again.descendants()
        assert again.stop() == 0
        wait_until(lambda: not any(map(is_at_work, descendants)), 60)


def is_at_work(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"llm": {"modle": "x"}}, "llm.modle"),
        ({"llm": {"device": "cpu", "model": "/nowhere/model"}}, "llm.model"),
    ],
)
def test_a_wrong_setting_ends_the_start_in_one_line(tmp_path: Path, args: dict[str, Any], said: str) -> None:
    service = start(write_config(tmp_path, **args), tmp_path / "output.txt")
    assert service.process.wait(180) in (1, 2)
    complaint = [line for line in service.output.splitlines() if line.startswith("cleave:")]
    assert len(complaint) == 1
    assert said in complaint[0]
    assert "Traceback" not in service.output


def test_a_start_that_waits_for_a_node_says_so_and_so_does_the_doctor(tmp_path: Path) -> None:
    config = write_config(tmp_path, llm={"device": "gpu", "engine": "extractive"})
    service = start(config, tmp_path / "output.txt")
    try:
        why = "LLM asks for 0.4 CPU, 1 GPU per replica, and no node has as much"
        wait_until(lambda: f"waiting: {why}" in service.output, seconds=120)
        # The line comes from the dashboard; what the Ingress knows of it comes by itself, and a probe may be late.
        wait_until(lambda: why in str(service.readiness()["parts"]["llm"]), seconds=120)
        log_file = tmp_path / "data" / "logs" / "serve.log"
        # Ray forwards a replica's lines with a delay.
        wait_until(lambda: "the language model cannot be placed" in log_file.read_text(encoding="utf-8"), seconds=60)
        log = log_file.read_text(encoding="utf-8")
        found = re.search(r"View the dashboard at \S*?(http\S*?:\d+)", log)
        assert found
        doctor = subprocess.run(
            [str(BIN / "cleave"), "doctor", "--config", str(config), "--json"],
            env={**os.environ, "RAY_DASHBOARD_ADDRESS": found[1]},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        placement = next(one for one in json.loads(doctor.stdout) if one["name"] == "placement")
        assert placement["status"] == "failed"
        assert why in placement["detail"]
    finally:
        service.stop()
