"""Ingestion and retrieval on real parts: the bundled encoder and Qdrant in memory."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from app import ingestion, retrieval
from app.chunking import split
from app.domain import Chunk, Document, EncodedChunk, Filters, SearchQuery, SearchResult
from app.embedding import Embedder
from app.errors import ConfigurationError, DocumentNotFound, InvalidRequest, UnknownFilter
from app.ingestion import Ingestor, check_window, manifest
from app.retrieval import MAX_FILTER_VALUES, Index
from app.settings import ChunkingSettings, EmbeddingSettings, RetrievalSettings
from app.store import Store
from app.store.server import open_server_store

in_one_loop = pytest.mark.asyncio(loop_scope="module")

OUTAGE = Document(
    "outage",
    "Post-mortem",
    "The Reading Room outage lasted 52 minutes. Nobody was on call that day.",
    "https://wiki.example/outage",
    {"author": "Noor", "year": 2025},
)
CACHE = Document(
    "cache",
    "KV cache",
    "A cache of keys and values grows with every token. It is freed when the answer ends.",
    metadata={"author": "Teodor", "draft": True},
)
CHUNKS = Document(
    "chunks",
    "Chunking",
    "Manuals are cut at their headings. A table stays in one piece.",
    metadata={"author": "Marit", "year": 2024},
)
QUESTION = "How long did the Reading Room outage last?"


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    """In 32 bits, so that vectors do not depend on the batch that they are made in."""
    return Embedder(EmbeddingSettings(dtype="float32", batch_size=4))


@pytest_asyncio.fixture(loop_scope="module")
async def store(embedder: Embedder) -> AsyncIterator[Store]:
    stamp = manifest(embedder, ChunkingSettings())
    found = await open_server_store(
        url=":memory:", api_key=None, collection="test", dimension=embedder.dimension, manifest=stamp
    )
    yield found
    await found.close()


@pytest.fixture
def empty(embedder: Embedder, store: Store) -> Index:
    ingestor = Ingestor(embedder, store, ChunkingSettings())
    return Index(embedder, store, ingestor, RetrievalSettings(), "test")


@pytest_asyncio.fixture(loop_scope="module")
async def retriever(empty: Index) -> Index:
    await empty.ingest([OUTAGE, CACHE, CHUNKS])
    return empty


async def search(
    retriever: Index, text: str = QUESTION, *, top_k: int = 5, num_scored: int = 0, **filters: Any
) -> SearchResult:
    chosen: Filters = filters
    return await retriever.search(SearchQuery(text, top_k, chosen, num_scored))


async def recognising(retriever: Index, text: str, **filters: Any) -> SearchResult:
    return await retriever.search(SearchQuery(text, 5, filters, recognise_filters=True))


# --- Searching -------------------------------------------------------------------------------------------------------


@in_one_loop
async def test_the_passage_that_answers_comes_first_with_all_that_is_known_of_it(retriever: Index) -> None:
    found = await search(retriever)
    best = found.passages[0]
    assert (best.document_id, best.chunk_id, best.title, best.url) == ("outage", "outage#0", OUTAGE.title, OUTAGE.url)
    assert (best.text, dict(best.metadata)) == (OUTAGE.text, OUTAGE.metadata)
    assert len(found.passages) == 3
    assert set(found.timings_ms) == {"embed", "search", "score_sentences"}


@in_one_loop
async def test_top_k_bounds_what_is_found(retriever: Index) -> None:
    assert len((await search(retriever, top_k=2)).passages) == 2


@in_one_loop
async def test_an_empty_collection_has_nothing_to_find(empty: Index) -> None:
    assert (await search(empty, num_scored=3)).passages == ()


@in_one_loop
@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"author": "Teodor"}, {"cache"}),
        ({"author": ["Teodor", "Marit"]}, {"cache", "chunks"}),
        ({"year": 2025}, {"outage"}),
        ({"year": 2025.0}, {"outage"}),
        ({"year": "2025"}, set()),
        ({"draft": True}, {"cache"}),
        ({"draft": 1}, set()),
        ({"author": "Noor", "year": 2024}, set()),
        ({"author": "Nobody"}, set()),
        ({"author": []}, set()),
    ],
)
async def test_a_filter_keeps_what_matches_in_value_and_type(
    retriever: Index, filters: dict[str, Any], expected: set[str]
) -> None:
    found = await search(retriever, **filters)
    assert {passage.document_id for passage in found.passages} == expected


@in_one_loop
async def test_a_filter_on_a_field_that_no_document_has_is_an_error_that_lists_the_fields(
    retriever: Index,
) -> None:
    with pytest.raises(UnknownFilter, match=r"'autor'.*author, draft, year") as caught:
        await search(retriever, autor="Noor", author="Noor")
    assert caught.value.param == "filters.autor"


@in_one_loop
async def test_filters_of_too_many_values_are_refused(retriever: Index) -> None:
    names = [f"Noor {n}" for n in range(MAX_FILTER_VALUES)]
    assert not (await search(retriever, author=names)).passages
    for ask in (search(retriever, author=names, year=1), retriever.num_documents({"author": [*names, "Noor"]})):
        with pytest.raises(InvalidRequest, match=r"1000 values, not 1001\.") as caught:
            await ask
        assert caught.value.param == "filters"


@in_one_loop
async def test_no_field_can_be_filtered_in_an_empty_collection(empty: Index) -> None:
    with pytest.raises(UnknownFilter, match="can be filtered: none"):
        await search(empty, author="Noor")


@in_one_loop
@pytest.mark.parametrize("num_scored", [0, 1, 2, 5])
async def test_only_the_best_passages_get_their_sentences_scored(retriever: Index, num_scored: int) -> None:
    passages = (await search(retriever, num_scored=num_scored)).passages
    assert [bool(passage.sentences) for passage in passages] == [place < num_scored for place in range(3)]


@in_one_loop
async def test_a_sentence_is_scored_by_its_cosine_to_the_question(retriever: Index, embedder: Embedder) -> None:
    for _ in range(2):  # the second time from the cache
        best = (await search(retriever, num_scored=3)).passages[0]
        texts = [sentence.text for sentence in best.sentences]
        assert texts == ["The Reading Room outage lasted 52 minutes.", "Nobody was on call that day."]
        question, *vectors = await embedder.embed_documents([QUESTION, *texts])
        expected = [float(vector @ question) for vector in vectors]
        assert [sentence.score for sentence in best.sentences] == pytest.approx(expected, abs=1e-4)
        assert best.sentences[0].score > 0.5 > best.sentences[1].score


@in_one_loop
async def test_sentences_are_those_of_the_new_version_after_an_update(retriever: Index) -> None:
    before = (await search(retriever, num_scored=3)).passages[0]
    text = "The Reading Room outage lasted 53 minutes. It was corrected later."
    await retriever.ingest([Document("outage", OUTAGE.title, text, metadata=OUTAGE.metadata)])
    after = (await search(retriever, num_scored=3)).passages[0]
    assert after.chunk_id == before.chunk_id
    assert [sentence.text for sentence in after.sentences] == [
        "The Reading Room outage lasted 53 minutes.",
        "It was corrected later.",
    ]


@in_one_loop
async def test_facets_are_the_fields_that_most_documents_have(
    retriever: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = [
        {"team": "a", "rare": 1, "author": "Ann"},
        {"team": "b", "author": "Ann"},
        {"team": "c", "author": "Bo"},
    ]
    await retriever.ingest([Document(f"facet-{n}", "", "Text.", "", one) for n, one in enumerate(metadata)])
    found = {one.field: one for one in await retriever.facets(limit=2)}
    assert {"author", "rare", "team"} <= set(found)
    assert (len(found["team"].values), found["team"].num_values) == (2, 3)
    monkeypatch.setattr(retrieval, "MAX_FACETS", len(found) - 1)
    fewer = [one.field for one in await retriever.facets(limit=2)]
    assert fewer == sorted(set(found) - {"rare"})


@in_one_loop
async def test_a_full_cache_forgets_and_still_answers(retriever: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = await search(retriever, num_scored=3)
    monkeypatch.setattr(retrieval, "MAX_CACHED_PASSAGES", 1)
    await retriever.ingest([Document("new", "New", "The Reading Room opens at nine. Bring a card.")])
    for _ in range(2):
        found = await search(retriever, num_scored=4)
        assert all(len(passage.sentences) == 2 for passage in found.passages)
        kept = {passage.chunk_id: [sentence.text for sentence in passage.sentences] for passage in found.passages}
        assert kept["outage#0"] == [sentence.text for sentence in expected.passages[0].sentences]


@in_one_loop
async def test_a_question_made_of_stop_words_still_finds_by_meaning(retriever: Index) -> None:
    assert len((await search(retriever, "what is it and how?")).passages) == 3


@in_one_loop
async def test_searches_at_once_during_an_ingestion_get_what_they_get_alone(retriever: Index) -> None:
    questions = [QUESTION, "When is a cache freed?", "Where are manuals cut?"] * 4
    alone = {question: (await search(retriever, question, top_k=1)).passages for question in questions}
    long = Document("long", "Weather", "\n\n".join(f"On day {day} it rained in the hills." for day in range(150)))
    receipts, *found = await asyncio.gather(
        retriever.ingest([long]), *(search(retriever, question, top_k=1) for question in questions)
    )
    assert [receipt.num_truncated_chunks for receipt in receipts] == [0]
    expected = [alone[question][0].chunk_id for question in questions]
    assert [result.passages[0].chunk_id for result in found] == expected


# --- What the question names -----------------------------------------------------------------------------------------


@in_one_loop
async def test_an_author_that_the_question_names_is_the_only_one_found(retriever: Index) -> None:
    found = await recognising(retriever, "What did Teodor write about the outage?")
    assert [passage.document_id for passage in found.passages] == ["cache"]
    assert (found.recognised_filters, found.notice) == ({"author": "Teodor"}, None)


@in_one_loop
async def test_a_filter_of_the_request_wins_over_what_the_question_names(retriever: Index) -> None:
    found = await recognising(retriever, "What did Teodor write about the outage?", author="Noor")
    assert [passage.document_id for passage in found.passages] == ["outage"]
    assert found.recognised_filters == {}


@in_one_loop
async def test_nothing_is_recognised_unless_it_is_asked_for(retriever: Index) -> None:
    found = await search(retriever, "What did Teodor write about the outage?")
    assert (len(found.passages), found.recognised_filters) == (3, {})


@in_one_loop
async def test_recognised_and_given_filters_that_match_nothing_together_say_so(retriever: Index) -> None:
    found = await recognising(retriever, "What did Teodor write about the outage?", year=2024)
    assert found.passages == ()
    assert found.notice == (
        'No document matches the filters: none has year 2024 and author "Teodor". (The question names author "Teodor".)'
    )


@in_one_loop
async def test_a_value_that_no_document_has_is_answered_with_the_nearest(retriever: Index) -> None:
    found = await search(retriever, author="Theodor")
    assert found.notice == 'No document matches the filters: none has author "Theodor". Did you mean "Teodor"?'


@in_one_loop
async def test_what_is_recognised_follows_every_write(retriever: Index) -> None:
    question = "What does Yusra recommend?"
    assert (await recognising(retriever, question)).recognised_filters == {}
    await retriever.ingest([Document("advice", "Advice", "Write less.", metadata={"author": "Yusra Halim"})])
    assert (await recognising(retriever, question)).recognised_filters == {"author": "Yusra Halim"}
    await retriever.delete("advice")
    found = await recognising(retriever, question)
    assert (found.recognised_filters, len(found.passages)) == ({}, 3)


@in_one_loop
async def test_what_another_process_writes_is_recognised_in_time(
    retriever: Index, monkeypatch: pytest.MonkeyPatch, embedder: Embedder, store: Store
) -> None:
    monkeypatch.setattr(retrieval, "MAX_METADATA_AGE_S", 0.0)
    question = "What does Yusra recommend?"
    assert (await recognising(retriever, question)).recognised_filters == {}
    advice = Document("advice", "Advice", "Write less.", metadata={"author": "Yusra Halim"})
    vector = (await embedder.embed_documents([advice.text]))[0]
    await store.put(advice, [EncodedChunk(Chunk(0, advice.text, 0, 11), tuple(vector.tolist()), {})])
    assert (await recognising(retriever, question)).recognised_filters == {"author": "Yusra Halim"}


@in_one_loop
async def test_a_follow_up_is_searched_for_with_the_questions_before_it(retriever: Index) -> None:
    alone = await retriever.search(SearchQuery("And how much of it is there?", 3))
    found = await retriever.search(SearchQuery("And how much of it is there?", 3, context=(QUESTION,), num_scored=1))
    assert (alone.passages[0].document_id, found.passages[0].document_id) == ("cache", "outage")
    assert found.passages[0].sentences


# --- The documents ---------------------------------------------------------------------------------------------------


@in_one_loop
async def test_a_document_is_listed_read_and_deleted(retriever: Index) -> None:
    listed = await retriever.documents()
    assert {one.id for one in listed} == {"outage", "cache", "chunks"}
    assert [one.id for one in await retriever.documents(after=listed[0].id, limit=1)] == [listed[1].id]
    stored, text = await retriever.document("outage")
    assert (text, stored.content_hash, stored.num_chunks) == (OUTAGE.text, OUTAGE.content_hash, 1)
    await retriever.delete("outage")
    assert "outage" not in {passage.document_id for passage in (await search(retriever)).passages}
    for missing in (retriever.document("outage"), retriever.delete("outage")):
        with pytest.raises(DocumentNotFound, match="no document 'outage'"):
            await missing


@in_one_loop
async def test_info_counts_what_is_held(retriever: Index, embedder: Embedder) -> None:
    info = await retriever.info()
    assert (info.collection, info.num_documents, info.num_chunks) == ("test", 3, 3)
    assert info.filter_fields == ("author", "draft", "year")
    assert info.embedding_model == embedder.model_name == "all-MiniLM-L6-v2"


# --- Ingestion -------------------------------------------------------------------------------------------------------


@in_one_loop
async def test_ingesting_again_does_nothing_until_something_changed(empty: Index) -> None:
    async def status(document: Document) -> str:
        [receipt] = await empty.ingest([document])
        assert (receipt.document_id, receipt.num_chunks, receipt.num_truncated_chunks) == ("outage", 1, 0)
        return receipt.status

    assert await status(OUTAGE) == "created"
    assert await status(OUTAGE) == "unchanged"
    other_author = Document("outage", OUTAGE.title, OUTAGE.text, OUTAGE.url, {**OUTAGE.metadata, "author": "Marit"})
    assert await status(other_author) == "updated"
    assert [passage.document_id for passage in (await search(empty, author="Marit")).passages] == ["outage"]
    assert (await search(empty, author="Noor")).passages == ()
    assert (await empty.info()).num_chunks == 1


@in_one_loop
async def test_a_document_sent_twice_at_once_is_held_once_in_its_last_version(empty: Index) -> None:
    newer = Document("outage", OUTAGE.title, "The outage lasted 53 minutes.")
    receipts = await empty.ingest([OUTAGE, newer, newer])
    assert [receipt.status for receipt in receipts] == ["created", "updated", "unchanged"]
    assert (await empty.document("outage"))[1] == newer.text
    assert (await empty.info()).num_chunks == 1


@in_one_loop
async def test_a_failing_document_stops_no_other_and_keeps_its_place(empty: Index) -> None:
    unwritable: Any = {"author": object()}
    receipts = await empty.ingest([OUTAGE, Document("bad", "Bad", "Some text.", metadata=unwritable), CACHE])
    assert [receipt.status for receipt in receipts] == ["created", "failed", "created"]
    assert receipts[1].document_id == "bad"
    assert receipts[1].error == "Internal error; the service's log says more."
    assert (await empty.info()).num_documents == 2


@in_one_loop
async def test_nothing_ingested_is_nothing_to_report(empty: Index) -> None:
    assert await empty.ingest([]) == []


@in_one_loop
@pytest.mark.parametrize(
    "document",
    [
        Document("title", "Word " * 200, "Some text. " * 100),
        Document("heading", "T", f"# {'Heading ' * 300}\n\n" + "Some text. " * 100),
        Document("no breaks", "Title " * 60, "a1b2" * 1000),
        Document("word", "Pneumono" * 60, "ultramicroscopic" * 100),
        Document("script", "\u6f22" * 300, "\u6f22\u5b57" * 300),
        Document("marks", "!" * 300, "?!;" * 300),
        Document("emoji", "\U0001f600" * 200, "\U0001f469\u200d\U0001f680" * 400),
    ],
    ids=lambda document: document.id,
)
async def test_no_chunk_is_ever_cut_by_the_encoders_window(empty: Index, document: Document) -> None:
    [receipt] = await empty.ingest([document])
    assert (receipt.status, receipt.num_truncated_chunks) == ("created", 0)


@settings(max_examples=40, deadline=None)
@given(title=st.text(max_size=300), text=st.text(min_size=1, max_size=400), repeat=st.integers(1, 20))
def test_whatever_is_written_fits_the_window(embedder: Embedder, title: str, text: str, repeat: int) -> None:
    ingestor = Ingestor(embedder, None, ChunkingSettings())  # type: ignore[arg-type]  # nothing is stored
    chunks = split(text * repeat, embedder, max_tokens=160)
    draft = ingestion._Draft(Document("d", title, text * repeat), chunks, is_update=False)
    texts, _ = ingestor._read([(draft, chunk) for chunk in chunks])
    assert draft.num_truncated == 0
    assert all(embedder.num_tokens(one) <= embedder.window for one in texts)
    assert all(one.endswith(chunk.text) for one, chunk in zip(texts, chunks, strict=True))


@in_one_loop
async def test_documents_are_encoded_a_few_chunks_at_a_time(empty: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def text(number: int, num_paragraphs: int) -> str:
        return "\n\n".join(f"Paragraph {n} of {number}. " + "It goes on and on. " * 25 for n in range(num_paragraphs))

    documents = [Document(f"d{n}", "T", text(n, size)) for n, size in enumerate((1, 2, 0, 7, 1, 1, 12, 3))]
    documents.insert(4, documents[0])
    monkeypatch.setattr(ingestion, "MAX_CHUNKS_AT_ONCE", 4)
    first, second = await empty.ingest(documents), await empty.ingest(documents)
    assert [receipt.document_id for receipt in first] == [document.id for document in documents]
    assert [receipt.status for receipt in first] == ["created"] * 4 + ["unchanged"] + ["created"] * 4
    assert {receipt.status for receipt in second} == {"unchanged"}
    listed = await empty.documents()
    assert {one.id: one.num_chunks for one in listed} == {one.document_id: one.num_chunks for one in first}
    assert max(one.num_chunks for one in listed) >= 12
    for document in documents:
        assert (await empty.document(document.id))[1] == document.text
    found = await search(empty, "Paragraph 9 of 6", top_k=1)
    assert found.passages[0].text.startswith("Paragraph 9 of 6.")


def test_chunks_that_the_window_would_cut_are_refused_with_the_largest_that_fits(embedder: Embedder) -> None:
    with pytest.raises(ConfigurationError, match=r"chunking\.max_tokens: 255 .* 254 or less"):
        check_window(embedder, ChunkingSettings(max_tokens=255))
    check_window(embedder, ChunkingSettings(max_tokens=254))


def test_the_manifest_names_all_that_a_vector_depends_on(embedder: Embedder) -> None:
    stamp = manifest(embedder, ChunkingSettings(max_tokens=99))
    assert set(stamp) == {
        "text.cleaner",
        "text.format",
        "chunking.version",
        "chunking.max_tokens",
        "embedding.model",
        "embedding.revision",
        "embedding.tokenizer",
        "embedding.window",
        "embedding.query_prefix",
        "embedding.document_prefix",
        "embedding.dimension",
        "embedding.distance",
        "prompt.format",
        "prompt.chat_template",
        "sparse.model",
        "sparse.language",
        "sparse.term_saturation",
        "sparse.length_normalization",
        "sparse.average_length",
    }
    assert (stamp["embedding.dimension"], stamp["embedding.window"], stamp["chunking.max_tokens"]) == (384, 256, 99)


# --- The encoder -----------------------------------------------------------------------------------------------------


@in_one_loop
async def test_a_batch_keeps_the_order_of_its_texts(embedder: Embedder) -> None:
    texts = [("word " * length) + str(length) for length in (300, 1, 40, 2, 0, 90, 3, 20, 5, 60)]
    together = await embedder.embed_documents(texts)
    one_by_one = np.vstack([await embedder.embed_documents([text]) for text in texts])
    assert together.shape == (10, embedder.dimension)
    np.testing.assert_allclose(together, one_by_one, atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


@in_one_loop
async def test_vectors_have_unit_length_in_half_precision_too() -> None:
    vectors = await Embedder(EmbeddingSettings(dtype="bfloat16")).embed_documents([OUTAGE.text, CACHE.text, QUESTION])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@in_one_loop
async def test_no_texts_have_no_vectors(embedder: Embedder) -> None:
    assert (await embedder.embed_documents([])).shape == (0, embedder.dimension)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=200))
def test_offsets_cover_all_that_the_encoder_reads_in_order(embedder: Embedder, text: str) -> None:
    offsets = embedder.offsets(text)
    assert len(offsets) == embedder.num_tokens(text) - 2
    assert all(0 <= start < end <= len(text) for start, end in offsets)
    assert [start for start, _ in offsets] == sorted(start for start, _ in offsets)


def test_offsets_of_words_are_those_of_the_words_without_a_limit(embedder: Embedder) -> None:
    text = "The outage lasted 52 minutes " * 200
    covered = {place for start, end in embedder.offsets(text) for place in range(start, end)}
    assert len(embedder.offsets(text)) >= 5 * 200
    assert covered == {place for place, character in enumerate(text) if not character.isspace()}
