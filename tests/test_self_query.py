"""Which authors and values a question is taken to name. The people are invented."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import Filters, Scalar
from app.self_query import MetadataIndex, Recognition, describe

VALUES: dict[str, list[Scalar]] = {
    "author": [
        "Michael Lynch",
        "Renée Dubois-Martín",
        "Max Power",
        "Anna Maria Rossi",
        "Maria Rossi",
        "Simon Vale",
        "Simon Okafor",
        "Will Larkin",
        "Ludwig van der Berg",
        "teodora",
        "Roe, Jane",
        "Ingrid K. Solheim",
        "Harbour Bank",
        "Lumina",
        "Jane Roe and John Doe",
    ],
    "domain": ["cloud", "govt"],
    "platform": ["medium.example", "wiki.lanternfish.example", "Medium", "Lanternfish Platform Wiki"],
    "tags": ["rust", "rust, go", "python", "machine learning"],
    "language": ["english"],
    "kind": ["post", "note"],
    "year": [2024, 2025],
    "draft": [True],
}
INDEX = MetadataIndex(VALUES)
PIECES = st.sampled_from("Michael Lynch 's ' _ . - by not author: tagged rust or medium.example e\u0301 ?".split())
LYNCH: Filters = {"author": "Michael Lynch"}
DUBOIS: Filters = {"author": "Renée Dubois-Martín"}
ROSSI_OR_LYNCH: Filters = {"author": ["Maria Rossi", "Michael Lynch"]}


def recognised(question: str) -> Filters:
    return INDEX.recognise(question, {}).filters


@pytest.mark.parametrize(
    "question",
    [
        "What did Michael Lynch write about Go?",
        "what did michael lynch write about go",
        "michael lynch's view of go",
        "Michael Lynch on testing",
        "Give me all notes by Lynch on testing.",
        "According to Lynch, how should one test?",
        "How did Lynch find the leak?",
        "What is Lynch's advice on hiring?",
        "What is Lynch\u2019s advice on hiring?",
        "Does Michael recommend tests?",
        "Dr. Lynch said what about Go?",
        "Didn't Michael Lynch write about this?",
        "Tell me about Michael Lynch's blog.",
        "author: Lynch, tests",
    ],
)
def test_an_author_is_recognised_however_the_question_names_him(question: str) -> None:
    assert recognised(question) == LYNCH


@pytest.mark.parametrize(
    "question",
    [
        "What does Renée Dubois-Martín recommend?",
        "What does Renee Dubois-Martin recommend?",
        "What is RENÉE DUBOIS-MARTÍN's opinion?",
        "Rene\u0301e Dubois Marti\u0301n's notes on tests",
    ],
)
def test_accents_case_and_hyphens_make_no_difference(question: str) -> None:
    assert recognised(question) == DUBOIS


@pytest.mark.parametrize(
    "question",
    [
        "What does David Lynch think of coffee?",
        "What is the Lynch Foundation?",
        "What is Lynch syndrome?",
        "Did Lynch Motors recall cars?",
        "How was Michael Jordan trained?",
        "What is the max power of the engine?",
        "Max power of the engine?",
        "What Is The Max Power Of An Engine Today",
        "Will the cache be freed by Friday?",
        "What did Simon say about caches?",
        "When did Ludwig issue the edict?",
        "When did Lumina buy the mill?",
        "What is the Harbour Bank?",
        "Where is a branch of the Harbour Bank?",
        "What does Peter Michael Lynch think?",
    ],
)
def test_words_of_a_name_that_mean_something_else_are_no_author(question: str) -> None:
    assert recognised(question) == {}


@pytest.mark.parametrize(
    "question",
    [
        "Who is Michael Lynch?",
        "What has been written about Michael Lynch?",
        "Posts not by Michael Lynch about testing",
        "Everything about testing except by Michael Lynch or Maria Rossi",
        "Who other than Michael Lynch wrote about Go?",
        "What do people apart from Lynch say?",
        "which posts are not tagged rust?",
    ],
)
def test_who_is_excluded_or_written_about_is_no_filter(question: str) -> None:
    assert recognised(question) == {}


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What did Maria Rossi and Michael Lynch write about tests?", ROSSI_OR_LYNCH),
        ("Compare Michael Lynch and Maria Rossi on hiring.", ROSSI_OR_LYNCH),
        ("Is it by Maria Rossi or by Lynch?", ROSSI_OR_LYNCH),
        ("What did Maria Rossi write about Michael Lynch?", {"author": "Maria Rossi"}),
        ("Posts by Maria Rossi, not by Michael Lynch", {"author": "Maria Rossi"}),
        ("What did Anna Maria Rossi say?", {"author": "Anna Maria Rossi"}),
        ("What did Jane Roe write?", {"author": ["Jane Roe and John Doe", "Roe, Jane"]}),
        ("What does Doe think of it?", {"author": "Jane Roe and John Doe"}),
        ("Did Ludwig van der Berg use SQLite?", {"author": "Ludwig van der Berg"}),
        ("how does teodora explain caches?", {"author": "teodora"}),
        ("What does Ingrid Solheim recommend?", {"author": "Ingrid K. Solheim"}),
        ("What does Ingrid K. Solheim recommend?", {"author": "Ingrid K. Solheim"}),
        ("Where did Solheim live?", {"author": "Ingrid K. Solheim"}),
        ("According to the Harbour Bank, what is a bond?", {"author": "Harbour Bank"}),
        ("What does Lumina recommend?", {"author": "Lumina"}),
        ("What did Will recommend?", {"author": "Will Larkin"}),
    ],
)
def test_several_people(question: str, expected: Filters) -> None:
    assert recognised(question) == expected


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What was posted on platform medium.example?", {"platform": "medium.example"}),
        ("Which posts from wiki.lanternfish.example cover tides?", {"platform": "wiki.lanternfish.example"}),
        ("What does medium.example say about tides?", {"platform": "medium.example"}),
        ("What does the Lanternfish Platform Wiki say about outages?", {"platform": "Lanternfish Platform Wiki"}),
        ("Articles on Medium about tests", {"platform": "Medium"}),
        ("posts tagged rust", {"tags": ["rust", "rust, go"]}),
        ("posts tagged with rust or python", {"tags": ["python", "rust", "rust, go"]}),
        ("What is storage? domain: cloud", {"domain": "cloud"}),
        ("articles in the domain cloud about storage", {"domain": "cloud"}),
        ("notes by Lynch tagged python", {"author": "Michael Lynch", "tags": "python"}),
    ],
)
def test_other_values_need_their_field_or_a_telling_preposition(question: str, expected: Filters) -> None:
    assert recognised(question) == expected


@pytest.mark.parametrize(
    "question",
    [
        "what is cloud storage",
        "What is the domain name of the cloud?",
        "How do I write a note in Rust?",
        "What is machine learning?",
        "Which language is used in the english lessons?",
        "Fry it on Medium heat.",
        "How do I parse medium.example.org?",
        "Write to someone@medium.example.",
        "What happened in the year 2024?",
        "Is the draft true?",
    ],
)
def test_a_common_word_is_never_a_filter(question: str) -> None:
    assert recognised(question) == {}


def test_a_field_that_the_request_filters_is_left_alone() -> None:
    found = INDEX.recognise("What did Lynch write? platform: Medium", {"author": "Maria Rossi"})
    assert (found.filters, found.rest) == ({"platform": "Medium"}, "What did Lynch write? platform: Medium")


@pytest.mark.parametrize(
    ("question", "rest"),
    [
        ("What did Michael Lynch write about Go?", "What did write about Go?"),
        ("What is Lynch\u2019s advice on hiring?", "What is advice on hiring?"),
        ("What did Maria Rossi and Michael Lynch write?", "What did and write?"),
        ("What did Maria Rossi write about Michael Lynch?", "What did write about Michael Lynch?"),
        ("posts tagged rust", "posts tagged rust"),
        ("Michael Lynch", "Michael Lynch"),
    ],
)
def test_the_name_of_an_author_who_is_filtered_by_is_not_searched_for(question: str, rest: str) -> None:
    assert INDEX.recognise(question, {}).rest == rest


def test_nor_is_it_when_the_request_names_the_same_author() -> None:
    found = INDEX.recognise("What did Michael Lynch write about Go?", {"author": ["Michael Lynch", "Max Power"]})
    assert (found.filters, found.rest) == ({}, "What did write about Go?")


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What else did he write?", LYNCH),
        ("And about Rust?", LYNCH),
        ("What about tests?", LYNCH),
        ("What did Maria Rossi write about it?", {"author": "Maria Rossi"}),
        ("And Maria Rossi's view?", {"author": "Maria Rossi"}),
        ("How large is a crate?", {}),
    ],
)
def test_a_question_that_refers_back_keeps_the_author_of_the_one_before(question: str, expected: Filters) -> None:
    assert INDEX.recognise(question, {}, "What did Lynch write about Go, tagged rust?").filters == expected


@pytest.mark.parametrize("question", ["", "?", "author", "tagged", "by", "not", "Lynch", "'s", "platform:", "a\u0301"])
def test_a_question_of_almost_nothing_is_read_without_harm(question: str) -> None:
    assert recognised(question) == {}


@pytest.mark.parametrize(
    ("filters", "recognised", "expected"),
    [
        ({"author": "Micheal Lynch"}, {}, 'none has author "Micheal Lynch". Did you mean "Michael Lynch"?'),
        ({"author": "lynch"}, {}, 'none has author "lynch". Did you mean "Michael Lynch"?'),
        ({"year": "2024"}, {}, 'none has year "2024". Did you mean 2024 or 2025?'),
        ({"draft": 1}, {}, "none has draft 1."),
        ({"author": ["Zoe", "Yara"]}, {}, 'none has author "Zoe" or "Yara".'),
        ({"author": []}, {}, "none has author no value."),
        ({"author": "Max Power", "tags": "rust"}, {}, 'none has author "Max Power" and tags "rust".'),
        (
            {"tags": "rust", "author": "Max Power"},
            {"author": "Max Power"},
            'none has tags "rust" and author "Max Power". (The question names author "Max Power".)',
        ),
    ],
)
def test_filters_that_match_nothing_are_explained(filters: Filters, recognised: Filters, expected: str) -> None:
    assert INDEX.explain(filters, recognised) == f"No document matches the filters: {expected}"


def test_of_many_and_long_values_a_message_names_some_in_part() -> None:
    many: Filters = {"author": [f"Nobody {n}" for n in range(1000)]}
    long: Filters = {"author": "word " * 400_000}
    assert INDEX.explain(many, {}).endswith('or "Nobody 7" or 992 others.')
    assert len(INDEX.explain(long, {})) < 300


def test_filters_are_described_for_a_reader() -> None:
    assert describe({"author": ["Ann", "Bo"], "year": 2024}) == 'author "Ann" or "Bo" and year 2024'


@given(st.lists(PIECES, min_size=1))
def test_whatever_the_question_only_values_that_are_held_are_recognised(pieces: list[str]) -> None:
    for question in (" ".join(pieces), "".join(pieces)):
        found = INDEX.recognise(question, {}, question)
        assert found.rest
        for field, wanted in found.filters.items():
            assert set(wanted if isinstance(wanted, list) else [wanted]) <= set(VALUES[field])


def test_names_in_a_pasted_text_are_no_filter() -> None:
    question = "Summarise this. " + "Michael Lynch wrote it. " * 100
    assert INDEX.recognise(question, {}) == Recognition({}, question)


def test_thousands_of_values_are_recognised_as_well() -> None:
    authors = [f"Given{number} Family{number}" for number in range(20_000)]
    index = MetadataIndex({"author": authors, "path": [f"posts/{number}.md" for number in range(20_000)]})
    assert index.recognise("What did Family19999 recommend?", {}).filters == {"author": "Given19999 Family19999"}
