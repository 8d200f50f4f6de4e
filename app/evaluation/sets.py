"""Evaluation sets: documents, questions, and which documents answer them.

A set is a folder. What is wrong in a line leaves that line out, with a warning that names it; what leaves nothing to
measure is an error.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, Field, ValidationError

from app.api.schemas import Name, Text, Wanted, WireMessage
from app.domain import Document, Filters, Message
from app.errors import UnreadableFile
from app.loaders import iterate_jsonl

CORPUS, QUESTIONS, JUDGEMENTS = "corpus.jsonl", "queries.jsonl", "qrels.tsv"
UNANSWERABLE = "queries_unanswerable.jsonl"
MAX_RELEVANCE = 10
"""A relevance of 10 gains 1023 times as much as one of 1; more is a mistake, such as a score."""

Judgements = Mapping[str, Mapping[str, int]]
"""Relevance per question id and document id; 0 is not relevant."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Question:
    """One question. Earlier messages of its conversation stand in `history`, the question itself does not."""

    id: str
    text: str
    history: tuple[Message, ...]
    filters: Filters
    gold_answers: tuple[str, ...]
    must_not_cite: frozenset[str]


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """A set that can be measured. Each of `questions` has a relevant document; `unanswerable` has none by design."""

    corpus: Path
    document_ids: frozenset[str]
    questions: Sequence[Question]
    unanswerable: Sequence[Question]
    judgements: Judgements
    warnings: Sequence[str]

    @property
    def name(self) -> str:
        """Give the folder's name."""
        return self.corpus.parent.resolve().name

    def documents(self) -> Iterator[Document]:
        """Read the documents, the first under each id; they are never in memory all at once."""
        return _read_documents(self.corpus, [])

    def limited(self, limit: int | None) -> "EvaluationSet":
        """Keep so many evenly spaced questions of each kind."""
        if limit is None:
            return self
        return replace(self, questions=_spaced(self.questions, limit), unanswerable=_spaced(self.unanswerable, limit))


def read_set(folder: Path) -> EvaluationSet:
    """Read and check a set.

    Raises:
        UnreadableFile: a file is missing or cannot be read, or nothing is left to measure.
    """
    _check_files(folder)
    warnings: list[str] = []
    ids = frozenset(document.id for document in _read_documents(folder / CORPUS, warnings))
    _require(ids, folder / CORPUS, "no document", warnings)
    taken: set[str] = set()
    questions = list(_read_questions(folder / QUESTIONS, taken, warnings))
    _require(questions, folder / QUESTIONS, "no question", warnings)
    judgements = _read_judgements(folder / JUDGEMENTS, {one.id for one in questions}, ids, warnings)
    kept = {one.id: judgements[one.id] for one in questions if any(judgements.get(one.id, {}).values())}
    _require(kept, folder / JUDGEMENTS, "no relevant document of any question", warnings)
    left_out = [one.id for one in questions if one.id not in kept]
    warnings += [
        f"{QUESTIONS}: question {id} has no relevant document in {JUDGEMENTS}: it is left out" for id in left_out
    ]
    judged = [one for one in questions if one.id in kept]
    path = folder / UNANSWERABLE
    unanswerable = list(_read_questions(path, taken, warnings)) if path.exists() else []
    return EvaluationSet(folder / CORPUS, ids, judged, unanswerable, kept, warnings)


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise UnreadableFile(f"{folder}: there is no such folder. Name one that holds {CORPUS}.")
    missing = [name for name in (CORPUS, QUESTIONS, JUDGEMENTS) if not (folder / name).is_file()]
    if missing:
        raise UnreadableFile(
            f"{folder}: there is no {missing[0]}. An evaluation set has {CORPUS}, {QUESTIONS} and {JUDGEMENTS}."
        )


def _require(found: Iterable[object], path: Path, what: str, warnings: Sequence[str]) -> None:
    if not any(True for _ in found):
        own = [warning for warning in warnings if warning.startswith(path.name)]
        reason = f" The first problem: {own[0]}." if own else " It is empty."
        raise UnreadableFile(f"{path}: holds {what} that can be used.{reason}")


def _spaced(items: Sequence[T], limit: int) -> Sequence[T]:
    wanted = min(limit, len(items))
    return [items[place * len(items) // wanted] for place in range(wanted)]


# --- Lines -----------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise UnreadableFile(f"{path}: cannot be read ({error.strerror}).") from None


def _texts(path: Path, warnings: list[str]) -> Iterator[tuple[str, str]]:
    """Give each line that is not empty, with its name."""
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path.name} line {number}"
        try:
            text = line.removeprefix(codecs.BOM_UTF8).decode().strip()
        except UnicodeDecodeError as error:
            warnings.append(f"{where}: byte 0x{line[error.start]:02X} is not UTF-8")
            continue
        if text:
            yield where, text


def _read_documents(path: Path, warnings: list[str]) -> Iterator[Document]:
    for document in iterate_jsonl(_lines(path), name=path.name):
        if isinstance(document, UnreadableFile):
            warnings.append(document.message)
        else:
            yield document


class _QuestionLine(BaseModel):
    """A line of questions, within the limits of the API; keys that are not known are for people."""

    id: Annotated[Name, Field(pattern=r"\S")] | int
    text: Annotated[Text, Field(pattern=r"\w")]
    history: list[WireMessage] = []
    filter: dict[Name, Wanted] = {}
    answer: Text = ""
    answers: list[Text] = []
    must_not_cite: list[Name] = []

    def to_question(self) -> Question:
        return Question(
            str(self.id),
            self.text,
            tuple(turn.to_domain() for turn in self.history),
            self.filter,
            tuple(filter(None, self.answers or [self.answer])),
            frozenset(self.must_not_cite),
        )


def _read_questions(path: Path, taken: set[str], warnings: list[str]) -> Iterator[Question]:
    for where, text in _texts(path, warnings):
        try:
            question = _parse_question(text)
        except UnreadableFile as error:
            warnings.append(f"{where}: {error.message}")
            continue
        if question.id in taken:
            warnings.append(f"{where}: question {question.id} was there before: this one is left out")
            continue
        taken.add(question.id)
        yield question


def _parse_question(text: str) -> Question:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise UnreadableFile(f"is not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError):
        raise UnreadableFile("is not valid JSON: its numbers or its brackets are out of bounds") from None
    if not isinstance(record, dict):
        raise UnreadableFile('is not a JSON object {"id": ..., "text": ...}')
    try:
        line = _QuestionLine.model_validate({key: value for key, value in record.items() if value is not None})
    except ValidationError as error:
        raise UnreadableFile(_explain(error)) from None
    return line.to_question()


def _explain(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] in ("missing", "string_pattern_mismatch"):
        return f'has no "{problem["loc"][0]}"'
    return f"{key}: {problem['msg']}"


def _read_judgements(
    path: Path, question_ids: set[str], document_ids: frozenset[str], warnings: list[str]
) -> dict[str, dict[str, int]]:
    judgements: dict[str, dict[str, int]] = {}
    for where, text in _texts(path, warnings):
        fields = text.split("\t")
        if len(fields) != 3:
            warnings.append(f"{where}: is not a question's id, a document's id and a relevance, parted by tabs")
            continue
        question_id, document_id, relevance = (field.strip() for field in fields)
        if not re.fullmatch(r"-?\d{1,3}", relevance) or int(relevance) > MAX_RELEVANCE:
            warnings.append(f"{where}: the relevance {relevance!r} is not a whole number up to {MAX_RELEVANCE}")
        elif question_id not in question_ids:
            warnings.append(f"{where}: there is no question {question_id} in {QUESTIONS}")
        elif document_id not in document_ids:
            warnings.append(f"{where}: there is no document {document_id} in {CORPUS}")
        elif document_id in judgements.get(question_id, {}):
            warnings.append(f"{where}: {document_id} was judged before for {question_id}: the first judgement counts")
        else:
            judgements.setdefault(question_id, {})[document_id] = max(0, int(relevance))
    return judgements
