"""`cleave eval` on a small made-up set, with the real encoder and store; and what it says of sets that are wrong."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from app.cli import main
from app.domain import Message
from app.errors import UnreadableFile
from app.evaluation.measures import means, measure_answer, measure_rankings, percentiles
from app.evaluation.sets import EvaluationSet, Question, read_set

OWNERS = ("Ada", "Bruno", "Carla", "Dario", "Edda")
NUM_LOCKERS = 40
CODES = [f"{chr(65 + n % 7)}{chr(75 + n % 11)}-{1009 + 37 * n}" for n in range(NUM_LOCKERS)]
"""What the encoder hardly tells apart and BM25 does."""


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_set(folder: Path) -> Path:
    """Lockers that differ in their codes, questions that name a code, and some that nothing answers."""
    folder.mkdir()
    lockers = [
        {
            "id": f"locker-{n}",
            "text": f"Locker {code} stands in hall {n % 4} and holds the keys of boat {n + 300}.",
            "owner": OWNERS[n % 5],
        }
        for n, code in enumerate(CODES)
    ]
    questions = [
        {"id": f"q{n}", "text": f"Which boat has its keys in locker {code}?", "answer": f"boat {n + 300}"}
        for n, code in enumerate(CODES)
    ]
    questions[1]["filter"] = {"owner": OWNERS[1]}
    questions[2]["history"] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
    questions[3]["must_not_cite"] = ["locker-3"]
    write_lines(folder / "corpus.jsonl", lockers)
    write_lines(folder / "queries.jsonl", questions)
    write_lines(folder / "queries_unanswerable.jsonl", [{"id": "u0", "text": "Who composed the opera Aida?"}])
    judgements = "".join(f"q{n}\tlocker-{n}\t1\n" for n in range(NUM_LOCKERS))
    (folder / "qrels.tsv").write_text(judgements, encoding="utf-8")
    return folder


def write_config(path: Path, **args: Any) -> Path:
    application = {
        "name": "cleave",
        "import_path": "deployments.application:monolith",
        "args": {"llm": {"engine": "extractive"}, "data_dir": str(path.parent / "data"), **args},
    }
    path.write_text(yaml.safe_dump({"applications": [application]}), encoding="utf-8")
    return path


def evaluate(folder: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["eval", str(folder), *map(str, arguments)], env={"COLUMNS": "200"})


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def lockers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("sets") / "lockers")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "serve_config.yaml")


@pytest.fixture(scope="module")
def baseline(lockers: Path, config: Path) -> Path:
    """The report of a run with answers."""
    out = config.with_name("old.json")
    result = evaluate(lockers, "--config", config, "--answers", "--json", out)
    assert result.exit_code == 0, result.output
    return out


# --- A run -----------------------------------------------------------------------------------------------------------


def test_a_run_measures_retrieval_answers_and_time(baseline: Path) -> None:
    report = read_json(baseline)
    metrics = report["metrics"]
    assert {"recall@5", "recall@10", "hit@5", "ndcg@10", "mrr@10"} <= set(metrics)
    assert metrics["recall@5"] > 0.9
    assert metrics["answer_contained"] > 0.8
    assert metrics["forbidden_citation"] == 1
    assert metrics["refused"] == 1
    assert metrics["balanced_accuracy"] == (metrics["answered"] + 1) / 2
    for stage in ("embed", "search", "total", "answer.total"):
        assert 0 <= report["latency_ms"][stage]["p50"] <= report["latency_ms"][stage]["p95"]
    assert report["set"] == "lockers"
    assert report["counts"] == {"documents": NUM_LOCKERS, "questions": NUM_LOCKERS, "unanswerable": 1, "warnings": 0}
    assert report["settings"]["retrieval"]["sparse_weight"] == 0.35
    assert report["settings"]["answer"]["grounding"] == "gate"
    assert "api_key" not in json.dumps(report["settings"])


def test_filter_and_history_go_with_a_question(baseline: Path) -> None:
    filtered, followed_up = read_json(baseline)["per_query"][1:3]
    assert {int(id.removeprefix("locker-")) % 5 for id in filtered["ranking"]} == {1}
    assert followed_up["ranking"][0] == "locker-2"


def test_the_user_s_documents_are_left_alone(baseline: Path, config: Path) -> None:
    assert not (config.parent / "data").exists()


def test_an_unchanged_service_passes(lockers: Path, config: Path, baseline: Path) -> None:
    result = evaluate(lockers, "--config", config, "--answers", "--baseline", baseline)
    assert result.exit_code == 0, result.output
    assert "+0.000 to +0.000" in result.stdout
    assert "worse" not in result.stdout


def test_a_worse_service_fails_and_the_losers_are_named(lockers: Path, baseline: Path, tmp_path: Path) -> None:
    without_bm25 = write_config(tmp_path / "serve_config.yaml", retrieval={"sparse_weight": 0})
    out = tmp_path / "new.json"
    result = evaluate(lockers, "--config", without_bm25, "--baseline", baseline, "--json", out)
    assert result.exit_code == 1
    compared = {one["metric"]: one for one in read_json(out)["comparison"]}
    assert set(compared) == {"recall@5", "ndcg@10"}
    assert compared["ndcg@10"]["is_loss"]
    assert compared["ndcg@10"]["high"] < 0
    assert "Lost most in ndcg@10:" in result.stdout
    for id in compared["ndcg@10"]["worst"]:
        assert f"{id}  Which boat has its keys in locker {CODES[int(id[1:])]}?" in result.stdout


def test_kept_documents_are_used_again_and_follow_the_corpus(tmp_path: Path) -> None:
    folder, config = write_set(tmp_path / "lockers"), write_config(tmp_path / "serve_config.yaml")
    first = evaluate(folder, "--config", config, "--limit", "2", "--keep")
    assert first.exit_code == 0, first.output
    assert (tmp_path / "data" / "evaluation").is_dir()
    corpus = (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "corpus.jsonl").write_text("".join(corpus[:12]), encoding="utf-8")
    out = tmp_path / "out.json"
    second = evaluate(folder, "--config", config, "--limit", "12", "--keep", "--json", out)
    assert second.exit_code == 0, second.output
    found = {id for one in read_json(out)["per_query"] for id in one["ranking"]}
    assert found == {f"locker-{n}" for n in range(12)}


def test_a_running_service_is_measured_in_a_collection_of_its_own(live_service: str, lockers: Path) -> None:
    if httpx.get(f"{live_service}/v1/collections", trust_env=False, timeout=60).status_code == 404:
        pytest.skip("this service keeps one collection")
    before = httpx.get(f"{live_service}/v1/collections", trust_env=False, timeout=60).json()
    result = evaluate(lockers, "--url", live_service, "--limit", "10", "--answers")
    assert result.exit_code == 0, result.output
    assert httpx.get(f"{live_service}/v1/collections", trust_env=False, timeout=60).json() == before


# --- What is wrong is said before the long work ----------------------------------------------------------------------


def fails_at_once(folder: Path, *arguments: str | Path) -> str:
    result = evaluate(folder, *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_an_output_that_cannot_be_written_is_refused(lockers: Path, config: Path, tmp_path: Path) -> None:
    missing = fails_at_once(lockers, "--config", config, "--json", tmp_path / "no" / "out.json")
    assert "cannot be written (No such file or directory)" in missing
    assert "is not a file" in fails_at_once(lockers, "--config", config, "--json", tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"per_query": [{}]}', '{"per_query": 1}', "\udcff"])
def test_a_baseline_that_is_none_is_refused(lockers: Path, config: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "old.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    said = fails_at_once(lockers, "--config", config, "--baseline", path)
    assert "is not what `cleave eval --json` writes" in said


def test_a_baseline_over_other_questions_is_refused(lockers: Path, config: Path, baseline: Path) -> None:
    said = fails_at_once(lockers, "--config", config, "--baseline", baseline, "--limit", "10")
    assert "was measured on other questions: 30 are in only one of both runs" in said


def test_no_config_and_no_baseline_are_refused(lockers: Path, config: Path, tmp_path: Path) -> None:
    assert "there is no such file" in fails_at_once(lockers, "--config", tmp_path / "none.yaml")
    said = fails_at_once(lockers, "--config", config, "--baseline", tmp_path / "none.json")
    assert "cannot be read (No such file or directory)" in said


def test_no_service_is_exit_code_3(lockers: Path) -> None:
    result = evaluate(lockers, "--url", "http://127.0.0.1:1")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "No service answers" in result.stderr


# --- Sets ------------------------------------------------------------------------------------------------------------

LINES = {
    "corpus.jsonl": '{"id": "d1", "text": "Of tides."}\n{"id": "d2", "text": "Of lamps."}\n',
    "queries.jsonl": '{"id": "q1", "text": "Tides?"}\n{"id": "q2", "text": "Lamps?"}\n',
    "qrels.tsv": "q1\td1\t1\nq2\td2\t2\n",
}


def small_set(folder: Path, **changes: str | bytes | None) -> EvaluationSet:
    for name, content in {**LINES, **{name.replace("__", "."): content for name, content in changes.items()}}.items():
        if isinstance(content, str):
            content = content.encode()
        if content is not None:
            (folder / name).write_bytes(content)
    return read_set(folder)


def test_a_set_in_order_has_no_warnings(tmp_path: Path) -> None:
    found = small_set(tmp_path)
    assert found.document_ids == {"d1", "d2"}
    assert [question.id for question in found.questions] == ["q1", "q2"]
    assert found.judgements == {"q1": {"d1": 1}, "q2": {"d2": 2}}
    assert not found.warnings


@pytest.mark.parametrize(
    ("name", "line", "warning"),
    [
        ("corpus.jsonl", '{"id": "d1", "text": "Again."}', "repeats the id 'd1' of line 1, which is kept"),
        ("corpus.jsonl", "{", "is not valid JSON: Expecting property name enclosed in double quotes at column 2"),
        ("corpus.jsonl", '{"id": "d3"}', 'has no text in "text"'),
        ("corpus.jsonl", b"\xff", "byte 0xFF in line 1 is not UTF-8"),
        ("queries.jsonl", "nothing", "is not valid JSON: Expecting value at column 1"),
        ("queries.jsonl", "[" * 100_000, "is not valid JSON: its numbers or its brackets are out of bounds"),
        ("queries.jsonl", "[]", 'is not a JSON object {"id": ..., "text": ...}'),
        ("queries.jsonl", '{"text": "Lamps?"}', 'has no "id"'),
        ("queries.jsonl", '{"id": "q3", "text": " "}', 'has no "text"'),
        ("queries.jsonl", '{"id": "q3", "text": "a", "filter": {"a": {}}}', "filter.a: Input should be a text"),
        ("queries.jsonl", '{"id": "q3", "text": "a", "history": [{"role": "x"}]}', "history.0.role: Input should be"),
        ("queries.jsonl", '{"id": "q3", "text": "\\ud800"}', "text: Input should be a valid string"),
        ("queries.jsonl", '{"id": "q1", "text": "Again?"}', "question q1 was there before: this one is left out"),
        ("queries.jsonl", b"\xc3(", "byte 0xC3 is not UTF-8"),
        ("qrels.tsv", "q1 d1 1", "is not a question's id, a document's id and a relevance, parted by tabs"),
        ("qrels.tsv", "q1\td2\tyes", "the relevance 'yes' is not a whole number up to 10"),
        ("qrels.tsv", "q1\td2\t11", "the relevance '11' is not a whole number up to 10"),
        ("qrels.tsv", "q3\td1\t1", "there is no question q3 in queries.jsonl"),
        ("qrels.tsv", "q1\td3\t1", "there is no document d3 in corpus.jsonl"),
        ("qrels.tsv", "q1\td1\t0", "d1 was judged before for q1: the first judgement counts"),
    ],
)
def test_a_bad_line_is_left_out_with_its_place_and_reason(
    tmp_path: Path, name: str, line: str | bytes, warning: str
) -> None:
    added = line if isinstance(line, bytes) else line.encode()
    found = small_set(tmp_path, **{name.replace(".", "__"): LINES[name].encode() + b"\n" + added + b"\n"})
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith(f"{name} line 4: {warning}")
    assert (len(found.document_ids), len(found.questions)) == (2, 2)
    assert found.judgements == {"q1": {"d1": 1}, "q2": {"d2": 2}}
    assert [document.title or document.text for document in found.documents()] == ["Of tides.", "Of lamps."]


def test_a_question_without_a_relevant_document_is_left_out(tmp_path: Path) -> None:
    found = small_set(tmp_path, qrels__tsv="q1\td1\t1\nq2\td2\t-1\n")
    assert [question.id for question in found.questions] == ["q1"]
    assert found.warnings == ["queries.jsonl: question q2 has no relevant document in qrels.tsv: it is left out"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", None, "there is no corpus.jsonl. An evaluation set has corpus.jsonl, queries.jsonl and"),
        ("qrels.tsv", None, "there is no qrels.tsv."),
        ("corpus.jsonl", "", "corpus.jsonl: holds no document that can be used. It is empty."),
        ("corpus.jsonl", "Of tides.", "holds no document that can be used. The first problem: corpus.jsonl line 1"),
        ("queries.jsonl", "\n\n", "queries.jsonl: holds no question that can be used. It is empty."),
        (
            "queries.jsonl",
            LINES["queries.jsonl"].encode("utf-16"),
            "The first problem: queries.jsonl line 1: byte 0xFF",
        ),
        ("qrels.tsv", "q1\td9\t1", "qrels.tsv: holds no relevant document of any question that can be used."),
    ],
)
def test_a_set_with_nothing_to_measure_is_one_clear_error(
    tmp_path: Path, name: str, content: str | bytes | None, message: str
) -> None:
    with pytest.raises(UnreadableFile) as caught:
        small_set(tmp_path, **{name.replace(".", "__"): content})
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_a_set_that_is_no_folder_is_wrong_use(config: Path, tmp_path: Path) -> None:
    assert "there is no such folder" in fails_at_once(tmp_path / "none", "--config", config)


def test_warnings_are_shown_counted_and_written(lockers: Path, config: Path, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "lockers")
    with (folder / "qrels.tsv").open("a", encoding="utf-8") as file:
        file.writelines(f"q{n}\tlocker-x{n}\t1\n" for n in range(9))
    out = tmp_path / "out.json"
    result = evaluate(folder, "--config", config, "--limit", "1", "--json", out)
    assert result.exit_code == 0, result.output
    assert "warning  qrels.tsv line 41: there is no document locker-x0 in corpus.jsonl" in result.stderr
    assert "9 warnings in all" in result.stderr
    assert read_json(out)["counts"]["warnings"] == len(read_json(out)["warnings"]) == 9


def test_a_question_that_is_refused_counts_as_nothing_found(config: Path, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "lockers")
    with (folder / "queries.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"id": "q-colour", "text": "Which locker is red?", "filter": {"colour": "red"}}')
    with (folder / "qrels.tsv").open("a", encoding="utf-8") as file:
        file.write("q-colour\tlocker-1\t1")
    out = tmp_path / "out.json"
    result = evaluate(folder, "--config", config, "--answers", "--json", out)
    assert result.exit_code == 0, result.output
    report = read_json(out)
    asked = {one["id"]: one for one in report["per_query"]}["q-colour"]
    assert set(asked["metrics"].values()) == {0}
    assert (asked["ranking"], asked["answer"]["grounded"]) == ([], "failed")
    assert report["counts"]["warnings"] == 2
    assert "No document has the field 'colour'" in report["warnings"][0]


def test_a_limit_takes_evenly_spaced_questions(lockers: Path) -> None:
    ids = [question.id for question in read_set(lockers).limited(4).questions]
    assert ids == ["q0", "q10", "q20", "q30"]
    assert len(read_set(lockers).limited(1000).questions) == NUM_LOCKERS


def test_what_stands_in_a_question_is_read(tmp_path: Path) -> None:
    line = {
        "id": 7,
        "text": "And then?",
        "history": [{"role": "user", "content": "Tides?"}],
        "filter": {"year": 1932, "is_open": True, "author": ["Ines", "Olaf"]},
        "answer": "ebb",
        "answers": ["ebb", "low tide"],
        "must_not_cite": None,
    }
    found = small_set(tmp_path, queries__jsonl=json.dumps(line), qrels__tsv="7\td1\t1")
    filters = {"year": 1932, "is_open": True, "author": ["Ines", "Olaf"]}
    history = (Message("user", "Tides?"),)
    assert found.questions == [Question("7", "And then?", history, filters, ("ebb", "low tide"), frozenset())]
    assert [type(value) for value in found.questions[0].filters.values()] == [int, bool, list]


# --- Measures --------------------------------------------------------------------------------------------------------


def test_rankings_are_scored_by_hand_computable_measures() -> None:
    judgements = {"q": {"a": 2, "b": 1, "c": 0}, "none": {"a": 1}}
    measured = measure_rankings(judgements, {"q": ["x", "a", *"defg", "b"], "none": []})
    ideal = 3 + 1 / math.log2(3)
    assert measured["q"] == pytest.approx(
        {
            "recall@5": 1 / 2,
            "recall@10": 1,
            "hit@5": 1,
            "mrr@10": 1 / 2,
            "ndcg@10": (3 / math.log2(3) + 1 / math.log2(8)) / ideal,
        }
    )
    assert set(measured["none"].values()) == {0}


@given(st.permutations([f"d{n}" for n in range(10)]))
def test_the_order_found_decides_and_no_name(ranking: list[str]) -> None:
    [measures] = measure_rankings({"q": {"d3": 1}}, {"q": ranking}).values()
    assert measures["mrr@10"] == pytest.approx(1 / (ranking.index("d3") + 1))


def source(n: int, document_id: str, text: str) -> dict[str, Any]:
    passage = {"chunk_id": f"{document_id}#0", "title": "", "url": "", "metadata": {}, "score": 1.0}
    return {"n": n, "document_id": document_id, "text": text, **passage}


SOURCES = [source(1, "d1", "The lamp was lit in 1932 by Olaf."), source(2, "d2", "The harbour freezes each winter.")]


@pytest.fixture
def measure() -> Callable[..., Mapping[str, float]]:
    def measured(text: str, *cited: int, grounded: str = "model", relevant: Mapping[str, int] | None = None) -> Any:
        gold = ("in 1932", "The year 1932") if relevant else ()
        question = Question("q", "When was the lamp lit?", (), {}, gold, frozenset({"d2"}))
        rag = {"grounded": grounded, "sources": SOURCES, "cited": list(cited)}
        return measure_answer(question, text, rag, relevant)

    return measured


def test_an_answer_is_compared_with_the_gold_answers(measure: Callable[..., Mapping[str, float]]) -> None:
    found = measure("It was lit in 1932! [1]", 1, relevant={"d1": 1})
    assert found == {
        "answered": 1,
        "answer_contained": 1,
        "token_f1": pytest.approx(2 * 2 / (5 + 2)),
        "citation_precision": 1,
        "citation_relevance": 1,
        "forbidden_citation": 0,
    }
    assert measure("It was lit in 19321.", relevant={"d1": 1})["answer_contained"] == 0


def test_a_citation_that_does_not_say_it_is_found(measure: Callable[..., Mapping[str, float]]) -> None:
    found = measure("The lamp was lit in 1932 by Olaf. [1] Marta carried it in 1911. [2]", 1, 2, relevant={"d1": 1})
    assert found["citation_precision"] == found["citation_relevance"] == 0.5
    assert found["forbidden_citation"] == 1


def test_a_refusal_is_right_where_nothing_answers(measure: Callable[..., Mapping[str, float]]) -> None:
    refusal = "The documents do not hold an answer to this question."
    assert measure(refusal, grounded="refused")["refused"] == 1
    assert measure("In 1932. [1]", 1)["refused"] == 0
    refused = measure(refusal, grounded="refused", relevant={"d1": 1})
    assert (refused["answered"], refused["answer_contained"], refused["token_f1"]) == (0, 0, 0)


def test_means_are_over_the_questions_that_have_a_measure() -> None:
    measured = [{"answered": 1.0, "token_f1": 0.5}, {"answered": 0.0}, {"refused": 1.0}]
    assert means(measured) == {"answered": 0.5, "token_f1": 0.5, "refused": 1.0, "balanced_accuracy": 0.75}


def test_percentiles_are_per_stage() -> None:
    timings = [{"total": float(n)} for n in range(101)] + [{"late": 3.0}]
    assert percentiles(timings) == {"total": {"p50": 50, "p95": 95}, "late": {"p50": 3, "p95": 3}}
