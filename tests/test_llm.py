"""What every engine promises, asked of each of them: in process, over HTTP, and behind a Serve handle."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import psutil
import pytest
import pytest_asyncio

from app.domain import Delta, GenerationRequest, JSONFormat, Message, Passage, Role, SamplingParams, Sentence
from app.errors import ContextTooLong, LLMUnavailable, UnsupportedParameter
from app.llm import LLM
from app.llm.openai_http import OpenAIEngine
from app.services import build_llm
from app.settings import LLMSettings, LoggingSettings, Settings
from tests.misbehaving_server import MODEL, WINDOW, MisbehavingServer
from tests.running_service import free_port
from tests.tiny_models import make_model

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]

START_TIMEOUT_S = 480


@dataclass
class Subject:
    """An engine that runs; `num_running` asks whoever computes, and `kill` takes it away."""

    llm: LLM
    num_running: Callable[[], Awaitable[int]]
    kill: Callable[[], Awaitable[None]]


Opened: TypeAlias = AbstractAsyncContextManager[Subject]


async def until(condition: Callable[[], Awaitable[bool]], what: str, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while not await condition():  # noqa: ASYNC110  # What is waited for happens in another process.
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"waited {timeout_s} s in vain until {what}") from None


# --- The engines, each opened by one function ------------------------------------------------------------------------


def settings_of_vllm(folder: Path) -> LLMSettings:
    model = str(folder / "model")
    if not Path(model).exists():
        make_model(Path(model), says="alpha", max_length=WINDOW)
    return LLMSettings(model=model, max_num_seqs=8, stream_interval=4)


def settings_of_server(url: str, model: str = MODEL) -> LLMSettings:
    return LLMSettings(engine="openai", url=url, model=model)


@asynccontextmanager
async def in_process(settings: LLMSettings) -> AsyncIterator[Subject]:
    llm = await build_llm(Settings(llm=settings), "cpu")

    async def num_running() -> int:
        return (await llm.info()).num_running

    yield Subject(llm, num_running, llm.close)
    await llm.close()


@asynccontextmanager
async def extractive(folder: Path) -> AsyncIterator[Subject]:
    async with in_process(LLMSettings(engine="extractive")) as subject:
        yield subject


@asynccontextmanager
async def vllm(folder: Path) -> AsyncIterator[Subject]:
    async with in_process(settings_of_vllm(folder)) as subject:
        yield subject


@asynccontextmanager
async def small_server(folder: Path) -> AsyncIterator[Subject]:
    server = MisbehavingServer()
    async with in_process(settings_of_server(server.url)) as subject:

        async def num_running() -> int:
            return server.num_running

        async def kill() -> None:
            server.stop()

        yield Subject(subject.llm, num_running, kill)
    server.stop()


@asynccontextmanager
async def vllm_server(folder: Path) -> AsyncIterator[Subject]:
    """vLLM's own server, as one would start it by hand."""
    port = free_port()
    options = ["--model", settings_of_vllm(folder).model, "--served-model-name", "tiny", "--port", str(port)]
    options += ["--host", "127.0.0.1", "--enforce-eager", "--max-num-seqs", "8"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    output = folder / "vllm_server.txt"
    with output.open("wb") as file:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, options)]
        process = await asyncio.to_thread(
            subprocess.Popen[bytes], command, stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    try:
        async with (
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client,
            in_process(settings_of_server(f"http://127.0.0.1:{port}/v1", "tiny")) as subject,
        ):

            async def is_up() -> bool:
                assert process.poll() is None, output.read_text()
                try:
                    return (await client.get("/health")).is_success
                except httpx.TransportError:
                    return False

            async def num_running() -> int:
                metrics = (await client.get("/metrics")).text.splitlines()
                gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
                return sum(int(float(line.split()[-1])) for line in metrics if line.startswith(gauges))

            async def kill() -> None:
                await asyncio.to_thread(_kill, process)

            await until(is_up, "vLLM's server is up", START_TIMEOUT_S)
            yield Subject(subject.llm, num_running, kill)
    finally:
        await asyncio.to_thread(_kill, process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        everything = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for one in everything:
            one.kill()
        psutil.wait_procs(everything, timeout=60)
        process.wait(60)


def deployed(settings: LLMSettings, folder: Path) -> LLM:
    """Put an engine into a Serve replica; all that these tests know of how that is done."""
    from ray import serve

    from deployments import llm
    from deployments.handles import LLMHandle

    deployment: Any = llm.LLM
    tree = Settings(llm=settings, data_dir=folder, logging=LoggingSettings(level="WARNING"))
    application = deployment.options(ray_actor_options={"num_cpus": 0.5}).bind(tree, "cpu")
    return LLMHandle(serve.run(application, name="contract", route_prefix=None), expected_start_s=10)


@asynccontextmanager
async def behind_a_handle(settings: LLMSettings, folder: Path) -> AsyncIterator[Subject]:
    from ray import serve

    llm = await asyncio.to_thread(deployed, settings, folder)

    async def is_up() -> bool:
        try:
            return bool(await llm.info())
        except LLMUnavailable:
            return False

    async def num_running() -> int:
        return (await llm.info()).num_running

    async def kill() -> None:
        await asyncio.to_thread(serve.delete, "contract")

    with pytest.MonkeyPatch.context() as patch:
        # How soon a busy machine answers decides no test.
        patch.setattr("deployments.handles.PROBE_TIMEOUT_S", 15.0)
        await until(is_up, "the replica answers", START_TIMEOUT_S)
        yield Subject(llm, num_running, kill)
    await llm.close()
    await kill()


def extractive_behind_a_handle(folder: Path) -> Opened:
    return behind_a_handle(LLMSettings(engine="extractive"), folder)


def vllm_behind_a_handle(folder: Path) -> Opened:
    return behind_a_handle(settings_of_vllm(folder), folder)


@asynccontextmanager
async def small_server_behind_a_handle(folder: Path) -> AsyncIterator[Subject]:
    server = MisbehavingServer()
    async with behind_a_handle(settings_of_server(server.url), folder) as subject:

        async def kill() -> None:
            server.stop()

        yield replace(subject, kill=kill)
    server.stop()


GENERATING = [
    small_server,
    pytest.param(vllm, marks=pytest.mark.slow),
    pytest.param(vllm_server, marks=pytest.mark.slow),
    pytest.param(small_server_behind_a_handle, marks=[pytest.mark.slow, pytest.mark.ray]),
    pytest.param(vllm_behind_a_handle, marks=[pytest.mark.slow, pytest.mark.ray]),
]
QUOTING = [extractive, pytest.param(extractive_behind_a_handle, marks=[pytest.mark.slow, pytest.mark.ray])]
"""They only quote: no sampling, no window, nothing that runs or could be taken away. What needs it is not asked."""

# The fixture is built once for all tests of an engine: at no time are there two vLLMs.
generating = pytest.mark.parametrize("subject", GENERATING, indirect=True, scope="module")
every = pytest.mark.parametrize("subject", [*GENERATING, *QUOTING], indirect=True, scope="module")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llm")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray
    from ray import serve

    ray.init(address="local", include_dashboard=False, num_cpus=4, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": free_port()})
    yield
    serve.shutdown()
    ray.shutdown()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def subject(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[Subject]:
    if "handle" in request.param.__name__:
        request.getfixturevalue("cluster")
    async with request.param(folder) as found:
        yield found


# --- Requests --------------------------------------------------------------------------------------------------------


def passage(n: int, text: str = "The outage lasted 52 minutes.") -> Passage:
    return Passage(f"d#{n}", "d", "Post-mortem", "", {}, text, 1.0, (Sentence(text, 0.9),))


def asking(
    *messages: str, passages: int | tuple[Passage, ...] = 3, request_id: str = "r", **sampling: Any
) -> GenerationRequest:
    roles: tuple[Role, Role] = ("user", "assistant")
    turns = [Message(roles[(len(messages) - 1 - n) % 2], text) for n, text in enumerate(messages)]
    chosen = tuple(passage(n) for n in range(passages)) if isinstance(passages, int) else passages
    wanted = SamplingParams(**({"max_tokens": 16} | sampling))
    return GenerationRequest(request_id, tuple(turns), wanted, chosen, "Answer from the passages.")


QUESTION = "How long did the outage last?"


async def deltas_of(subject: Subject, request: GenerationRequest) -> list[Delta]:
    return [delta async for delta in subject.llm.generate(request)]


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


# --- The contract ----------------------------------------------------------------------------------------------------


@every
async def test_the_first_delta_tells_what_was_presented_and_only_the_last_one_why_it_ended(subject: Subject) -> None:
    deltas = await deltas_of(subject, asking(QUESTION, passages=3))
    first, last = deltas[0], deltas[-1]
    assert (first.num_presented, first.num_dropped_messages) == (3, 0)
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert last.finish_reason in ("stop", "length")
    assert text_of(deltas).strip()
    assert first.text


@every
async def test_what_is_served_can_be_asked_for(subject: Subject) -> None:
    info = await subject.llm.info()
    assert info.id
    assert info.engine in ("vllm", "openai", "extractive")
    assert info.context_window == (0 if info.engine == "extractive" else WINDOW)


@every
async def test_many_are_answered_at_once(subject: Subject) -> None:
    many = [asking(QUESTION, request_id=f"r{n}") for n in range(12)]
    answers = await asyncio.gather(*(deltas_of(subject, request) for request in many))
    assert all(deltas[-1].finish_reason for deltas in answers)
    assert (await subject.llm.info()).num_running == 0


@pytest.mark.parametrize("subject", QUOTING, indirect=True, scope="module")
async def test_an_engine_that_quotes_refuses_json_by_name(subject: Subject) -> None:
    with pytest.raises(UnsupportedParameter, match="quoting engine") as caught:
        await deltas_of(subject, asking(QUESTION, json=JSONFormat()))
    assert caught.value.param == "response_format"


@generating
async def test_the_tokens_are_counted(subject: Subject) -> None:
    [short] = {deltas[0].prompt_tokens for deltas in [await deltas_of(subject, asking("a b c", passages=0))]}
    first, *rest = await deltas_of(subject, asking("a b c " * 10, passages=0))
    assert first.prompt_tokens == short + 27
    counts = [delta.completion_tokens for delta in (first, *rest)]
    assert counts == sorted(counts)
    assert counts[-1] == 16


@generating
async def test_a_completion_ends_at_max_tokens(subject: Subject) -> None:
    *_, last = await deltas_of(subject, asking(QUESTION, max_tokens=5))
    assert (last.completion_tokens, last.finish_reason) == (5, "length")


@generating
async def test_greedy_completions_are_equal(subject: Subject) -> None:
    first, second = [text_of(await deltas_of(subject, asking(QUESTION, temperature=0.0))) for _ in range(2)]
    assert first == second


@generating
async def test_all_of_sampling_is_accepted(subject: Subject) -> None:
    sampling: dict[str, Any] = {
        "temperature": 0.7,
        "top_p": 0.9,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.1,
        "seed": 7,
    }
    first, second = [text_of(await deltas_of(subject, asking(QUESTION, **sampling))) for _ in range(2)]
    assert first == second


@generating
async def test_a_stop_string_ends_the_completion_and_is_no_part_of_it(subject: Subject) -> None:
    whole = text_of(await deltas_of(subject, asking(QUESTION)))
    stop = whole[len(whole) // 2 :][:6]
    deltas = await deltas_of(subject, asking(QUESTION, stop=(stop,)))
    assert text_of(deltas) == whole.partition(stop)[0]
    assert deltas[-1].finish_reason == "stop"


@generating
async def test_leaving_early_frees_the_slot(subject: Subject) -> None:
    stream = subject.llm.generate(asking(QUESTION, max_tokens=900))
    await anext(stream)
    assert (await subject.llm.info()).num_running == 1
    await stream.aclose()

    async def is_free() -> bool:
        return await subject.num_running() == (await subject.llm.info()).num_running == 0

    await until(is_free, "the slot is free", 60)


@generating
async def test_what_does_not_fit_is_given_up_oldest_turns_first(subject: Subject) -> None:
    request = asking("w " * 150, "w " * 150, QUESTION, passages=tuple(passage(n, "w " * 250) for n in range(3)))
    first, *_ = await deltas_of(subject, request)
    assert (first.num_dropped_messages, first.num_presented) == (1, 3)
    request = asking("w " * 100, QUESTION, passages=tuple(passage(n, "w " * 600) for n in range(3)))
    first, *_ = await deltas_of(subject, request)
    assert (first.num_dropped_messages, first.num_presented) == (1, 1)
    assert first.prompt_tokens + 16 <= WINDOW


@generating
async def test_a_question_that_is_too_long_is_refused_before_the_first_delta(subject: Subject) -> None:
    with pytest.raises(ContextTooLong, match=f"window of {WINDOW}") as caught:
        await anext(subject.llm.generate(asking("w " * 2 * WINDOW, passages=0)))
    assert caught.value.param == "messages"


@generating
async def test_an_engine_that_is_gone_is_unavailable(subject: Subject) -> None:
    """The last one: it leaves nothing to ask."""
    await subject.kill()
    with pytest.raises(LLMUnavailable) as caught:
        await anext(subject.llm.generate(asking(QUESTION)))
    assert "\n" not in caught.value.message
    with pytest.raises(LLMUnavailable):
        await subject.llm.info()


@pytest.mark.parametrize("is_asked_before", [False, True])
async def test_an_engine_over_http_that_is_closed_is_unavailable(is_asked_before: bool) -> None:
    server = MisbehavingServer()
    llm = OpenAIEngine(settings_of_server(server.url), api_key=None)
    if is_asked_before:
        await llm.info()
    await llm.close()
    with pytest.raises(LLMUnavailable, match="is closed"):
        await llm.info()
    with pytest.raises(LLMUnavailable, match="is closed"):
        await anext(llm.generate(asking(QUESTION)))
    server.stop()
