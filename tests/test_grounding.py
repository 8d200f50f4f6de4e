from app.domain import Passage, Sentence
from app.gate import Gate
from app.grounding import choose_quotes, is_supported, quote, rank_evidence, supporting_evidence

QUESTION = "How long did the outage of the gateway last?"


def passage(*sentences: tuple[str, float], title: str = "Post-mortem", author: str = "Noor") -> Passage:
    text = " ".join(sentence for sentence, _ in sentences)
    scored = tuple(Sentence(sentence, score) for sentence, score in sentences)
    return Passage("d#0", "d", title, "", {"author": author}, text, 1.0, scored)


OUTAGE = passage(
    ("The outage of the gateway lasted 52 minutes.", 0.8),
    ("Nobody was on call.", 0.2),
    ("The gateway was restarted at 14:58.", 0.6),
)


def test_the_sentence_that_answers_comes_first() -> None:
    assert rank_evidence(QUESTION, [OUTAGE])[0].text == "The outage of the gateway lasted 52 minutes."


def test_words_of_the_question_outweigh_a_slightly_better_cosine() -> None:
    found = rank_evidence(
        "Who audited Pellworth?", [passage(("Somebody checked it.", 0.52), ("Kline did Pellworth.", 0.5))]
    )
    assert found[0].text == "Kline did Pellworth."


def test_the_author_counts_for_every_sentence_of_a_passage() -> None:
    mine = passage(("We use 256 tokens.", 0.5), author="Teodor Vaskelin")
    other = passage(("We use 900 tokens.", 0.5), author="Marit Oldershaw")
    assert rank_evidence("What does Teodor Vaskelin use?", [other, mine])[0].n == 2


def test_a_sentence_that_only_repeats_the_question_is_no_evidence() -> None:
    found = rank_evidence(
        "What did Maxime Labonne write?", [passage(("Maxime Labonne", 0.9), ("A book on merging.", 0.3))]
    )
    assert [one.text for one in found] == ["A book on merging."]


def test_only_sentences_close_to_the_best_are_quoted() -> None:
    quotes = choose_quotes(rank_evidence(QUESTION, [OUTAGE]))
    assert [one.text for one in quotes] == ["The outage of the gateway lasted 52 minutes."]
    assert quote(quotes[0]) == "\u201cThe outage of the gateway lasted 52 minutes.\u201d [1]"


def test_a_sentence_with_another_number_is_not_supported() -> None:
    evidence = rank_evidence(QUESTION, [OUTAGE])
    assert supporting_evidence("It lasted 52 minutes.", QUESTION, evidence)
    assert supporting_evidence("It lasted 47 minutes.", QUESTION, evidence) is None


def test_a_sentence_with_an_unknown_name_is_not_supported() -> None:
    evidence = rank_evidence(QUESTION, [OUTAGE])
    assert supporting_evidence("The outage lasted 52 minutes in Lisbon.", QUESTION, evidence) is None


def test_a_sentence_that_only_repeats_the_question_has_no_support() -> None:
    assert (
        supporting_evidence("The outage of the gateway did last.", QUESTION, rank_evidence(QUESTION, [OUTAGE])) is None
    )


def test_a_whole_passage_may_support_a_sentence_that_joins_two_of_its_own() -> None:
    joined = "The gateway was restarted at 14:58 after 52 minutes."
    assert is_supported(joined, QUESTION, [OUTAGE])
    assert not is_supported("The gateway was rewritten in Rust by contractors.", QUESTION, [OUTAGE])


def gated(*pieces: str) -> tuple[str, str]:
    gate = Gate(QUESTION, [OUTAGE])
    text = "".join(gate.feed(piece) for piece in pieces) + gate.finish()
    return text, gate.grounded


def test_a_supported_sentence_is_released_with_its_marker() -> None:
    assert gated("The outage las", "ted 52 min", "utes.") == ("The outage lasted 52 minutes. [1]", "model")


def test_a_supported_sentence_stands_beside_the_quote_of_better_evidence() -> None:
    twofold = passage(
        ("The outage of the gateway lasted 52 minutes.", 0.8), ("The outage of the gateway ended at 14:58.", 0.75)
    )
    gate = Gate(QUESTION, [twofold])
    text = gate.feed("It ended at 14:58. ") + gate.finish()
    assert text == "It ended at 14:58. [1] \u201cThe outage of the gateway lasted 52 minutes.\u201d [1]"
    assert gate.grounded == "mixed"


def test_a_dropped_sentence_that_nothing_replaces_leaves_the_models_words() -> None:
    text, grounded = gated("The outage lasted 52 minutes. It was caused by herons.")
    assert text == "The outage lasted 52 minutes. [1]"
    assert grounded == "model"


def test_a_wrong_marker_of_the_model_gives_way_to_the_right_one() -> None:
    assert gated("The outage lasted 52 minutes [7].")[0] == "The outage lasted 52 minutes. [1]"


def test_an_unsupported_sentence_is_replaced_by_the_best_evidence() -> None:
    text, grounded = gated("The outage lasted 47 minutes.")
    assert text == "\u201cThe outage of the gateway lasted 52 minutes.\u201d [1]"
    assert grounded == "quotes"


def test_a_sentence_is_released_before_the_next_one_is_complete() -> None:
    gate = Gate(QUESTION, [OUTAGE])
    assert gate.feed("The outage lasted 52 minutes. The next") == "The outage lasted 52 minutes. [1]"


def test_the_gate_is_full_after_two_sentences() -> None:
    gate = Gate(QUESTION, [OUTAGE])
    gate.feed("The outage lasted 52 minutes. It was long. And")
    assert gate.is_full
