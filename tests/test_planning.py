"""From a conversation to what is searched for."""

import asyncio

import pytest

from app.domain import Message
from app.errors import InvalidRequest, LLMUnavailable, Overloaded
from app.planning import MAX_CONTEXT, MAX_REWRITTEN_TOKENS, RewritingFailed, plan_query, rewrite_question
from app.prompts import MAX_REWRITING_TURNS, MAX_TURN_CHARACTERS
from app.services import decide_planning
from app.settings import Device, LLMSettings, PlanningSettings, Settings
from tests.scripted_llm import ScriptedLLM

TALK = (
    Message("system", "Be brief."),
    Message("user", "Which encoder does the archive use?"),
    Message("assistant", "It uses MiniLM, with 384 dimensions."),
    Message("user", "How large is it?"),
)
STANDALONE = "How large is the MiniLM encoder of the archive?"


def test_a_first_question_is_taken_as_it_is() -> None:
    plan = plan_query([Message("system", "Be brief."), Message("user", " How \ufb01ne? ")])
    assert (plan.question, plan.context) == ("How fine?", ())


def test_earlier_questions_are_context_newest_first_and_answers_are_not() -> None:
    turns = [Message(role, f"{role} {n}") for n in range(6) for role in ("user", "assistant")]
    plan = plan_query([*turns, Message("user", "last")])
    assert (plan.question, plan.context) == ("last", ("user 5", "user 4", "user 3"))
    assert len(plan.context) == MAX_CONTEXT


def test_empty_and_endless_turns_do_no_harm() -> None:
    plan = plan_query([Message("user", " "), Message("user", "word " * 100_000), Message("user", "last")])
    assert len(plan.context) == 1
    assert len(plan.context[0]) < 1_001
    assert plan.may_depend
    assert not plan_query([Message("user", "first"), Message("user", "word " * 1_000)]).may_depend
    assert not plan_query([Message("assistant", "Hello."), Message("user", "first")]).may_depend


@pytest.mark.parametrize("messages", [[], [Message("assistant", "Hello.")], [Message("user", " \n")]])
def test_without_a_question_there_is_nothing_to_plan(messages: list[Message]) -> None:
    with pytest.raises(InvalidRequest):
        plan_query(messages)


@pytest.mark.parametrize(
    ("llm", "device", "expected"),
    [
        (LLMSettings(), "cpu", "never"),
        (LLMSettings(), "gpu", "always"),
        (LLMSettings(engine="openai", url="http://127.0.0.1:1/v1", model="m"), "cpu", "always"),
        (LLMSettings(engine="extractive"), "gpu", "never"),
    ],
)
def test_only_a_model_that_can_rewrites_unless_the_settings_say_otherwise(
    llm: LLMSettings, device: Device, expected: str
) -> None:
    assert decide_planning(Settings(llm=llm), device).rewrite == expected
    for chosen in ("always", "never"):
        settings = Settings(llm=llm, planning=PlanningSettings(rewrite=chosen))
        assert decide_planning(settings, device).rewrite == chosen


# --- Rewriting by the model ------------------------------------------------------------------------------------------


async def rewritten(llm: ScriptedLLM, messages: tuple[Message, ...] = TALK, timeout_s: float = 30.0) -> str:
    return await rewrite_question(messages, llm, request_id="r", timeout_s=timeout_s)


@pytest.mark.parametrize(
    "text",
    [STANDALONE, f"\n{STANDALONE}\n", f'"{STANDALONE}"', f"Search question: {STANDALONE}\nIt asks for the size."],
)
async def test_the_model_makes_a_follow_up_stand_alone(text: str) -> None:
    llm = ScriptedLLM(text[:9], text[9:])
    assert await rewritten(llm) == STANDALONE
    sent = llm.requests[0]
    assert (sent.request_id, sent.sampling.max_tokens, sent.sampling.temperature) == (
        "r-rewrite",
        MAX_REWRITTEN_TOKENS,
        0,
    )
    assert sent.passages == ()
    asked = sent.messages[-1].content
    assert "User: Which encoder does the archive use?\nAssistant: It uses MiniLM" in asked
    assert "Be brief." not in asked
    assert "Last message: How large is it?" in asked


@pytest.mark.parametrize("text", ["", " ", "?", "I am only a language model.", "Who won the 1998 World Cup in France?"])
async def test_what_is_no_question_about_the_conversation_is_not_searched_for(text: str) -> None:
    with pytest.raises(RewritingFailed, match="not a question about the conversation"):
        await rewritten(ScriptedLLM(text))


async def test_a_question_that_was_cut_off_is_not_searched_for() -> None:
    with pytest.raises(RewritingFailed, match="come to an end"):
        await rewritten(ScriptedLLM(STANDALONE, finish_reason="length"))


@pytest.mark.parametrize("error", [LLMUnavailable("It is down."), Overloaded("Too many requests.")])
async def test_a_model_that_fails_is_said(error: LLMUnavailable | Overloaded) -> None:
    with pytest.raises(RewritingFailed, match=error.message):
        await rewritten(ScriptedLLM(error))


async def test_a_model_that_is_late_is_stopped() -> None:
    llm = ScriptedLLM("How", asyncio.Event())
    with pytest.raises(RewritingFailed, match=r"within 0\.01 s"):
        await rewritten(llm, timeout_s=0.01)
    assert llm.closed.is_set()


async def test_the_prompt_is_bounded_whatever_was_said_before() -> None:
    long = tuple(Message("user", "encoder " * 10_000) for _ in range(50))
    llm = ScriptedLLM("How large is the encoder?")
    assert await rewritten(llm, (*long, Message("user", "How large is it?"))) == "How large is the encoder?"
    assert len(llm.requests[0].messages[-1].content) < MAX_REWRITING_TURNS * (MAX_TURN_CHARACTERS + 10) + 100
