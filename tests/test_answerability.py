from dataclasses import replace

import pytest

from app.answerability import assess
from app.domain import Passage, Sentence

QUESTION = "When did the lighthouse of Vesterby get its 31 m tower?"


def passage(*sentences: tuple[str, float], similarity: float | None = None, title: str = "Coast") -> Passage:
    text = " ".join(sentence for sentence, _ in sentences)
    scored = tuple(Sentence(sentence, score) for sentence, score in sentences)
    return Passage("d#0", "d", title, "", {"author": "Noor"}, text, 1.0, similarity=similarity, sentences=scored)


TOWER = passage(("The lighthouse of Vesterby got its tower of 31 m in 1868.", 0.7), ("It is white.", 0.2))


def test_near_sentences_and_near_passages_count_alike() -> None:
    score = assess(QUESTION, [TOWER]).score
    assert assess(QUESTION, [replace(TOWER, similarity=0.7)]).score == pytest.approx(score)
    assert assess(QUESTION, [replace(TOWER, similarity=0.5)]).score == pytest.approx(score - 0.1)


@pytest.mark.parametrize(
    "near_miss",
    [
        "When did the lighthouse of Osterholm get its 31 m tower?",
        "When did the lighthouse of Vesterby get its 47 m tower?",
        "When did the lighthouse of Vesterby get its broken bell?",
    ],
    ids=["name", "number", "words"],
)
def test_a_near_miss_scores_lower_than_the_question_that_is_answered(near_miss: str) -> None:
    assert assess(near_miss, [TOWER]).score < assess(QUESTION, [TOWER]).score - 0.05


def test_names_and_numbers_that_no_passage_holds_are_named() -> None:
    other = passage(("Osterholm has a harbour.", 0.3))
    found = assess("Is the lighthouse of Osterholm older than Skagen or 1,868 years, as Noor says?", [TOWER, other])
    assert found.missing == ("Skagen",)


def test_a_number_is_the_same_with_and_without_separators_but_not_a_part_of_another_one() -> None:
    assert assess("Which tower cost 1,500 crowns?", [passage(("It cost 1500 crowns.", 0.5))]).missing == ()
    assert assess("Which tower cost 150 crowns?", [passage(("It cost 1500 crowns.", 0.5))]).missing == ("150",)


def test_a_year_that_no_passage_holds_is_decisive() -> None:
    outage = passage(("The Reading Room outage of 14 October 2025 lasted 52 minutes.", 0.95))
    right, wrong = (assess(f"How long did the outage of 14 October {year} last?", [outage]) for year in (2025, 2031))
    assert wrong.missing == ("2031",)
    assert wrong.score < 0.6 < right.score


def test_a_name_that_says_whose_text_is_meant_need_not_stand_in_it() -> None:
    mine = passage(("We use 256 tokens.", 0.5))
    assert assess("How many tokens, says Noor?", [mine]).score > assess("How many tokens, says Karl?", [mine]).score


def test_what_is_said_of_the_whole_document_is_said_in_each_sentence() -> None:
    about = passage(("It got its tower of 31 m in 1868.", 0.7), title="The lighthouse of Vesterby")
    assert assess(QUESTION, [about]).score == pytest.approx(assess(QUESTION, [TOWER]).score)


@pytest.mark.parametrize(("cosine", "is_off_topic"), [(0.1, True), (0.6, False)])
def test_far_passages_are_off_topic_and_near_ones_a_near_miss(cosine: float, is_off_topic: bool) -> None:
    assert assess("Who built Skagen?", [passage(("It is white.", cosine))]).is_off_topic == is_off_topic


@pytest.mark.parametrize("passages", [[], [passage()], [passage(("Vesterby tower lighthouse", 0.9))]])
def test_without_a_sentence_that_adds_to_the_question_nothing_answers_it(passages: list[Passage]) -> None:
    found = assess(QUESTION, passages)
    assert found.is_off_topic
    assert found.score < -0.9
