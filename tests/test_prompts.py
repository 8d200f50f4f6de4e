from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import GenerationRequest, Message, Passage, SamplingParams
from app.errors import ContextTooLong
from app.prompts import pack

WINDOW = 120


def render(messages: Sequence[Message]) -> list[int]:
    """One token per word, and two around each message: the smallest thing that counts like a chat template."""
    return [0 for message in messages for _ in (*message.content.split(), "<", ">")]


def request(
    num_turns: int = 0, num_passages: int = 3, question: str = "why?", max_tokens: int = 20
) -> GenerationRequest:
    turns = [Message("user" if n % 2 == 0 else "assistant", f"turn {n} " + "w " * 10) for n in range(num_turns * 2)]
    passages = tuple(Passage(f"d#{n}", "d", "title", "", {}, "p " * 15, 1.0) for n in range(num_passages))
    messages = (*turns, Message("user", question))
    return GenerationRequest("r", messages, SamplingParams(max_tokens), passages, "answer from the passages")


def test_what_fits_is_not_touched() -> None:
    packed = pack(request(), render, WINDOW)
    assert (packed.num_presented, packed.num_dropped_messages, packed.max_tokens) == (3, 0, 20)


def test_the_oldest_turns_go_before_any_passage() -> None:
    packed = pack(request(num_turns=3), render, WINDOW)
    assert packed.num_presented == 3
    assert 0 < packed.num_dropped_messages <= 6


def test_the_last_passages_go_when_no_turn_is_left() -> None:
    packed = pack(request(num_turns=1, question="w " * 60), render, WINDOW)
    assert packed.num_dropped_messages == 2
    assert packed.num_presented < 3


def test_a_question_that_does_not_fit_alone_is_refused_with_the_numbers() -> None:
    with pytest.raises(ContextTooLong, match=r"needs 20\d tokens.*window of 120") as caught:
        pack(request(question="w " * 200), render, WINDOW)
    assert caught.value.param == "messages"


@given(st.integers(0, 40), st.integers(0, 10), st.integers(1, 90), st.integers(1, 500))
def test_prompt_and_completion_never_exceed_the_window(turns: int, passages: int, words: int, max_tokens: int) -> None:
    wanted = request(turns, passages, "w " * words, max_tokens)
    try:
        packed = pack(wanted, render, WINDOW)
    except ContextTooLong:
        return
    assert len(packed.token_ids) + packed.max_tokens <= WINDOW
    assert 1 <= packed.max_tokens <= max_tokens


@given(st.integers(0, 40), st.integers(0, 10))
def test_no_smaller_concession_would_have_fitted(turns: int, passages: int) -> None:
    packed = pack(request(turns, passages), render, WINDOW)
    if packed.num_dropped_messages and packed.num_presented == passages:
        kept = request(turns, passages)
        shorter = GenerationRequest(
            "r", kept.messages[packed.num_dropped_messages - 1 :], kept.sampling, kept.passages, kept.instructions
        )
        assert pack(shorter, render, WINDOW).num_dropped_messages == 1
