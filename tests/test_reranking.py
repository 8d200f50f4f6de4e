"""Reranking on a real cross-encoder, whose score is the share of the word "lighthouse" in what it reads."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.api import create_api
from app.domain import Document, Passage, SearchQuery
from app.errors import ConfigurationError
from app.models import resolve_encoder
from app.reranking import SKIPPED, Reranker
from app.services import build_retriever, build_services
from app.settings import LLMSettings, RerankingSettings, RetrievalSettings, Settings, StoreSettings
from tests.tiny_models import make_cross_encoder

MARKER = "lighthouse"
QUESTION = "Where is it dark?"
BLOCKED_S = 60.0
"""Longer than any test takes: what is blocked that long was forgotten."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cross_encoder(tmp_path_factory.mktemp("cross-encoder"), marker=MARKER)


@pytest.fixture
def make(model: Path) -> Callable[..., Reranker]:
    def make(**settings: Any) -> Reranker:
        defaults: dict[str, Any] = {"dtype": "float32", "timeout_s": BLOCKED_S}
        return Reranker(RerankingSettings(model=str(model), **(defaults | settings)), asyncio.Lock())

    return make


def passage(number: int, *, share: int = 0, title: str = "", text: str = "") -> Passage:
    """A passage of ten words, `share` of which are the marker."""
    words = text or " ".join(["word"] * (10 - share) + [MARKER] * share)
    return Passage(f"d{number}#0", f"d{number}", title, "", {}, words, score=1 / (number + 1))


def found(*shares: int) -> list[Passage]:
    return [passage(number, share=share) for number, share in enumerate(shares)]


def order(passages: list[Passage]) -> list[int]:
    return [int(one.document_id[1:]) for one in passages]


@contextmanager
def counted(reranker: Reranker) -> Iterator[list[int]]:
    """Note how many pairs each forward pass reads."""
    sizes: list[int] = []
    hook = reranker._model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0]["input_ids"])))
    yield sizes
    hook.remove()


class Blocked:
    """A model whose forward passes wait until they are let go."""

    def __init__(self, reranker: Reranker) -> None:
        self.has_begun, self._may_go_on = threading.Event(), threading.Event()
        self._hook = reranker._model.register_forward_pre_hook(self._wait)

    def _wait(self, *_: Any) -> None:
        self.has_begun.set()
        assert self._may_go_on.wait(BLOCKED_S)

    def __enter__(self) -> "Blocked":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self._hook.remove()

    def release(self) -> None:
        self._may_go_on.set()

    async def begun(self) -> None:
        assert await asyncio.to_thread(self.has_begun.wait, BLOCKED_S)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(BLOCKED_S):
        while not condition():  # noqa: ASYNC110  # A queue and a thread, which set no event.
            await asyncio.sleep(0.001)


# --- The order -------------------------------------------------------------------------------------------------------


async def test_the_passages_are_in_the_order_of_the_models_scores(make: Callable[..., Reranker]) -> None:
    passages, degraded = await make().rerank(QUESTION, found(1, 5, 0, 9, 3))
    assert (order(passages), degraded) == ([3, 1, 4, 0, 2], ())
    assert [one.score for one in passages] == sorted((one.score for one in passages), reverse=True)


async def test_equal_scores_keep_the_order_of_the_search(make: Callable[..., Reranker]) -> None:
    assert order((await make().rerank(QUESTION, found(0, 4, 0, 0, 0)))[0]) == [1, 0, 2, 3, 4]


async def test_the_order_is_the_same_in_half_precision(make: Callable[..., Reranker]) -> None:
    assert order((await make(dtype="bfloat16").rerank(QUESTION, found(1, 5, 0, 9, 3)))[0]) == [3, 1, 4, 0, 2]


async def test_scores_do_not_depend_on_the_batch(make: Callable[..., Reranker]) -> None:
    texts = [" ".join([MARKER, *["word"] * length]) for length in (30, 1, 12, 4, 0, 20, 2)]
    passages = [passage(number, text=text) for number, text in enumerate(texts)]
    scores = [
        {one.document_id: one.score for one in (await make(batch_size=size).rerank(QUESTION, passages))[0]}
        for size in (1, 3, 32)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert scores[0] == pytest.approx(scores[2], abs=1e-4)


async def test_what_is_over_the_budget_of_candidates_follows_unread(make: Callable[..., Reranker]) -> None:
    reranker = make(num_candidates=3)
    with counted(reranker) as sizes:
        passages, degraded = await reranker.rerank(QUESTION, found(1, 0, 2, 9, 8))
    assert (order(passages), degraded, sizes) == ([2, 0, 1, 3, 4], (), [3])
    assert [one.score for one in passages] == sorted((one.score for one in passages), reverse=True)


@pytest.mark.parametrize("passages", [[], found(3)])
async def test_one_passage_or_none_needs_no_model(make: Callable[..., Reranker], passages: list[Passage]) -> None:
    reranker = make()
    with counted(reranker) as sizes:
        assert await reranker.rerank(QUESTION, passages) == (passages, ())
    assert not sizes


async def test_the_model_reads_the_title_unless_it_would_push_out_the_text(make: Callable[..., Reranker]) -> None:
    short = [passage(0), passage(1, title=MARKER)]
    assert order((await make().rerank(QUESTION, short))[0]) == [1, 0]
    # The window has room for the question and 56 words.
    long = "word " * 50
    passages = [passage(0, text=long), passage(1, title="title " * 9, text=f"{long}{MARKER} {MARKER}")]
    best, other = (await make().rerank(QUESTION, passages))[0]
    assert best.document_id == "d1"
    assert best.score > other.score + 0.1
    untitled = await make().rerank(QUESTION, [passage(0, text=long), passage(1, text=passages[1].text)])
    assert untitled[0][0].score == pytest.approx(best.score)


async def test_a_passage_longer_than_the_window_is_cut(make: Callable[..., Reranker]) -> None:
    passages, degraded = await make().rerank(QUESTION, [passage(0, text="word " * 1000), passage(1, share=2)])
    assert (order(passages), degraded) == ([1, 0], ())


# --- Searches at once ------------------------------------------------------------------------------------------------


async def test_searches_that_wait_together_share_forward_passes(make: Callable[..., Reranker]) -> None:
    reranker = make(batch_size=8)
    shares = [(0, 3, 1), (5, 0, 6), (1, 2, 3), (9, 9, 0)]
    alone = [await reranker.rerank(QUESTION, found(*one)) for one in shares]
    with counted(reranker) as sizes:
        async with reranker._turn:
            together = [asyncio.create_task(reranker.rerank(QUESTION, found(*one))) for one in shares]
            await until(lambda: len(reranker._waiting) == 12)
        results = await asyncio.gather(*together)
    assert sizes == [8, 4]
    assert [order(passages) for passages, _ in results] == [order(passages) for passages, _ in alone]
    assert not reranker._waiting


async def test_a_search_has_its_scores_when_its_own_pairs_are_read(make: Callable[..., Reranker]) -> None:
    reranker = make(batch_size=2)
    with Blocked(reranker) as first:
        one = asyncio.create_task(reranker.rerank(QUESTION, found(0, 1)))
        await first.begun()
        other = asyncio.create_task(reranker.rerank(QUESTION, found(0, 1)))
        await until(lambda: len(reranker._waiting) == 2)
        with Blocked(reranker) as second:
            first.release()
            assert order((await one)[0]) == [1, 0]
            await second.begun()
            assert not other.done()
    assert order((await other)[0]) == [1, 0]


async def test_nothing_is_computed_while_the_encoder_has_its_turn(make: Callable[..., Reranker]) -> None:
    reranker = make(timeout_s=0.05)
    with counted(reranker) as sizes:
        async with reranker._turn:
            assert (await reranker.rerank(QUESTION, found(0, 1)))[1] == (SKIPPED,)
        await until(lambda: not reranker._waiting)
    assert not sizes


async def test_the_encoder_waits_while_a_pass_is_computed(make: Callable[..., Reranker]) -> None:
    reranker = make()
    with Blocked(reranker) as blocked:
        task = asyncio.create_task(reranker.rerank(QUESTION, found(0, 1)))
        await blocked.begun()
        assert reranker._turn.locked()
    await task
    await until(lambda: not reranker._turn.locked())


# --- Late, cancelled, failed -----------------------------------------------------------------------------------------


async def test_what_is_late_is_skipped_and_the_rest_of_it_is_not_computed(make: Callable[..., Reranker]) -> None:
    reranker = make(batch_size=2, timeout_s=2.0)
    passages = found(1, 5, 0, 9, 3, 2)
    with counted(reranker) as sizes:
        with Blocked(reranker) as blocked:
            assert await reranker.rerank(QUESTION, passages) == (passages, (SKIPPED,))
            await blocked.begun()
        await until(lambda: not reranker._waiting)
    assert sizes == [2]


async def test_the_callers_time_counts_when_it_is_the_shorter(make: Callable[..., Reranker]) -> None:
    reranker = make()
    with Blocked(reranker):
        assert (await reranker.rerank(QUESTION, found(0, 1), timeout_s=0.05))[1] == (SKIPPED,)


async def test_after_a_late_search_the_next_one_is_in_time(make: Callable[..., Reranker]) -> None:
    reranker = make()
    with Blocked(reranker):
        await reranker.rerank(QUESTION, found(0, 1), timeout_s=0.05)
    passages, degraded = await reranker.rerank(QUESTION, found(0, 1))
    assert (order(passages), degraded) == ([1, 0], ())


async def test_one_who_leaves_the_queue_costs_nothing_and_stops_nobody(make: Callable[..., Reranker]) -> None:
    reranker = make(batch_size=2)
    with counted(reranker) as sizes:
        with Blocked(reranker) as blocked:
            first = asyncio.create_task(reranker.rerank(QUESTION, found(0, 1)))
            await blocked.begun()
            leaving = asyncio.create_task(reranker.rerank(QUESTION, found(2, 3, 4, 5)))
            staying = asyncio.create_task(reranker.rerank(QUESTION, found(0, 6)))
            await until(lambda: len(reranker._waiting) == 6)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
        assert [order((await task)[0]) for task in (first, staying)] == [[1, 0], [1, 0]]
    assert sizes == [2, 2]


async def test_one_who_leaves_in_the_middle_of_a_pass_does_not_stop_those_who_share_it(
    make: Callable[..., Reranker],
) -> None:
    reranker = make()
    with Blocked(reranker) as blocked:
        async with reranker._turn:
            leaving = asyncio.create_task(reranker.rerank(QUESTION, found(2, 3)))
            staying = asyncio.create_task(reranker.rerank(QUESTION, found(0, 6)))
            await until(lambda: len(reranker._waiting) == 4)
        await blocked.begun()
        leaving.cancel()
    assert order((await staying)[0]) == [1, 0]


async def test_a_queue_that_is_too_long_already_is_not_made_longer(
    make: Callable[..., Reranker], caplog: pytest.LogCaptureFixture
) -> None:
    reranker = make(batch_size=2)
    with Blocked(reranker) as blocked:
        learning = asyncio.create_task(reranker.rerank(QUESTION, found(0, 1)))
        await blocked.begun()
        await asyncio.sleep(0.1)  # So a pass takes at least that long.
    await learning
    with Blocked(reranker) as blocked:
        tasks = [asyncio.create_task(reranker.rerank(QUESTION, found(0, 1))) for _ in range(2)]
        await blocked.begun()
        await until(lambda: len(reranker._waiting) == 2)
        assert (await reranker.rerank(QUESTION, found(0, 1), timeout_s=0.1))[1] == (SKIPPED,)
        assert "other searches come first" in caplog.records[-1].__dict__["why"]
    assert [degraded for _, degraded in await asyncio.gather(*tasks)] == [(), ()]


async def test_a_model_that_fails_costs_the_order_and_nothing_else(
    make: Callable[..., Reranker], caplog: pytest.LogCaptureFixture
) -> None:
    reranker = make()

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    hook = reranker._model.register_forward_pre_hook(fail)
    passages = found(0, 1)
    results = await asyncio.gather(*(reranker.rerank(QUESTION, passages) for _ in range(3)))
    assert results == [(passages, (SKIPPED,))] * 3
    assert "no memory" in caplog.text
    hook.remove()
    assert order((await reranker.rerank(QUESTION, passages))[0]) == [1, 0]


async def test_a_score_that_is_no_number_is_a_failure(make: Callable[..., Reranker]) -> None:
    reranker = make()
    reranker._model[0].model.classifier.bias.data.fill_(float("nan"))
    assert (await reranker.rerank(QUESTION, found(0, 1)))[1] == (SKIPPED,)


# --- Loading ---------------------------------------------------------------------------------------------------------


def complaint(reference: str | Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        Reranker(RerankingSettings(model=str(reference)), asyncio.Lock())
    assert caught.value.message.startswith("reranking.model: ")
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_reference_to_nothing_is_refused() -> None:
    assert complaint("/nowhere").endswith("Name an existing folder, a hub id such as owner/model@revision.")


def test_an_encoder_is_not_taken_for_a_cross_encoder() -> None:
    assert "is no cross-encoder but a BertModel" in complaint(resolve_encoder("all-MiniLM-L6-v2").source)


def test_a_model_with_several_outputs_is_refused(tmp_path: Path) -> None:
    assert "gives 3 scores for a pair" in complaint(make_cross_encoder(tmp_path, marker=MARKER, num_labels=3))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_said_in_one_line(tmp_path: Path, name: str) -> None:
    (make_cross_encoder(tmp_path, marker=MARKER) / name).write_text("{ damaged", encoding="utf-8")
    assert "cannot be used as a cross-encoder (" in complaint(tmp_path)


# --- In a search and in an answer ------------------------------------------------------------------------------------


DOCUMENTS = [
    Document("dark", "Dark places", "It is dark where no light is. It is darkest in the cellar of the archive."),
    Document("dim", "Dim places", "It is dim in the attic, where it is dark at night."),
    Document("sea", "The sea", f"A {MARKER} and another {MARKER} stand where it is dark."),
]


def settings_with(model: Path | None, **options: Any) -> Settings:
    reranking = RerankingSettings(model=str(model) if model else None, dtype="float32", **options)
    return Settings(
        store=StoreSettings(kind="memory"),
        llm=LLMSettings(engine="extractive"),
        retrieval=RetrievalSettings(top_k=3),
        reranking=reranking,
    )


async def searched(model: Path | None, **options: Any) -> Any:
    retriever = await build_retriever(settings_with(model, **options))
    await retriever.ingest(DOCUMENTS)
    result = await retriever.search(SearchQuery(QUESTION, top_k=1, num_scored=1))
    await retriever.close()
    return result


async def test_a_search_without_a_cross_encoder_has_no_such_stage() -> None:
    result = await searched(None)
    assert [one.document_id for one in result.passages] != ["sea"]
    assert (set(result.timings_ms), result.degraded) == ({"embed", "search", "score_sentences"}, ())


async def test_a_search_finds_what_the_model_prefers_among_more_than_was_asked_for(model: Path) -> None:
    result = await searched(model, timeout_s=BLOCKED_S)
    assert [one.document_id for one in result.passages] == ["sea"]
    assert result.passages[0].sentences
    assert (set(result.timings_ms), result.degraded) == ({"embed", "search", "rerank", "score_sentences"}, ())


@pytest.mark.parametrize(("timeout_s", "degraded"), [(BLOCKED_S, []), (1e-6, [SKIPPED])])
async def test_the_api_says_when_the_passages_were_not_reranked(
    model: Path, timeout_s: float, degraded: list[str]
) -> None:
    services = await build_services(settings_with(model, timeout_s=timeout_s))
    await services.retriever.ingest(DOCUMENTS)
    asking = {"messages": [{"role": "user", "content": QUESTION}]}
    refused = {"messages": [{"role": "user", "content": "Who won the 1998 football World Cup?"}]}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_api(services)), base_url="http://localhost"
    ) as client:
        body = (await client.post("/v1/search", json={"query": QUESTION})).json()
        assert (body["data"][0]["document_id"] == "sea", body["degraded"]) == (not degraded, degraded)
        rag = (await client.post("/v1/chat/completions", json=asking)).json()["rag"]
        assert (rag["sources"][0]["document_id"] == "sea", rag["degraded"]) == (not degraded, degraded)
        assert "retrieve.rerank" in rag["timings_ms"]
        rag = (await client.post("/v1/chat/completions", json=refused)).json()["rag"]
        assert (rag["grounded"], rag["degraded"]) == ("refused", degraded)
    await services.close()


async def test_a_short_deadline_skips_the_reranking_and_not_the_answer(model: Path) -> None:
    retriever = await build_retriever(settings_with(model, timeout_s=BLOCKED_S))
    await retriever.ingest(DOCUMENTS)
    result = await retriever.search(SearchQuery(QUESTION, top_k=3, timeout_s=1e-6))
    assert (len(result.passages), result.degraded) == (3, (SKIPPED,))
    await retriever.close()
