"""Rates: a key uses what it may, is told the truth about when there is more, and pays for what it used."""

import asyncio
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path

import httpx
import openai
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from app.access import Caller, caller
from app.api.guards import GuardedLLM
from app.domain import GenerationRequest, Message, SamplingParams
from app.errors import LLMUnavailable, RateLimited
from app.keys import Key
from app.rates import WINDOW_S, Rates, Window, duration, estimate_tokens
from app.settings import AccessSettings
from tests.keyed_service import ADDRESS, QUESTION, add, error_of, keyed_service, settings_for
from tests.running_service import free_port
from tests.scripted_llm import ScriptedLLM
from tests.system_setup import find_redis
from tests.test_api import serving
from tests.tiny_models import make_encoder

CHAT = "/v1/chat/completions"
ASKED = "How long did the outage of the harbour crane last?"
RAW = {**QUESTION, "model": "scripted", "rag": {"enabled": False}}
DURATION = re.compile(r"(\d+m\d+s|\d+s|\d+ms)")


def key(name: str = "acme", **limits: int) -> Key:
    number = sum(name.encode())
    return Key(id=f"{number:012x}", name=name, hash="0" * 64, created_at=datetime.now(UTC), is_admin=True, **limits)


# --- Windows ---------------------------------------------------------------------------------------------------------


@st.composite
def windows(draw: st.DrawFn) -> Window:
    length_s = 60.0
    left_s = draw(st.floats(0, length_s))
    return Window(
        draw(st.integers(1, 1000)),
        length_s,
        previous=draw(st.integers(0, 3000)),
        previous_s=left_s,
        current=draw(st.integers(0, 3000)),
        current_s=left_s,
    )


def later(window: Window, seconds: float) -> Window:
    """The same window, so much later, as the library's storages move it on."""
    left_s = window.current_s - seconds
    if left_s > 0:
        return Window(window.limit, window.length_s, window.previous, left_s, window.current, left_s)
    left_s += window.length_s
    return Window(window.limit, window.length_s, window.current, left_s, 0, left_s)


@given(window=windows(), cost=st.integers(1, 1000))
def test_the_wait_is_long_enough_and_no_longer(window: Window, cost: int) -> None:
    cost = min(cost, window.limit)
    wait_s = window.wait_s(cost)
    assert 0 <= wait_s <= 2 * window.length_s + 0.01
    assert later(window, wait_s).remaining >= cost
    if wait_s:
        assume(wait_s > 0.1)
        assert later(window, wait_s - 0.1).remaining <= cost
        assert window.remaining < cost


@given(window=windows())
def test_after_the_reset_the_limit_is_whole(window: Window) -> None:
    assert later(window, window.wait_s(window.limit)).remaining == window.limit


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (0.0201, "21ms"), (1, "1s"), (59.2, "1m0s"), (360, "6m0s"), (61.5, "1m2s")]
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- Counting, in memory and in Redis --------------------------------------------------------------------------------


@pytest.fixture
def _early_in_a_window() -> None:
    """Wait for the next minute if this one is about to end: then what was used counts less, and a number is another."""
    left_s = WINDOW_S - time.time() % WINDOW_S
    if left_s < 20:
        time.sleep(left_s)


early_in_a_window = pytest.mark.usefixtures("_early_in_a_window")


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if (program := find_redis()) is None:
        pytest.skip("no Redis: run `python -m tests.system_setup` as root")
    path = tmp_path_factory.mktemp("redis") / "socket"
    command = [program, "--port", "0", "--unixsocket", str(path), "--save", "", "--requirepass", "a secret"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=path.parent) as process:
        while not path.exists():
            assert process.poll() is None
        yield f"redis+unix://:a secret@{path}"
        process.terminate()


@pytest.fixture(params=["memory", "redis"])
def rates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Rates:
    url = "memory://" if request.param == "memory" else request.getfixturevalue("redis_url").replace(":a secret@", "")
    monkeypatch.setenv("REDIS_PASSWORD", "a secret")
    return Rates(AccessSettings(rates_url=url), length_s=1)


async def use_up(replicas: Sequence[Rates], used: Key) -> tuple[int, RateLimited]:
    """Send requests until one is refused; give how many were not, and the refusal."""
    for number in range(1000):
        try:
            await replicas[number % len(replicas)].admit(used)
        except RateLimited as refusal:
            return number, refusal
    raise AssertionError("nothing is refused")


async def test_what_is_over_the_limit_is_refused_until_it_is_said_to_be_allowed(rates: Rates) -> None:
    acme = key(requests_per_minute=20)
    for _ in range(3):
        _, refusal = await use_up([rates], acme)
        assert refusal.retry_after_s is not None
        await asyncio.sleep(refusal.retry_after_s)
        await rates.admit(acme)
    for _ in range(20):
        await rates.admit(key("other", requests_per_minute=20))


async def test_tokens_are_paid_as_they_were_used(rates: Rates) -> None:
    acme = key("tokens", tokens_per_minute=100)
    await rates.reserve(acme, 60)
    assert _headers(await rates.headers(acme))["x-ratelimit-remaining-tokens"] == "40"
    with pytest.raises(RateLimited, match=r"100 tokens per minute. Try again in 1s\."):
        await rates.reserve(acme, 60)
    await rates.settle(acme, num_reserved=60, num_used=0)
    assert _headers(await rates.headers(acme))["x-ratelimit-remaining-tokens"] == "100"
    # A prompt over the limit needs all of it, and the debt has to be waited for.
    await rates.reserve(acme, 400)
    await rates.settle(acme, num_reserved=400, num_used=400)
    with pytest.raises(RateLimited) as caught:
        await rates.reserve(acme, 1)
    assert caught.value.retry_after_s in (1, 2)
    await asyncio.sleep(caught.value.retry_after_s)
    await rates.reserve(acme, 1)


@early_in_a_window
async def test_replicas_count_together_in_redis(redis_url: str) -> None:
    replicas = [Rates(AccessSettings(rates_url=redis_url), length_s=60) for _ in range(2)]
    num_admitted, _ = await use_up(replicas, key("shared", requests_per_minute=7))
    assert num_admitted == 7


@early_in_a_window
async def test_without_redis_each_replica_counts_alone(caplog: pytest.LogCaptureFixture) -> None:
    rates = Rates(AccessSettings(rates_url=f"redis://127.0.0.1:{free_port()}"), length_s=60)
    num_admitted, _ = await use_up([rates], key(requests_per_minute=3))
    assert num_admitted == 3


def _headers(found: list[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in found}


# --- Over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_encoder(tmp_path_factory.mktemp("models") / "encoder"))


@early_in_a_window
async def test_each_answer_tells_the_rate_and_the_last_one_when_to_come_back(encoder: str, tmp_path: Path) -> None:
    async with keyed_service(settings_for(tmp_path, encoder)) as found:
        limited = found.create("acme", read=["acme"], requests_per_minute=3)
        free = found.create("free", read=["acme"])
        async with found.client(limited) as client, found.client(free) as other:
            answers = [await client.get("/v1/collections") for _ in range(4)]
            [unlimited] = [await other.get("/v1/collections")]
    assert [one.status_code for one in answers] == [200, 200, 200, 429]
    assert [one.headers["x-ratelimit-remaining-requests"] for one in answers] == ["2", "1", "0", "0"]
    assert {one.headers["x-ratelimit-limit-requests"] for one in answers} == {"3"}
    assert all(DURATION.fullmatch(one.headers["x-ratelimit-reset-requests"]) for one in answers)
    assert not [name for one in answers for name in one.headers if name.endswith("-tokens")]
    assert error_of(answers[-1]) == (429, "rate_limit_exceeded")
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 61
    assert not [name for name in unlimited.headers if name.startswith("x-ratelimit")]


@early_in_a_window
async def test_the_openai_client_reads_the_refusal(encoder: str, tmp_path: Path) -> None:
    async with keyed_service(settings_for(tmp_path, encoder)) as found:
        sent = found.create("acme", read=["acme"], requests_per_minute=1)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(found.api)) as http:
            client = openai.AsyncOpenAI(base_url=f"{ADDRESS}/v1", api_key=sent, http_client=http, max_retries=0)
            await client.models.list()
            with pytest.raises(openai.RateLimitError) as caught:
                await client.models.list()
            wrong = openai.AsyncOpenAI(base_url=f"{ADDRESS}/v1", api_key="cleave-x", http_client=http, max_retries=0)
            with pytest.raises(openai.AuthenticationError):
                await wrong.models.list()
    assert caught.value.code == "rate_limit_exceeded"


async def tokens_left(client: httpx.AsyncClient) -> int:
    return int((await client.get("/v1/models")).headers["x-ratelimit-remaining-tokens"])


@early_in_a_window
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_an_answer_costs_the_tokens_that_it_used(encoder: str, tmp_path: Path, is_streamed: bool) -> None:
    llm = ScriptedLLM("One ", "two ", "three.")  # 100 tokens of prompt, 3 of answer
    async with keyed_service(settings_for(tmp_path, encoder), llm) as found:
        sent = found.create("acme", read=["acme"], tokens_per_minute=250)
        async with found.client(sent) as client:
            for left in (147, 44):
                assert (await client.post(CHAT, json={**RAW, "stream": is_streamed})).status_code == 200
                assert await tokens_left(client) == left
            long = "word " * 50
            body = {**RAW, "stream": is_streamed, "messages": [{"role": "user", "content": long}]}
            assert estimate_tokens(len(long)) > 44
            refused = await client.post(CHAT, json=body)
            assert error_of(refused) == (429, "rate_limit_exceeded")
            assert int(refused.headers["retry-after"]) >= 1
            assert await tokens_left(client) == 44
            assert len(llm.requests) == 2, "the model was not asked"


async def test_a_budget_that_is_used_up_is_no_reason_to_quote(encoder: str, tmp_path: Path) -> None:
    llm = ScriptedLLM("The outage lasted 52 minutes.")
    async with keyed_service(settings_for(tmp_path, encoder), llm) as found:
        sent = found.create("acme", read=["acme"], write=["acme"], tokens_per_minute=100)
        async with found.client(sent) as client:
            await add(client, "report", "The outage of the harbour crane lasted 52 minutes.")
            assert (await client.post(CHAT, json=QUESTION)).status_code == 200
            assert error_of(await client.post(CHAT, json=QUESTION)) == (429, "rate_limit_exceeded")
            assert (await client.post("/v1/search", json={"query": "crane"})).status_code == 200


async def test_an_engine_that_fails_costs_nothing(encoder: str, tmp_path: Path) -> None:
    async with keyed_service(settings_for(tmp_path, encoder), ScriptedLLM(LLMUnavailable("Down."))) as found:
        sent = found.create("acme", read=["acme"], tokens_per_minute=250)
        async with found.client(sent) as client:
            assert error_of(await client.post(CHAT, json=RAW)) == (503, "llm_unavailable")
            assert await tokens_left(client) == 250


@early_in_a_window
async def test_a_client_that_leaves_a_stream_pays_for_what_was_made(encoder: str, tmp_path: Path) -> None:
    llm = ScriptedLLM("One ", "two ", asyncio.Event(), "never")
    async with keyed_service(settings_for(tmp_path, encoder), llm) as found:
        sent = found.create("acme", read=["acme"], tokens_per_minute=250)
        headers = {"Authorization": f"Bearer {sent}"}
        async with (
            serving(found.api) as (host, port),
            httpx.AsyncClient(base_url=f"http://{host}:{port}", headers=headers, trust_env=False, timeout=60) as client,
        ):
            await read_until(client, "two")
            async with asyncio.timeout(60):
                await llm.closed.wait()
                while (left := await tokens_left(client)) == 250 - estimate_tokens(len(ASKED)):
                    pass  # Set aside until the stream is closed.
    assert left == 250 - 100 - 2


async def read_until(client: httpx.AsyncClient, word: str) -> None:
    async with (
        client.stream("POST", CHAT, json={**RAW, "stream": True}) as response,
        aclosing(response.aiter_text()) as pieces,
    ):
        async for piece in pieces:
            if word in piece:
                return


@early_in_a_window
async def test_who_leaves_before_the_first_word_pays_for_the_prompt() -> None:
    llm, rates = ScriptedLLM(asyncio.Event()), Rates(AccessSettings())
    acme = key(tokens_per_minute=250)
    request = GenerationRequest("1", (Message("user", "word " * 40),), SamplingParams(max_tokens=10))

    async def ask() -> None:
        caller.set(Caller(acme, "default"))
        async for _ in GuardedLLM(llm, rates).generate(request):
            pass

    asking = asyncio.create_task(ask())
    await llm.began.wait()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert _headers(await rates.headers(acme))["x-ratelimit-remaining-tokens"] == "200"
