"""The pipeline over the real retriever; only the engine is scripted, since no real one fails on command."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from app.catalog import LocalRetriever
from app.chat import NEAR_MISS, REFUSAL, AnswerEnd, AnswerStart, AnswerText, ChatRequest, ChatService
from app.citations import find_citations
from app.domain import Document, Grounding, Message, Passage, Refusal, SamplingParams, Sentence
from app.errors import ContextTooLong, DeadlineExceeded, InvalidRequest, LLMUnavailable, UnknownFilter
from app.gate import Gate
from app.prompts import CITING_INSTRUCTIONS, PLAIN_INSTRUCTIONS, compose
from app.services import build_retriever
from app.settings import AnswerSettings, PlanningSettings, Settings, StoreSettings
from tests.scripted_llm import ScriptedLLM

in_one_loop = pytest.mark.asyncio(loop_scope="module")

QUESTION = "How long did the Reading Room outage last?"
FACT = "The Reading Room outage lasted 52 minutes."
QUOTED = "\u201cThe Reading Room outage lasted 52 minutes.\u201d [1]"
DOCUMENTS = [
    Document("outage", "Post-mortem", f"{FACT} Nobody was on call.", metadata={"author": "Noor"}),
    Document(
        "cache", "KV cache", "The cache of the larger model takes 40 GB of memory.", metadata={"author": "Teodor"}
    ),
    Document("chunks", "Chunking", "Cut manuals at their headings, not at a length.", metadata={"author": "Marit"}),
    Document("wiki", "Tower", "The lighthouse of Vesterby was built in 1868 [12]. It is 31 m high [2].", metadata={}),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def retriever() -> AsyncIterator[LocalRetriever]:
    found = await build_retriever(Settings(store=StoreSettings(kind="memory")))
    assert {receipt.status for receipt in await found.ingest(DOCUMENTS)} == {"created"}
    yield found
    await found.close()


@dataclass
class Answer:
    start: AnswerStart
    text: str
    end: AnswerEnd


def service(retriever: LocalRetriever, llm: ScriptedLLM, grounding: Grounding = "gate", **settings: Any) -> ChatService:
    return ChatService(retriever, llm, grounding=grounding, settings=AnswerSettings(**settings))


def rewriting(retriever: LocalRetriever, llm: ScriptedLLM, timeout_s: float = 30.0) -> ChatService:
    planning = PlanningSettings(rewrite="always", rewrite_timeout_s=timeout_s)
    return ChatService(retriever, llm, grounding="gate", settings=AnswerSettings(), planning=planning)


def asking(question: str = QUESTION, *, earlier: tuple[Message, ...] = (), **options: Any) -> ChatRequest:
    defaults = {"sampling": SamplingParams(max_tokens=256), "top_k": 5, "timeout_s": 30.0}
    return ChatRequest("r", (*earlier, Message("user", question)), **(defaults | options))


async def answered(chat: ChatService, request: ChatRequest | None = None) -> Answer:
    """Collect an answer, which has one start, some text and one end."""
    start, *pieces, end = [event async for event in chat.answer(request or asking())]
    assert isinstance(start, AnswerStart)
    assert isinstance(end, AnswerEnd)
    return Answer(start, "".join(piece.text for piece in pieces if isinstance(piece, AnswerText)), end)


# --- What the model says, checked ------------------------------------------------------------------------------------


@in_one_loop
async def test_a_supported_sentence_is_released_with_its_marker(retriever: LocalRetriever) -> None:
    llm = ScriptedLLM("The outage las", "ted 52 min", "utes.")
    answer = await answered(service(retriever, llm))
    assert answer.text == "The outage lasted 52 minutes. [1]"
    assert answer.start.sources[0].document_id == "outage"
    assert answer.start.query == QUESTION
    assert (answer.end.grounded, answer.end.unsupported, answer.end.degraded) == ("model", (), ())
    assert (answer.end.prompt_tokens, answer.end.completion_tokens, answer.end.finish_reason) == (100, 3, "stop")
    assert [answer.text[one.start : one.end] for one in answer.end.citations] == ["[1]"]
    assert llm.requests[0].instructions == PLAIN_INSTRUCTIONS
    assert len(llm.requests[0].passages) == answer.end.num_presented == 3


@in_one_loop
async def test_an_unsupported_sentence_is_replaced_by_a_quote(retriever: LocalRetriever) -> None:
    answer = await answered(service(retriever, ScriptedLLM("The outage lasted 47 minutes.")))
    assert answer.text == QUOTED
    assert answer.end.grounded == "quotes"
    assert answer.end.unsupported == ("The outage lasted 47 minutes.",)


@in_one_loop
async def test_a_supported_sentence_stays_when_another_is_left_out(retriever: LocalRetriever) -> None:
    answer = await answered(service(retriever, ScriptedLLM("It lasted 52 minutes. ", "It began on Mars.")))
    assert answer.text == "It lasted 52 minutes. [1]"
    assert answer.end.grounded == "model"
    assert answer.end.unsupported == ("It began on Mars.",)


@in_one_loop
async def test_the_gate_stops_an_engine_that_rambles(retriever: LocalRetriever) -> None:
    llm = ScriptedLLM("It lasted 52 minutes. ", "It was long. ", "And ", *["so on "] * 100)
    answer = await answered(service(retriever, llm))
    assert answer.end.finish_reason == "stop"
    assert llm.closed.is_set()
    assert llm.num_played < 5


@in_one_loop
async def test_the_refusal_needs_no_engine(retriever: LocalRetriever) -> None:
    llm = ScriptedLLM("France.")
    answer = await answered(service(retriever, llm), asking("Who won the 1998 football World Cup?"))
    assert (answer.text, answer.end.grounded, answer.end.citations) == (REFUSAL, "refused", ())
    assert answer.end.refusal
    assert answer.end.refusal.reason == "off_topic"
    assert not llm.requests


@in_one_loop
async def test_a_near_miss_is_refused_with_what_is_missing(retriever: LocalRetriever) -> None:
    llm = ScriptedLLM("In 1868.")
    answer = await answered(service(retriever, llm), asking("Was the lighthouse of Vesterby built in 1931?"))
    assert answer.text == f"{REFUSAL} {NEAR_MISS} None of them mentions 1931."
    assert answer.end.grounded == "refused"
    assert answer.end.refusal
    assert (answer.end.refusal.reason, answer.end.refusal.missing) == ("not_in_passages", ("1931",))
    assert answer.start.sources[0].document_id == "wiki"
    assert not llm.requests


@in_one_loop
async def test_a_filter_that_nothing_matches_is_said(retriever: LocalRetriever) -> None:
    answer = await answered(service(retriever, ScriptedLLM("Hi."), "off"), asking(filters={"author": "Nobody"}))
    assert answer.text == 'No document matches the filters: none has author "Nobody".'
    assert (answer.end.grounded, answer.start.sources, answer.start.notice) == ("refused", (), answer.text)
    assert answer.end.refusal == Refusal("no_match")


@in_one_loop
async def test_flag_streams_at_once_and_names_what_is_not_supported(retriever: LocalRetriever) -> None:
    second_sentence = asyncio.Event()
    llm = ScriptedLLM("It lasted 52", second_sentence, " minutes [1]. It began on Mars [1].")
    async with aclosing(service(retriever, llm, "flag").answer(asking())) as events:
        start, first = await anext(events), await anext(events)
        assert isinstance(start, AnswerStart)
        assert first == AnswerText("It lasted 52")
        second_sentence.set()
        end = [event async for event in events][-1]
    assert isinstance(end, AnswerEnd)
    assert (end.grounded, end.unsupported) == ("flagged", ("It began on Mars.",))
    assert [citation.n for citation in end.citations] == [1, 1]
    assert llm.requests[0].instructions == CITING_INSTRUCTIONS


@in_one_loop
async def test_flag_has_nothing_to_name_when_all_is_supported(retriever: LocalRetriever) -> None:
    answer = await answered(service(retriever, ScriptedLLM("It lasted 52 minutes [1]."), "flag"))
    assert (answer.end.grounded, answer.end.unsupported) == ("model", ())


@in_one_loop
async def test_off_checks_nothing_but_the_markers(retriever: LocalRetriever) -> None:
    answer = await answered(service(retriever, ScriptedLLM("It began ", "on Mars [1] [", "9]."), "off"))
    assert answer.text == "It began on Mars [1]."
    assert (answer.end.grounded, answer.end.num_removed_markers) == ("unchecked", 1)


@in_one_loop
@pytest.mark.parametrize("grounding", ["gate", "flag", "off"])
async def test_markers_that_name_no_source_are_removed_and_counted(
    retriever: LocalRetriever, grounding: Grounding
) -> None:
    answer = await answered(service(retriever, ScriptedLLM("It lasted 52 minutes [7][", "0]."), grounding))
    assert answer.text.replace(" [1]", "") == "It lasted 52 minutes."
    assert answer.end.num_removed_markers == 2


@in_one_loop
@pytest.mark.parametrize("grounding", ["gate", "flag", "off"])
async def test_a_marker_in_the_source_itself_is_no_citation(retriever: LocalRetriever, grounding: Grounding) -> None:
    llm = ScriptedLLM(LLMUnavailable("down"))
    answer = await answered(service(retriever, llm, grounding), asking("When was the lighthouse of Vesterby built?"))
    assert answer.text.startswith("\u201cThe lighthouse of Vesterby was built in 1868.\u201d [1]")
    assert {citation.n for citation in answer.end.citations} == {1}


@in_one_loop
async def test_a_source_that_did_not_fit_the_prompt_cannot_be_cited(retriever: LocalRetriever) -> None:
    llm = ScriptedLLM("It lasted 52 minutes [1] or 40 [2].", num_presented=1)
    answer = await answered(service(retriever, llm, "off"))
    assert answer.text == "It lasted 52 minutes [1] or 40."
    assert (answer.end.num_presented, answer.end.degraded) == (1, ("passages_dropped",))
    assert len(answer.start.sources) > 1


# --- What goes wrong -------------------------------------------------------------------------------------------------


@in_one_loop
@pytest.mark.parametrize("grounding", ["gate", "flag", "off"])
async def test_quotes_answer_for_an_engine_that_is_down(retriever: LocalRetriever, grounding: Grounding) -> None:
    answer = await answered(service(retriever, ScriptedLLM(LLMUnavailable("down")), grounding))
    assert answer.text == QUOTED
    assert answer.start.degraded == answer.end.degraded == ("llm_unavailable",)
    assert (answer.end.grounded, answer.end.finish_reason) == ("quotes", "stop")
    assert [citation.n for citation in answer.end.citations] == [1]


@in_one_loop
async def test_an_engine_that_says_nothing_counts_as_down(retriever: LocalRetriever) -> None:
    answer = await answered(service(retriever, ScriptedLLM()))
    assert (answer.text, answer.end.degraded) == (QUOTED, ("llm_unavailable",))


@in_one_loop
async def test_quotes_complete_what_an_engine_began_that_then_died(retriever: LocalRetriever) -> None:
    llm = ScriptedLLM("It began on Mars. The outage lasted", LLMUnavailable("died"))
    answer = await answered(service(retriever, llm))
    assert answer.text == QUOTED
    assert (answer.start.degraded, answer.end.degraded) == ((), ("llm_failed",))
    assert llm.closed.is_set()


@in_one_loop
@pytest.mark.parametrize("grounding", ["flag", "off"])
async def test_text_that_is_out_cannot_be_mended_so_the_error_comes_out(
    retriever: LocalRetriever, grounding: Grounding
) -> None:
    events = service(retriever, ScriptedLLM("The outage", LLMUnavailable("died")), grounding).answer(asking())
    assert isinstance(await anext(events), AnswerStart)
    assert await anext(events) == AnswerText("The outage")
    with pytest.raises(LLMUnavailable, match="died"):
        await anext(events)


@in_one_loop
async def test_a_stream_that_just_stops_is_no_whole_answer(retriever: LocalRetriever) -> None:
    script = "The outage lasted 52 minutes. And"
    answer = await answered(service(retriever, ScriptedLLM(script, finish_reason=None)))
    assert answer.text.startswith("The outage lasted 52 minutes. [1]")
    assert answer.end.degraded == ("llm_failed",)
    with pytest.raises(LLMUnavailable, match="ended before its answer did"):
        await answered(service(retriever, ScriptedLLM(script, finish_reason=None), "flag"))


@in_one_loop
@pytest.mark.parametrize("grounding", ["gate", "flag"])
async def test_quotes_answer_when_the_first_token_does_not_come(
    retriever: LocalRetriever, grounding: Grounding
) -> None:
    llm = ScriptedLLM(asyncio.Event())
    answer = await answered(service(retriever, llm, grounding, first_token_timeout_s=0.05))
    assert (answer.text, answer.end.degraded) == (QUOTED, ("llm_timeout",))
    assert llm.closed.is_set()


@in_one_loop
async def test_quotes_answer_in_time_when_the_model_does_not_come_to_an_end(retriever: LocalRetriever) -> None:
    llm = ScriptedLLM("The outage lasted", asyncio.Event())
    clock = asyncio.get_running_loop().time
    started = clock()
    answer = await answered(service(retriever, llm), asking(timeout_s=4.0))
    assert clock() - started < 4.0
    assert (answer.text, answer.end.degraded) == (QUOTED, ("llm_timeout",))
    assert llm.closed.is_set()


@in_one_loop
async def test_the_deadline_comes_out_when_text_is_out(retriever: LocalRetriever) -> None:
    llm = ScriptedLLM("The outage lasted", asyncio.Event())
    with pytest.raises(DeadlineExceeded, match="3 s were not enough for the answer"):
        await answered(service(retriever, llm, "flag"), asking(timeout_s=3.0))
    assert llm.closed.is_set()


@in_one_loop
async def test_a_retrieval_that_takes_too_long_is_an_error(retriever: LocalRetriever) -> None:
    llm = ScriptedLLM("Hi.")
    with pytest.raises(DeadlineExceeded, match="not enough for retrieval"):
        await answered(service(retriever, llm), asking(timeout_s=1e-4))
    assert not llm.requests


@in_one_loop
async def test_a_question_that_does_not_fit_comes_out_before_the_first_event(retriever: LocalRetriever) -> None:
    llm = ScriptedLLM(ContextTooLong("too long", param="messages"))
    with pytest.raises(ContextTooLong):
        await anext(service(retriever, llm).answer(asking()))


@in_one_loop
@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (asking(" \u200b\n"), InvalidRequest),
        (asking(filters={"colour": "red"}), UnknownFilter),
        (ChatRequest("r", (Message("assistant", "Hello."),), SamplingParams(9), 5, 30.0), InvalidRequest),
    ],
    ids=["empty question", "unknown filter", "last message is not the user's"],
)
async def test_a_wrong_request_reaches_no_engine(
    retriever: LocalRetriever, request_: ChatRequest, error: type[Exception]
) -> None:
    llm = ScriptedLLM("Hi.")
    with pytest.raises(error):
        await anext(service(retriever, llm).answer(request_))
    assert not llm.requests


@in_one_loop
@pytest.mark.parametrize("grounding", ["gate", "flag", "off"])
@pytest.mark.parametrize("num_read", [1, 2])
async def test_closing_the_answer_closes_the_engines_stream(
    retriever: LocalRetriever, grounding: Grounding, num_read: int
) -> None:
    llm = ScriptedLLM("It lasted 52 minutes. And", asyncio.Event())
    events = service(retriever, llm, grounding).answer(asking())
    for _ in range(num_read):
        await anext(events)
    assert not llm.closed.is_set()
    await events.aclose()
    assert llm.closed.is_set()


@in_one_loop
async def test_a_cancelled_answer_closes_the_engines_stream(retriever: LocalRetriever) -> None:
    llm = ScriptedLLM(asyncio.Event())
    waiting = asyncio.create_task(answered(service(retriever, llm)))
    await llm.began.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert llm.closed.is_set()


# --- Planning --------------------------------------------------------------------------------------------------------

TALK = (Message("user", QUESTION), Message("assistant", FACT))
STANDALONE = "Was somebody on call during the Reading Room outage?"


@in_one_loop
async def test_a_follow_up_is_searched_for_and_judged_as_the_question_that_the_model_made_of_it(
    retriever: LocalRetriever,
) -> None:
    llm = ScriptedLLM(STANDALONE)
    answer = await answered(rewriting(retriever, llm), asking("Was somebody on call then?", earlier=TALK))
    assert (answer.start.query, answer.start.degraded) == (STANDALONE, ())
    assert answer.start.sources[0].document_id == "outage"
    assert "rewrite" in answer.end.timings_ms
    rewrite, generation = llm.requests
    assert (rewrite.passages, generation.messages[-1].content) == ((), "Was somebody on call then?")


@in_one_loop
async def test_a_first_question_is_not_rewritten(retriever: LocalRetriever) -> None:
    llm = ScriptedLLM("It lasted 52 minutes.")
    answer = await answered(rewriting(retriever, llm), asking(earlier=(Message("system", "Be brief."),)))
    assert (answer.start.query, len(llm.requests)) == (QUESTION, 1)


@in_one_loop
async def test_without_a_capable_model_a_follow_up_is_searched_for_with_what_was_asked_before(
    retriever: LocalRetriever,
) -> None:
    llm = ScriptedLLM("It was freed.")
    answer = await answered(service(retriever, llm), asking("Was nobody on call then?", earlier=TALK))
    assert (answer.start.query, answer.start.degraded) == ("Was nobody on call then?", ())
    assert answer.start.sources[0].document_id == "outage"
    assert not [request for request in llm.requests if not request.passages]


@in_one_loop
@pytest.mark.parametrize(
    "text", ["I am a model.", LLMUnavailable("down"), asyncio.Event()], ids=["strays", "down", "late"]
)
async def test_a_rewriting_that_fails_costs_nothing_but_itself(
    retriever: LocalRetriever, text: str | LLMUnavailable | asyncio.Event
) -> None:
    timeout_s = 0.01 if isinstance(text, asyncio.Event) else 30.0
    request = asking("Was nobody on call then?", earlier=TALK)
    async with aclosing(rewriting(retriever, ScriptedLLM(text), timeout_s).answer(request)) as events:
        if isinstance(text, asyncio.Event):
            text.set()
        start = await anext(events)
    assert isinstance(start, AnswerStart)
    assert (start.query, start.degraded[0]) == ("Was nobody on call then?", "rewriting_skipped")
    assert start.sources[0].document_id == "outage"


@in_one_loop
async def test_only_the_author_whom_the_question_names_is_cited(retriever: LocalRetriever) -> None:
    request = asking("What did Teodor write on the memory of the cache?", recognise_filters=True)
    answer = await answered(service(retriever, ScriptedLLM("It takes 40 GB.")), request)
    assert (answer.text, answer.end.grounded) == ("It takes 40 GB. [1]", "model")
    assert [source.metadata["author"] for source in answer.start.sources] == ["Teodor"]
    assert (answer.start.recognised_filters, answer.start.notice) == ({"author": "Teodor"}, None)


@in_one_loop
async def test_what_the_named_author_did_not_write_is_refused_and_not_taken_from_others(
    retriever: LocalRetriever,
) -> None:
    request = asking("What did Teodor write about the lighthouse of Vesterby?", recognise_filters=True)
    llm = ScriptedLLM("It was built in 1868.")
    answer = await answered(service(retriever, llm), request)
    assert answer.text == 'The documents with author "Teodor", which the question names, do not hold an answer to it.'
    assert (answer.end.grounded, answer.end.citations, llm.requests) == ("refused", (), [])


@in_one_loop
async def test_a_value_that_no_document_has_is_refused_with_the_nearest(retriever: LocalRetriever) -> None:
    answer = await answered(service(retriever, ScriptedLLM("Hi.")), asking(filters={"author": "Theodor"}))
    assert answer.text == 'No document matches the filters: none has author "Theodor". Did you mean "Teodor"?'
    assert (answer.end.grounded, answer.start.notice) == ("refused", answer.text)


# --- What is passed on and reported ----------------------------------------------------------------------------------


@in_one_loop
@pytest.mark.parametrize("grounding", ["gate", "flag", "off"])
async def test_without_documents_the_model_is_left_alone(retriever: LocalRetriever, grounding: Grounding) -> None:
    llm = ScriptedLLM("x[0] = y[1]", " # [7]")
    request = asking("Write code.", earlier=(Message("system", "Be terse."),), use_documents=False)
    answer = await answered(service(retriever, llm, grounding), request)
    assert answer.text == "x[0] = y[1] # [7]"
    assert (answer.start.sources, answer.end.citations, answer.end.num_removed_markers) == ((), (), 0)
    assert answer.end.grounded == "unchecked"
    sent = llm.requests[0]
    assert (sent.messages, sent.passages, sent.sampling) == (request.messages, (), request.sampling)
    assert compose(sent, num_kept=0) == list(request.messages)


@in_one_loop
async def test_without_documents_there_is_nothing_to_quote_when_the_engine_is_down(retriever: LocalRetriever) -> None:
    with pytest.raises(LLMUnavailable, match="down"):
        await answered(service(retriever, ScriptedLLM(LLMUnavailable("down"))), asking(use_documents=False))


@in_one_loop
async def test_turns_that_did_not_fit_are_reported(retriever: LocalRetriever) -> None:
    earlier = (Message("user", "Hello"), Message("assistant", "Hello."))
    llm = ScriptedLLM("It lasted 52 minutes.", num_dropped_messages=2)
    answer = await answered(service(retriever, llm), asking(earlier=earlier))
    assert answer.end.degraded == ("history_trimmed",)
    assert llm.requests[0].messages == asking(earlier=earlier).messages


@in_one_loop
async def test_every_stage_says_how_long_it_took(retriever: LocalRetriever) -> None:
    timings = (await answered(service(retriever, ScriptedLLM("It lasted 52 minutes.")))).end.timings_ms
    stages = ["retrieve.embed", "retrieve.search", "retrieve.score_sentences"]
    assert set(timings) == {"retrieve", *stages, "first_token", "total"}
    assert sum(timings[stage] for stage in stages) <= timings["retrieve"] + 1
    assert timings["retrieve"] <= timings["first_token"] <= timings["total"]


@in_one_loop
@pytest.mark.parametrize(
    ("grounding", "text", "finish_reason"), [("flag", "The outage lasted", "length"), ("gate", QUOTED, "stop")]
)
async def test_a_completion_that_was_cut_says_so_unless_quotes_complete_it(
    retriever: LocalRetriever, grounding: Grounding, text: str, finish_reason: str
) -> None:
    answer = await answered(service(retriever, ScriptedLLM("The outage lasted", finish_reason="length"), grounding))
    assert (answer.text, answer.end.finish_reason) == (text, finish_reason)


@in_one_loop
async def test_answers_of_many_at_once_do_not_mix(retriever: LocalRetriever) -> None:
    questions = {
        QUESTION: "52 minutes",
        "How much memory does the cache of the larger model take?": "40 GB",
        "Where should manuals be cut?": "headings",
        "When was the lighthouse of Vesterby built?": "1868",
    }
    chat = service(retriever, ScriptedLLM("I cannot tell."))
    answers = await asyncio.gather(*(answered(chat, asking(question)) for question in questions for _ in range(3)))
    expected = [fact for fact in questions.values() for _ in range(3)]
    assert all(fact in answer.text for fact, answer in zip(expected, answers, strict=True))


# --- The gate by itself ----------------------------------------------------------------------------------------------

GATED = Passage(
    "d#0",
    "d",
    "Post-mortem",
    "",
    {},
    f"{FACT} Dr. Noor restarted the gateway at 14:58.",
    1.0,
    (Sentence(FACT, 0.9), Sentence("Dr. Noor restarted the gateway at 14:58.", 0.8)),
)
TEXTS = [
    "It lasted 52 minutes [1]. It began on Mars. Then more.",
    "Dr. Noor restarted the gateway at 14:58 [1, 9]. It lasted 52.5 minutes.",
    "1. It lasted 52 minutes.\n2. The gateway was restarted at 14:58!\n\nReally?",
    "It lasted 52 minutes",
    "",
]


def gated(pieces: list[str]) -> tuple[str, str, list[str]]:
    gate = Gate(QUESTION, [GATED])
    text = ""
    for piece in pieces:
        text += gate.feed(piece)
        if gate.is_full:
            break
    return text + gate.finish(), gate.grounded, gate.unsupported


@given(st.sampled_from(TEXTS), st.lists(st.integers(0, 80), max_size=12))
def test_the_gate_does_not_care_how_the_text_is_cut(text: str, cuts: list[int]) -> None:
    ends = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(ends)]
    assert gated(pieces) == gated([text])


@given(st.lists(st.text(alphabet="The outage lasted 52 4.[1]9!?\n", max_size=30), max_size=4))
def test_whatever_the_model_says_an_answer_comes_out_that_cites_only_what_there_is(pieces: list[str]) -> None:
    text, grounded, _ = gated(pieces)
    assert grounded in ("model", "mixed", "quotes")
    assert text.strip()
    assert {citation.n for citation in find_citations(text)} == {1}
