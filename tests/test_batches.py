"""Batches over HTTP, with the official client: files in, answers out, by the code that answers online."""

import asyncio
import functools
import json
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from app import batch_worker, keys
from app.domain import Delta, GenerationRequest
from app.errors import CleaveError, LLMUnavailable, Overloaded
from app.keys import create_key, keys_path, revoke_key
from app.rates import Rates
from app.settings import APISettings, BatchSettings, Settings
from tests.conftest import ARTICLES, ServiceThread, running, sample_settings
from tests.scripted_llm import ScriptedLLM
from tests.small_disk import fill, small_disk
from tests.waiting import wait_until

PATIENCE_S = 60.0
ARTICLE = ARTICLES / "post-mortem-reading-room-outage.md"
QUESTIONS = [
    "How long did the Reading Room outage last?",
    "Who won the 1998 football World Cup?",
    "What share of conversations does the Reading Room canary receive, and for how long?",
]


def line(custom_id: str, body: Any = None, **changes: Any) -> dict[str, Any]:
    body = body or {"model": "cleave", "messages": [{"role": "user", "content": QUESTIONS[0]}]}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body, **changes}


def asking(question: str, **options: Any) -> dict[str, Any]:
    return {"model": "cleave", "messages": [{"role": "user", "content": question}], **options}


def write_lines(lines: list[Any]) -> bytes:
    return b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines)


def client_of(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S)


@pytest.fixture
def client(live_service: str) -> openai.OpenAI:
    return client_of(live_service)


def begin(client: openai.OpenAI, content: bytes) -> openai.types.Batch:
    sent = client.files.create(file=("requests.jsonl", content), purpose="batch")
    batch = client.batches.create(
        input_file_id=sent.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"run": "test"}
    )
    assert batch.status == "validating"
    return batch


def ended(client: openai.OpenAI, batch: openai.types.Batch) -> openai.types.Batch:
    def has_ended() -> bool:
        nonlocal batch
        batch = client.batches.retrieve(batch.id)
        return batch.status in ("completed", "failed", "expired", "cancelled")

    wait_until(has_ended, PATIENCE_S)
    return batch


def run(client: openai.OpenAI, content: bytes) -> openai.types.Batch:
    return ended(client, begin(client, content))


def read(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    return [] if file_id is None else [json.loads(one) for one in client.files.content(file_id).text.splitlines()]


def test_every_request_is_answered_as_online(client: openai.OpenAI) -> None:
    batch = run(client, write_lines([line(f"q{n}", asking(question)) for n, question in enumerate(QUESTIONS)]))
    assert batch.status == "completed"
    assert batch.metadata == {"run": "test"}
    assert batch.request_counts
    assert batch.request_counts.model_dump() == {"completed": 3, "failed": 0, "total": 3}
    assert batch.error_file_id is None
    results = read(client, batch.output_file_id)
    assert [one["custom_id"] for one in results] == ["q0", "q1", "q2"]
    for one, question in zip(results, QUESTIONS, strict=True):
        online = client.chat.completions.create(**asking(question)).model_dump()
        answered = one["response"]["body"]
        assert one["response"]["status_code"] == 200
        assert answered["choices"][0]["message"]["content"] == online["choices"][0]["message"]["content"]
        assert answered["choices"][0]["message"]["annotations"] == online["choices"][0]["message"]["annotations"]
        assert answered["rag"]["sources"] == online["rag"]["sources"]


# --- What is wrong with requests and files ---------------------------------------------------------------------------

WRONG: dict[str, dict[str, Any]] = {
    "unknown model": {"model": "gpt-5", "messages": [{"role": "user", "content": "?"}]},
    "no messages": {"model": "cleave"},
    "a temperature that is none": asking("?", temperature=9),
    "too many answers": asking("?", n=2),
    "a collection that is not there": asking("?", rag={"collection": "elsewhere"}),
    "a text that is none": asking("\ud800"),
    "a schema that is none": asking(
        "?", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    ),
}


def test_a_wrong_request_is_refused_as_online_and_the_others_are_answered(client: openai.OpenAI) -> None:
    bodies = {
        "first": asking(QUESTIONS[1]),
        **WRONG,
        "streamed": asking("?", stream=True),
        "last": asking(QUESTIONS[1]),
    }
    batch = run(client, write_lines([line(name, body) for name, body in bodies.items()]))
    assert batch.status == "completed"
    assert batch.request_counts
    assert batch.request_counts.model_dump() == {"completed": 2, "failed": len(bodies) - 2, "total": len(bodies)}
    assert [one["custom_id"] for one in read(client, batch.output_file_id)] == ["first", "last"]
    refused = {one["custom_id"]: one["response"] for one in read(client, batch.error_file_id)}
    assert list(refused) == [*WRONG, "streamed"]
    assert refused["unknown model"]["status_code"] == 404
    assert (refused["streamed"]["status_code"], refused["streamed"]["body"]["error"]["param"]) == (400, "stream")
    with httpx.Client(base_url=str(client.base_url), trust_env=False, timeout=PATIENCE_S) as online:
        for name, body in WRONG.items():
            response = online.post(
                "chat/completions", content=json.dumps(body), headers={"Content-Type": "application/json"}
            )
            error, expected = refused[name]["body"]["error"], response.json()["error"]
            assert (refused[name]["status_code"], error["code"]) == (response.status_code, expected["code"]), name
            assert error["message"], name


def test_lines_that_are_no_requests_fail_the_batch_and_are_named(client: openai.OpenAI) -> None:
    batch = run(client, write_lines([line("a"), b"{", line("a"), line("b", url="/v1/embeddings")]))
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert batch.errors
    assert batch.errors.data
    told = [(one.line, one.code, one.param) for one in batch.errors.data]
    assert told == [
        (2, "invalid_json_line", None),
        (3, "duplicate_custom_id", "custom_id"),
        (4, "invalid_url", "url"),
    ]
    assert run(client, b"").status == "failed"


def test_batches_and_files_are_listed_in_pages(client: openai.OpenAI) -> None:
    begun = [begin(client, write_lines([b"{"])) for _ in range(3)]
    page = client.batches.list(limit=2)
    assert [one.id for one in page.data] == [begun[2].id, begun[1].id]
    assert page.has_more
    after = client.batches.list(limit=2, after=page.data[-1].id).data
    assert after[0].id == begun[0].id
    found = [one.id for one in client.batches.list(limit=1)]
    assert found[:3] == [one.id for one in reversed(begun)]
    assert len(set(found)) == len(found)
    files = [one.id for one in client.files.list(limit=1, purpose="batch")]
    assert files[:3] == [one.input_file_id for one in reversed(begun)]
    assert not list(client.files.list(purpose="batch_output", after=files[-1]))
    for one in begun:
        ended(client, one)


def refusal_of(call: Any) -> tuple[int, str | None, str | None]:
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    assert "\n" not in caught.value.message
    return caught.value.status_code, caught.value.code, caught.value.param


def test_a_batch_that_cannot_begin_says_why(client: openai.OpenAI) -> None:
    done = run(client, write_lines([line("a", asking("?", n=2))]))
    assert done.error_file_id
    right: dict[str, Any] = {
        "input_file_id": done.input_file_id,
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    wrong: list[tuple[str, Any, int]] = [
        ("endpoint", "/v1/embeddings", 400),
        ("completion_window", "0h", 400),
        ("completion_window", "31d", 400),
        ("completion_window", "soon", 400),
        ("input_file_id", "file-" + "0" * 24, 404),
        ("input_file_id", "../../etc/passwd", 404),
        ("input_file_id", done.error_file_id, 400),
        ("metadata", {"x": "y" * 513}, 400),
        ("metadata", {str(n): "" for n in range(17)}, 400),
    ]
    for name, value, expected in wrong:
        status, _, param = refusal_of(lambda name=name, value=value: client.batches.create(**{**right, name: value}))
        assert (status, str(param).split(".")[0].replace("file_id", "input_file_id")[-8:]) == (expected, name[-8:]), (
            value
        )
    assert refusal_of(lambda: client.batches.retrieve("batch_1"))[:2] == (404, "batch_not_found")
    assert refusal_of(lambda: client.batches.cancel("batch_1"))[:2] == (404, "batch_not_found")
    assert client.batches.cancel(done.id).status == "completed"


def test_a_file_is_kept_as_it_came_until_it_is_deleted(client: openai.OpenAI) -> None:
    content = b"\xef\xbb\xbfanything\r\n\x00\xff"
    sent = client.files.create(file=("é; x.jsonl", content), purpose="batch")
    assert (sent.bytes, sent.purpose, sent.filename) == (len(content), "batch", "é; x.jsonl")
    assert client.files.retrieve(sent.id) == sent
    assert client.files.content(sent.id).read() == content
    assert client.files.delete(sent.id).deleted
    assert refusal_of(lambda: client.files.retrieve(sent.id))[0] == 404
    assert refusal_of(lambda: client.files.content(sent.id))[0] == 404
    assert refusal_of(lambda: client.files.delete(sent.id))[0] == 404


# --- A service that answers when it is let ---------------------------------------------------------------------------


class GatedLLM(ScriptedLLM):
    """Answers once the gate is open; before that, each failure is raised once."""

    def __init__(self, *failures: CleaveError, is_open: bool = False) -> None:
        self.gate = asyncio.Event()
        super().__init__(self.gate, "An answer.")
        self.failures = list(failures)
        if is_open:
            self.gate.set()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        if self.failures:
            self.requests.append(request)
            yield Delta("The beginning of", completion_tokens=1, prompt_tokens=1)
            raise self.failures.pop()
        async for delta in super().generate(request):
            yield delta


RAW = {"model": "scripted", "messages": [{"role": "user", "content": "?"}]}


class SpoiltLLM(GatedLLM):
    """Is there, and loses whoever asks for poison."""

    def __init__(self) -> None:
        super().__init__(is_open=True)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        if request.messages[-1].content == "poison":
            raise LLMUnavailable("The engine gave the request up.")
        async for delta in super().generate(request):
            yield delta


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WATCH_S", "SEARCHED_EVERY_S", "MIN_RETRY_S"):
        monkeypatch.setattr(batch_worker, name, 0.05)
    monkeypatch.setattr(keys, "CHECK_S", 0.0)


def gated_settings(data_dir: Path, **changes: Any) -> Settings:
    return sample_settings(data_dir, seed=None, **changes)


@pytest.fixture
def gated(tmp_path: Path, hurry: None) -> Iterator[tuple[ServiceThread, GatedLLM, openai.OpenAI]]:
    llm = GatedLLM()
    with running(gated_settings(tmp_path), llm) as service:
        yield service, llm, client_of(service.url)


def test_cancelled_at_work_and_in_the_queue(gated: tuple[ServiceThread, GatedLLM, openai.OpenAI]) -> None:
    service, llm, client = gated
    wrong = [line(f"wrong {n}", {**RAW, "n": 2}) for n in range(3)]
    at_work = begin(client, write_lines([*wrong, *(line(f"q{n}", RAW) for n in range(30))]))
    wait_until(lambda: len(llm.requests) >= 4, PATIENCE_S)
    queued = begin(client, write_lines([line("a", RAW)]))
    assert refusal_of(lambda: client.files.delete(at_work.input_file_id))[0] == 400
    assert client.batches.retrieve(at_work.id).status == "in_progress"
    for one in (queued, at_work):
        assert client.batches.cancel(one.id).status in ("cancelling", "cancelled")
    done = ended(client, at_work)
    assert (done.status, done.output_file_id) == ("cancelled", None)
    assert [one["custom_id"] for one in read(client, done.error_file_id)] == [f"wrong {n}" for n in range(3)]
    assert done.request_counts
    assert (done.request_counts.failed, done.request_counts.total) == (3, 33)
    assert ended(client, queued).status == "cancelled"
    assert len(llm.requests) == 4
    assert client.files.delete(done.input_file_id).deleted
    service.call_soon(llm.gate.set)
    assert run(client, write_lines([line("after", RAW)])).status == "completed"


def test_what_passes_by_itself_is_waited_for(tmp_path: Path, hurry: None) -> None:
    llm = GatedLLM(LLMUnavailable("Gone."), LLMUnavailable("Gone."), is_open=True)
    with running(sample_settings(tmp_path, seed=ARTICLE), llm) as service:
        client = client_of(service.url)
        done = run(client, write_lines([line("raw", RAW), line("rag", asking(QUESTIONS[0]))]))
        assert (done.status, done.error_file_id) == ("completed", None)
        found = {one["custom_id"]: one["response"]["body"] for one in read(client, done.output_file_id)}
    assert list(found) == ["raw", "rag"]
    assert found["raw"]["choices"][0]["message"]["content"] == "An answer."
    assert len(llm.requests) == 4
    assert all(one.is_background for one in llm.requests)


def test_a_model_that_has_too_much_to_do_is_waited_for(tmp_path: Path, hurry: None) -> None:
    llm = GatedLLM(*(Overloaded("Full.") for _ in range(8)), is_open=True)
    with running(sample_settings(tmp_path, seed=ARTICLE), llm) as service:
        client = client_of(service.url)
        done = run(client, write_lines([line("raw", RAW), line("rag", asking(QUESTIONS[0]))]))
        assert (done.status, done.error_file_id) == ("completed", None)
        found = {one["custom_id"]: one["response"]["body"] for one in read(client, done.output_file_id)}
    assert [one["rag"]["degraded"] for one in found.values()] == [[], []]
    assert not llm.failures


def test_a_request_that_the_model_cannot_answer_fails_alone(tmp_path: Path, hurry: None) -> None:
    poison = {**RAW, "messages": [{"role": "user", "content": "poison"}]}
    with running(gated_settings(tmp_path), SpoiltLLM()) as service:
        client = client_of(service.url)
        done = run(client, write_lines([line("a", RAW), line("poison", poison), line("b", RAW)]))
        assert done.status == "completed"
        assert [one["custom_id"] for one in read(client, done.output_file_id)] == ["a", "b"]
        (failed,) = read(client, done.error_file_id)
    assert failed["custom_id"] == "poison"
    assert (failed["response"]["status_code"], failed["response"]["body"]["error"]["code"]) == (503, "llm_unavailable")


def test_a_full_disk_keeps_a_batch_waiting(tmp_path: Path, hurry: None) -> None:
    llm = GatedLLM()
    with small_disk(tmp_path / "disk") as disk:
        settings = gated_settings(disk, api=APISettings(min_free_bytes=0))
        with running(settings, llm) as service:
            client = client_of(service.url)
            batch = begin(client, write_lines([line(f"q{n}", RAW) for n in range(6)]))
            wait_until(lambda: len(llm.requests) == 4, PATIENCE_S)
            filler = fill(disk)
            assert refusal_of(lambda: begin(client, b"x" * 8192))[:2] == (507, "storage_full")
            service.call_soon(llm.gate.set)
            wait_until(lambda: len(llm.requests) > 12, PATIENCE_S)
            assert client.batches.retrieve(batch.id).status == "in_progress"
            filler.unlink()
            done = ended(client, batch)
            assert done.status == "completed"
            assert [one["custom_id"] for one in read(client, done.output_file_id)] == [f"q{n}" for n in range(6)]


# --- Uploads ---------------------------------------------------------------------------------------------------------


def test_uploads_that_are_refused(tmp_path: Path) -> None:
    limits = APISettings(max_body_bytes=1000, min_free_bytes=0)
    settings = gated_settings(tmp_path, api=limits, batch=BatchSettings(max_file_bytes=5000))
    with running(settings) as service:
        client = client_of(service.url)
        # A file goes to disk as it comes: what is held in memory does not limit it.
        assert client.files.create(file=("a.jsonl", b"x" * 5000), purpose="batch").bytes == 5000
        assert refusal_of(lambda: client.files.create(file=("a.jsonl", b"x" * 5001), purpose="batch"))[:2] == (
            413,
            "too_large",
        )
        assert refusal_of(lambda: client.files.create(file=("a.jsonl", b"x"), purpose="fine-tune")) == (
            400,
            "invalid_value",
            "purpose",
        )
        file, purpose = ("file", ("a.jsonl", b"x")), {"purpose": "batch"}
        with httpx.Client(base_url=f"{service.url}/v1", trust_env=False, timeout=PATIENCE_S) as plain:
            for status, code, sent in [
                (400, "invalid_value", {"files": [file, file], "data": purpose}),
                (400, "invalid_value", {"files": [("other", ("a.jsonl", b"x"))], "data": purpose}),
                (400, "invalid_value", {"files": [file]}),
                (415, "unsupported_media_type", {"json": purpose}),
            ]:
                response = plain.post("files", **sent)  # type: ignore[arg-type]
                assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert len(list(client.files.list())) == 1
    assert not list((tmp_path / "uploads").iterdir())


# --- Keys ------------------------------------------------------------------------------------------------------------


def test_a_key_has_its_own_batches_and_they_have_its_rights(tmp_path: Path, hurry: None) -> None:
    llm = GatedLLM(is_open=True)
    settings = sample_settings(tmp_path, seed=ARTICLE)
    path = keys_path(settings)
    made = {
        "reader": create_key(path, "reader", read=["default"])[1],
        "stranger": create_key(path, "stranger", read=["nothing"])[1],
        "writer": create_key(path, "writer", write=["default"])[1],
        "admin": create_key(path, "admin", is_admin=True)[1],
    }
    with running(settings, llm) as service:
        reader, stranger, writer, admin = (client_of(service.url, key) for key in made.values())
        content = write_lines([line("own", asking(QUESTIONS[0])), line("other", asking("?", rag={"collection": "x"}))])
        done = run(reader, content)
        assert [one["custom_id"] for one in read(reader, done.output_file_id)] == ["own"]
        (refused,) = read(reader, done.error_file_id)
        assert (refused["custom_id"], refused["response"]["status_code"]) == ("other", 403)
        strange = run(stranger, content)  # Who means another collection without naming one: it is not there yet.
        assert [one["response"]["status_code"] for one in read(stranger, strange.error_file_id)] == [404, 403]
        # What is another's is not there.
        right: dict[str, Any] = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
        for call in (
            lambda: stranger.batches.retrieve(done.id),
            lambda: stranger.batches.cancel(done.id),
            lambda: stranger.files.retrieve(done.input_file_id),
            lambda: stranger.files.content(str(done.output_file_id)),
            lambda: stranger.files.delete(str(done.output_file_id)),
            lambda: stranger.batches.create(input_file_id=done.input_file_id, **right),
        ):
            assert refusal_of(call)[0] == 404
        assert [one.id for one in stranger.batches.list()] == [strange.id]
        assert {one.id for one in stranger.files.list()} == {strange.input_file_id, strange.error_file_id}
        assert [one.id for one in admin.batches.list()] == [strange.id, done.id]
        assert read(admin, done.output_file_id) == read(reader, done.output_file_id)
        assert refusal_of(lambda: begin(writer, content))[0] == 403
        assert refusal_of(lambda: begin(client_of(service.url), content))[0] == 401


def test_a_revoked_keys_batch_is_refused_line_by_line(tmp_path: Path, hurry: None) -> None:
    llm = GatedLLM()
    settings = gated_settings(tmp_path)
    path = keys_path(settings)
    key, admin = create_key(path, "soon-gone", read=["*"])[1], create_key(path, "a", is_admin=True)[1]
    with running(settings, llm) as service:
        batch = begin(client_of(service.url, key), write_lines([line(f"q{n}", RAW) for n in range(10)]))
        wait_until(lambda: len(llm.requests) == 4, PATIENCE_S)
        revoke_key(path, "soon-gone")
        service.call_soon(llm.gate.set)
        client = client_of(service.url, admin)
        done = ended(client, batch)
        assert [one["custom_id"] for one in read(client, done.output_file_id)] == [f"q{n}" for n in range(4)]
        refused = read(client, done.error_file_id)
    assert [one["custom_id"] for one in refused] == [f"q{n}" for n in range(4, 10)]
    assert {one["response"]["status_code"] for one in refused} == {401}


def test_a_keys_rate_is_waited_for(tmp_path: Path, hurry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_worker, "Rates", functools.partial(Rates, length_s=1))
    llm = GatedLLM(is_open=True)
    settings = gated_settings(tmp_path)
    key = create_key(keys_path(settings), "slow", read=["*"], requests_per_minute=1000, tokens_per_minute=300)[1]
    with running(settings, llm) as service:
        client = client_of(service.url, key)
        done = run(client, write_lines([line(f"q{n}", RAW) for n in range(8)]))
        assert (done.status, done.error_file_id) == ("completed", None)
        assert [one["custom_id"] for one in read(client, done.output_file_id)] == [f"q{n}" for n in range(8)]
    assert len(llm.requests) == 8


def test_a_key_that_waits_for_its_rate_holds_up_nobody(tmp_path: Path, hurry: None) -> None:
    settings = gated_settings(tmp_path)
    path = keys_path(settings)
    # Of its own requests to the API, too: those are the administrator's here.
    slow = create_key(path, "slow", read=["*"], requests_per_minute=3)[1]
    quick, admin = create_key(path, "quick", read=["*"])[1], create_key(path, "a", is_admin=True)[1]
    with running(settings, GatedLLM(is_open=True)) as service:
        begun = begin(client_of(service.url, slow), write_lines([line(f"q{n}", RAW) for n in range(100)]))
        client = client_of(service.url, quick)
        done = run(client, write_lines([line(f"q{n}", RAW) for n in range(50)]))
        assert (done.status, done.error_file_id) == ("completed", None)
        assert client_of(service.url, admin).batches.retrieve(begun.id).status == "in_progress"
