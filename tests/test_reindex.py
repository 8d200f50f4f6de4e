"""Another encoder under traffic: built beside the live index, compared, swapped, rolled back, and killed in between.

The encoders are tiny and real: their vectors have different lengths, so an answer from a mix of two would be an error.
"""

import asyncio
import itertools
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from app import collection, prompts
from app.catalog import LocalRetriever
from app.cli import main
from app.domain import Document, ReindexStatus, SearchQuery, SearchResult
from app.errors import CollectionMismatch, CollectionNotFound, ConfigurationError, InvalidRequest
from app.known_items import compare, make_question, reciprocal_rank, sample
from app.reindexing import synchronise
from app.services import build_retriever
from app.settings import ChunkingSettings, EmbeddingSettings, IndexSettings, LLMSettings, Settings, StoreSettings
from tests.conftest import ServiceThread, running
from tests.qdrant_peer import qdrant_peer
from tests.running_service import ROOT, write_config
from tests.tiny_models import make_encoder

KILLED_AFTER = 40
"""Documents of the new index."""
ANIMALS = ("fox", "owl", "badger", "otter", "heron", "lynx", "mole", "newt")
PLACES = ("harbour", "museum", "library", "orchard", "quarry", "chapel", "station")


def document(number: int, note: str = "") -> Document:
    animal, place = ANIMALS[number % len(ANIMALS)], PLACES[number % len(PLACES)]
    text = (
        f"In the year {1700 + number} a {animal} was seen near the old {place} of town {number}. {note}"
        f"The keeper of the {place} wrote down what the {animal} ate on day {number * 7} and where it slept."
    )
    return Document(f"d{number}", f"The {animal} of the {place}", text, metadata={"number": number})


DOCUMENTS = [document(number) for number in range(60)]
QUESTIONS = [
    f"What did the {ANIMALS[n % 8]} eat near the {PLACES[n % 7]} in the year {1700 + n}?" for n in range(0, 60, 7)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_encoder(folder / "old", seed=1)
    make_encoder(folder / "same", seed=1)
    make_encoder(folder / "new", seed=2, dimension=48)
    make_encoder(folder / "blind", dimension=48, knows_words=False)
    return folder


def index_settings(models: Path, name: str, **chunking: int) -> IndexSettings:
    return IndexSettings(
        embedding=EmbeddingSettings(model=str(models / name), dtype="float32"), chunking=ChunkingSettings(**chunking)
    )


def settings_for(folder: Path, index: IndexSettings, **store: Any) -> Settings:
    return Settings(
        data_dir=folder,
        embedding=index.embedding,
        chunking=index.chunking,
        store=StoreSettings(**store),
        llm=LLMSettings(engine="extractive"),
    )


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[LocalRetriever]:
    retriever = await build_retriever(settings)
    try:
        yield retriever
    finally:
        await retriever.close()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with qdrant_peer() as url:
        yield url


@pytest.fixture(params=["embedded", "memory", "server"])
async def retriever(
    request: pytest.FixtureRequest, tmp_path: Path, models: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[LocalRetriever]:
    monkeypatch.setattr(collection, "POLL_S", 0.1)
    store = {"kind": request.param, "url": server, "collection": f"{request.node.name[:40].strip('[]')}"}
    store["collection"] = "".join(one if one.isalnum() else "-" for one in store["collection"])[:40] + request.param
    async with opened(settings_for(tmp_path, index_settings(models, "old"), **store)) as found:
        assert {receipt.status for receipt in await found.ingest(DOCUMENTS)} == {"created"}
        yield found


async def until(condition: Callable[[], Awaitable[bool]], *, timeout_s: float = 180) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110  # There is nothing to be told by.
            await asyncio.sleep(0.05)


async def build(retriever: LocalRetriever, wanted: IndexSettings) -> ReindexStatus:
    """Start building and wait until it is done."""
    assert (await retriever.reindex(wanted)).state in ("building", "built")
    status = await retriever.reindex_status()
    while status.state == "building":
        await asyncio.sleep(0.05)
        status = await retriever.reindex_status()
    assert status.state == "built", status
    return status


async def answers(retriever: LocalRetriever, **query: Any) -> dict[str, tuple[tuple[str, float], ...]]:
    """What is found for each question, with scores."""
    found = {}
    for question in QUESTIONS:
        passages = (await retriever.search(SearchQuery(question, 5, **query))).passages
        found[question] = tuple((passage.chunk_id, round(passage.score, 5)) for passage in passages)
    return found


def best(found: dict[str, tuple[tuple[str, float], ...]]) -> dict[str, str]:
    return {question: passages[0][0] for question, passages in found.items()}


# --- Build, swap, roll back ------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_questions_are_answered_wholly_from_one_index_while_another_takes_its_place(
    retriever: LocalRetriever, models: Path
) -> None:
    old = await answers(retriever)
    seen: list[tuple[str, tuple[tuple[str, float], ...]]] = []
    is_done = asyncio.Event()

    async def ask(offset: int) -> None:
        for question in itertools.islice(itertools.cycle(QUESTIONS), offset, None):
            if is_done.is_set():
                return
            found = (await retriever.search(SearchQuery(question, 5, num_scored=2))).passages
            seen.append((question, tuple((passage.chunk_id, round(passage.score, 5)) for passage in found)))

    async with asyncio.TaskGroup() as group:
        for offset in range(3):
            group.create_task(ask(offset))
        try:
            await build(retriever, index_settings(models, "new"))
            assert {found == old[question] for question, found in seen} == {True}
            candidate = await answers(retriever, index="candidate")
            await retriever.swap_index()
            num_before = len(seen)
            await until(lambda: asyncio.sleep(0, len(seen) > num_before + 20))
        finally:
            is_done.set()

    assert candidate != old
    assert await answers(retriever) == candidate
    assert all(found in (old[question], candidate[question]) for question, found in seen)
    assert seen[-1][1] == candidate[seen[-1][0]]
    assert (await retriever.info()).embedding_model == str(models / "new")


async def test_what_is_written_while_an_index_is_built_stands_in_it(retriever: LocalRetriever, models: Path) -> None:
    await retriever.reindex(index_settings(models, "new"))
    await retriever.ingest([document(3, note="Corrected. "), document(100)])
    await retriever.delete("d5")
    await build(retriever, index_settings(models, "new"))
    await retriever.delete("d6")
    await retriever.ingest([document(7, note="Corrected too. ")])
    await retriever.swap_index()
    listed = {stored.id: stored for stored in await retriever.documents(limit=100)}
    assert set(listed) == {f"d{number}" for number in (*range(60), 100)} - {"d5", "d6"}
    assert listed["d3"].content_hash == document(3, note="Corrected. ").content_hash
    assert "Corrected too." in (await retriever.document("d7"))[1]
    assert listed["d100"].metadata == {"number": 100}


async def test_a_rollback_keeps_what_was_written_since_and_can_be_taken_back(
    retriever: LocalRetriever, models: Path
) -> None:
    with pytest.raises(InvalidRequest, match="no earlier index"):
        await retriever.rollback_index()
    old = await answers(retriever)
    await build(retriever, index_settings(models, "new", max_tokens=32))
    assert (await retriever.swap_index()).has_previous
    new = await answers(retriever)
    await retriever.ingest([document(100)])
    assert (await retriever.rollback_index()).live["embedding.model"] == str(models / "old")
    assert (await retriever.document("d100"))[0].metadata == {"number": 100}
    assert best(await answers(retriever)) == best(old)
    await retriever.rollback_index()
    assert best(await answers(retriever)) == best(new)
    assert (await retriever.info()).embedding_model == str(models / "new")
    assert (await retriever.info()).num_documents == 61


async def test_a_new_index_can_be_given_up_and_another_one_begun(retriever: LocalRetriever, models: Path) -> None:
    with pytest.raises(InvalidRequest, match="No index is being built"):
        await retriever.swap_index()
    with pytest.raises(InvalidRequest, match="No index is being built"):
        await retriever.search(SearchQuery("x", 1, index="candidate"))
    # While somebody asks, building steps back.
    async with (await retriever._collection(None)).reading():
        await retriever.reindex(index_settings(models, "new"))
        with pytest.raises(InvalidRequest, match="Another index is being built"):
            await retriever.reindex(index_settings(models, "blind"))
    status = await retriever.discard_index()
    assert (status.state, status.candidate) == ("none", None)
    await build(retriever, index_settings(models, "blind"))
    status = await build(retriever, index_settings(models, "new"))
    assert status.candidate is not None
    assert status.candidate["embedding.model"] == str(models / "new")


async def test_nothing_is_built_for_the_settings_that_there_are(retriever: LocalRetriever, models: Path) -> None:
    status = await retriever.reindex(index_settings(models, "old"))
    assert (status.state, status.candidate) == ("current", None)
    with pytest.raises(ConfigurationError, match="there is no folder"):
        await retriever.reindex(index_settings(models, "missing"))
    with pytest.raises(ConfigurationError, match=r"chunking\.max_tokens: 1000 does not fit"):
        await retriever.reindex(index_settings(models, "new", max_tokens=1000))


async def test_a_model_that_was_trained_on_in_its_folder_is_another_one(tmp_path: Path, models: Path) -> None:
    make_encoder(tmp_path / "trained", seed=1)
    async with opened(settings_for(tmp_path / "data", index_settings(tmp_path, "trained"))) as retriever:
        await retriever.ingest(DOCUMENTS)
        old = await answers(retriever)
        make_encoder(tmp_path / "trained", seed=7)
        await build(retriever, index_settings(tmp_path, "trained"))
        assert await answers(retriever) == old
        await retriever.swap_index()
        assert await answers(retriever) != old


async def test_texts_go_through_a_newer_cleaner(retriever: LocalRetriever, models: Path) -> None:
    """Stored by an older one: the ligature would be two letters today."""
    await retriever.ingest([Document("raw", "T", "The \ufb01re was out.")])
    live = retriever._collections[retriever._default]._live
    await build(retriever, index_settings(models, "new"))
    candidate = await retriever._collections[retriever._default]._candidate_or_error()
    assert candidate.index is not None
    assert await synchronise(live.store, candidate.index, is_cleaned_anew=True) == 1
    assert (await candidate.index.document("raw"))[1] == "The fire was out."


async def test_collections_are_reindexed_one_by_one(tmp_path: Path, models: Path) -> None:
    async with opened(settings_for(tmp_path, index_settings(models, "old"))) as retriever:
        await retriever.ingest(DOCUMENTS[:3])
        await retriever.ingest(DOCUMENTS[3:5], collection="other")
        assert (await retriever.reindex(index_settings(models, "new"), collection="other")).collection == "other"
        await until(lambda: _is_built(retriever, "other"))
        await retriever.swap_index(collection="other")
        models_held = {one.name: (one.num_documents, one.embedding_model) for one in await retriever.collections()}
        assert models_held == {"default": (3, str(models / "old")), "other": (2, str(models / "new"))}
        await retriever.drop_collection("other")
        with pytest.raises(CollectionNotFound):
            await retriever.info(collection="other")
    assert sorted(path.name for path in (tmp_path / "qdrant").iterdir()) == ["default"]


async def _is_built(retriever: LocalRetriever, name: str) -> bool:
    return (await retriever.reindex_status(collection=name)).state == "built"


async def test_a_swap_comes_to_its_end_although_who_asked_for_it_leaves(tmp_path: Path, models: Path) -> None:
    async with opened(settings_for(tmp_path, index_settings(models, "old"))) as retriever:
        await retriever.ingest(DOCUMENTS)
        await build(retriever, index_settings(models, "new"))
        for _ in range(3):
            swap = asyncio.create_task(retriever.swap_index())
            await asyncio.sleep(0)
            swap.cancel()
        await until(lambda: _is_live(retriever, models / "new"))
        assert (await retriever.reindex_status()).live["embedding.model"] == str(models / "new")
        with pytest.raises(InvalidRequest, match="No index is being built"):
            await retriever.swap_index()


async def _is_live(retriever: LocalRetriever, model: Path) -> bool:
    return (await retriever.info()).embedding_model == str(model)


async def test_a_collection_may_be_dropped_twice_at_once_and_while_it_is_used(tmp_path: Path, models: Path) -> None:
    async with opened(settings_for(tmp_path, index_settings(models, "old"))) as retriever:
        await retriever.ingest(DOCUMENTS, collection="other")
        asked = [SearchQuery(question, 5, collection="other") for question in QUESTIONS]
        searches, late = ([retriever.search(query) for query in asked] for _ in range(2))
        drops = [retriever.drop_collection("other"), retriever.drop_collection("other")]
        found = await asyncio.gather(*searches, *drops, *late, return_exceptions=True)
        assert all(isinstance(one, SearchResult | CollectionNotFound | None) for one in found), found
        assert [one.name for one in await retriever.collections()] == ["default"]


# --- Restarts --------------------------------------------------------------------------------------------------------


async def test_after_a_swap_both_the_old_and_the_new_settings_start(tmp_path: Path, models: Path) -> None:
    async with opened(settings_for(tmp_path, index_settings(models, "old"))) as retriever:
        await retriever.ingest(DOCUMENTS)
        await build(retriever, index_settings(models, "new"))
        await retriever.swap_index()
        expected = await answers(retriever)
    for name in ("old", "new"):
        async with opened(settings_for(tmp_path, index_settings(models, name))) as retriever:
            assert await answers(retriever) == expected
            assert (await retriever.info()).embedding_model == str(models / "new")
    async with opened(settings_for(tmp_path, index_settings(models, "same"))) as retriever:
        with pytest.raises(CollectionMismatch, match=r"embedding\.model: was .*new', now .*same'"):
            await retriever.info()
        # The old settings are kept with the index before, which can still be gone back to.
        await retriever.rollback_index()
        assert (await retriever.info()).embedding_model == str(models / "old")


async def test_a_service_that_is_not_ready_is_mended_by_reindexing(tmp_path: Path, models: Path) -> None:
    async with opened(settings_for(tmp_path, index_settings(models, "old"))) as retriever:
        await retriever.ingest(DOCUMENTS)
    async with opened(settings_for(tmp_path, index_settings(models, "new"))) as retriever:
        with pytest.raises(CollectionMismatch, match="cleave reindex"):
            await retriever.info()
        assert not (await build(retriever, index_settings(models, "new"))).is_live_served
        await retriever.swap_index()
        assert (await retriever.info()).num_documents == 60
    async with opened(settings_for(tmp_path, index_settings(models, "new"))) as retriever:
        assert (await retriever.info()).num_documents == 60


async def test_other_prompts_do_not_keep_from_going_back(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(settings_for(tmp_path, index_settings(models, "old"))) as retriever:
        await retriever.ingest(DOCUMENTS)
        await build(retriever, index_settings(models, "new"))
        await retriever.swap_index()
    monkeypatch.setattr(prompts, "PLAIN_INSTRUCTIONS", "Answer in one word.")
    async with opened(settings_for(tmp_path, index_settings(models, "new"))) as retriever:
        with pytest.raises(CollectionMismatch, match=r"\(prompt\.format: was '\w+', now '\w+'\)"):
            await retriever.info()
        assert (await retriever.reindex(index_settings(models, "new"))).state == "current"
        await retriever.rollback_index()
        assert (await retriever.info()).embedding_model == str(models / "old")
    async with opened(settings_for(tmp_path, index_settings(models, "old"))) as retriever:
        assert (await retriever.info()).embedding_model == str(models / "old")


REINDEX = """
import asyncio, sys
from pathlib import Path
from app.services import build_retriever
from tests.test_reindex import index_settings, settings_for

async def main(data: Path, models: Path) -> None:
    retriever = await build_retriever(settings_for(data, index_settings(models, "old")))
    await retriever.reindex(index_settings(models, "new"))
    while True:
        status = await retriever.reindex_status()
        print(status.num_done, flush=True)
        if status.state == "built":
            print("swapping", flush=True)
            await retriever.swap_index()
        await asyncio.sleep(0.01)

asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def reindex_and_kill(data: Path, models: Path, is_time: Callable[[str], bool], delay_s: float = 0) -> None:
    """Reindex in another process, and kill it a moment after it has said a certain line."""
    command = [sys.executable, "-c", REINDEX, str(data), str(models)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if is_time(line.strip()):
                time.sleep(delay_s)
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
async def test_a_kill_while_an_index_is_built_harms_nothing_and_it_goes_on(tmp_path: Path, models: Path) -> None:
    settings = settings_for(tmp_path, index_settings(models, "old"))
    documents = [document(number) for number in range(400)]
    async with opened(settings) as retriever:
        await retriever.ingest(documents)
        expected = await answers(retriever)
    await asyncio.to_thread(reindex_and_kill, tmp_path, models, lambda line: int(line) >= KILLED_AFTER)
    async with opened(settings) as retriever:
        assert await answers(retriever) == expected
        status = await retriever.reindex_status()
        assert status.state == "interrupted"
        assert KILLED_AFTER <= status.num_done < 400
        held = {stored.id: stored.ingested_at for stored in await _candidate_documents(retriever)}
        await build(retriever, index_settings(models, "new"))
        after = {stored.id: stored.ingested_at for stored in await _candidate_documents(retriever)}
        assert len(after) == 400
        assert {name: after[name] for name in held} == held, "what was there was written again"
        await retriever.swap_index()
        assert (await retriever.info()).num_documents == 400


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.0, 0.04])
async def test_a_kill_while_the_indexes_are_swapped_leaves_one_of_them_live(
    tmp_path: Path, models: Path, delay_s: float
) -> None:
    settings = settings_for(tmp_path, index_settings(models, "old"))
    async with opened(settings) as retriever:
        await retriever.ingest(DOCUMENTS)
        expected = {"old": best(await answers(retriever))}
        await build(retriever, index_settings(models, "new"))
        expected["new"] = best(await answers(retriever, index="candidate"))
        await retriever.ingest([document(100)])
    await asyncio.to_thread(reindex_and_kill, tmp_path, models, lambda line: line == "swapping", delay_s)
    async with opened(settings) as retriever:
        live = Path((await retriever.info()).embedding_model).name
        assert best(await answers(retriever)) == expected[live]
        assert (await retriever.info()).num_documents == 61
        if live == "old":
            await build(retriever, index_settings(models, "new"))
            await retriever.swap_index()
        assert (await retriever.rollback_index()).live["embedding.model"] == str(models / "old")
        assert best(await answers(retriever)) == expected["old"]


async def _candidate_documents(retriever: LocalRetriever) -> list[Any]:
    candidate = await retriever._collections["default"]._candidate_or_error()
    return await candidate.store.documents(limit=1000)


async def test_every_replica_of_a_server_follows_a_swap(
    models: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection, "POLL_S", 0.2)
    monkeypatch.setattr("app.catalog.POLL_S", 0.2)
    settings = settings_for(tmp_path, index_settings(models, "old"), kind="server", url=server, collection="replicas")
    async with opened(settings) as first, opened(settings) as second:
        await first.ingest(DOCUMENTS)
        old = await answers(second)
        await build(first, index_settings(models, "new"))
        assert (await second.reindex_status()).state == "built"
        new = await answers(second, index="candidate")
        seen = []

        async def is_new() -> bool:
            seen.append(await answers(second))
            return seen[-1] == new

        swap = asyncio.create_task(first.swap_index())
        await until(is_new)
        await swap
        assert all(one[question] in (old[question], new[question]) for one in seen for question in QUESTIONS)
        # What a replica takes in goes to what is live now.
        await first.rollback_index()
        await second.ingest([document(100)])
        assert (await first.document("d100"))[0].metadata == {"number": 100}
        assert (await second.info()).embedding_model == str(models / "old")


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def service(tmp_path: Path, models: Path) -> Iterator[ServiceThread]:
    with running(settings_for(tmp_path / "data", index_settings(models, "old"))) as found:
        bodies = [{"id": one.id, "title": one.title, "text": one.text} for one in DOCUMENTS]
        assert httpx.post(f"{found.url}/v1/documents", json={"documents": bodies}, timeout=60).is_success
        yield found


def reindex(service: ServiceThread, tmp_path: Path, models: Path, name: str, *options: str) -> Any:
    config = write_config(tmp_path, **index_settings(models, name).model_dump(mode="json"))
    return CliRunner().invoke(main, ["reindex", "--config", str(config), "--url", service.url, *options])


def model_of(service: ServiceThread) -> str:
    parts = httpx.get(f"{service.url}/readyz?verbose", timeout=60).json()["parts"]
    return Path(parts["retriever"]["embedding_model"]).name


@pytest.mark.slow
def test_the_command_refuses_an_index_that_finds_less(service: ServiceThread, tmp_path: Path, models: Path) -> None:
    refused = reindex(service, tmp_path, models, "blind")
    assert refused.exit_code == 1, refused.output
    assert "60 questions from your documents" in refused.stdout
    assert "The new index finds significantly less" in refused.stdout
    assert model_of(service) == "old"
    forced = reindex(service, tmp_path, models, "blind", "--force")
    assert forced.exit_code == 0, forced.output
    assert model_of(service) == "blind"
    back = reindex(service, tmp_path, models, "blind", "--rollback")
    assert back.exit_code == 0, back.output
    assert model_of(service) == "old"
    discarded = reindex(service, tmp_path, models, "blind", "--discard")
    assert discarded.exit_code == 0, discarded.output
    again = reindex(service, tmp_path, models, "blind", "--rollback")
    assert (again.exit_code, "no earlier index" in again.stderr) == (2, True)


@pytest.mark.slow
def test_the_command_passes_an_index_that_finds_the_same(service: ServiceThread, tmp_path: Path, models: Path) -> None:
    passed = reindex(service, tmp_path, models, "same")
    assert passed.exit_code == 0, passed.output
    assert "60 questions from your documents" in passed.stdout
    assert model_of(service) == "same"
    current = reindex(service, tmp_path, models, "same")
    assert (current.exit_code, "already" in current.stdout) == (0, True)


# --- Known items -----------------------------------------------------------------------------------------------------


def test_a_question_is_half_of_the_words_of_one_sentence() -> None:
    text = " ".join(f"word{number}" for number in range(20)) + "."
    question = make_question("d", text)
    assert question is not None
    words = question.split()
    assert len(words) == 10
    assert words == sorted(words, key=lambda word: int(word.strip("word.")))
    assert make_question("d", text) == question
    assert make_question("d", "Too short.") is None


def test_ranks_and_samples() -> None:
    assert reciprocal_rank(["a", "b"], "b") == 0.5
    assert reciprocal_rank(["a"], "b") == 0
    many = [str(number) for number in range(1000)]
    assert sample(many) == sample(many[::-1])
    assert len(sample(many)) == len(set(sample(many))) == 200


@pytest.mark.parametrize(
    ("live", "candidate", "is_loss"),
    [([1.0] * 50, [0.5] * 50, True), ([1.0] * 50, [1.0] * 50, False), ([0.5, 1.0] * 25, [1.0, 0.5] * 25, False)],
)
def test_a_loss_is_one_that_chance_does_not_explain(live: list[float], candidate: list[float], is_loss: bool) -> None:
    assert compare(live, candidate).is_loss == is_loss
    assert not compare([], []).is_loss
