"""The gate: is this run worse than an earlier one, beyond what chance among the questions explains?"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from app.errors import InvalidRequest, UnreadableFile
from app.evaluation.measures import Measures
from app.evaluation.run import Asked
from app.significance import interval, mean_of_means

GATED: Mapping[str, Sequence[str]] = {
    "recall@5": ["recall@5"],
    "ndcg@10": ["ndcg@10"],
    "answer_contained": ["answer_contained"],
    "token_f1": ["token_f1"],
    "citation_precision": ["citation_precision"],
    "balanced_accuracy": ["answered", "refused"],
    "forbidden_citation": ["forbidden_citation"],
}
"""What must not get worse, each the mean of the means of these values per question."""
LOWER_IS_BETTER = {"forbidden_citation"}
NUM_EXAMPLES = 5

Pairs: TypeAlias = dict[str, tuple[float, float]]
"""A measure before and now, by question id."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """An earlier run: the measures by question id, of both kinds of question."""

    path: Path
    answerable: Mapping[str, Measures]
    unanswerable: Mapping[str, Measures]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure, before and now; the gain lies in [low, high] with 95% confidence."""

    metric: str
    before: float
    now: float
    low: float
    high: float
    num_questions: int
    is_loss: bool
    """The whole interval is on the worse side of 0."""
    worst: Sequence[str]
    """Ids of the questions that lost most, if it is a loss."""


def read_baseline(path: Path) -> Baseline:
    """Read what an earlier run wrote with --json. Raises `UnreadableFile`."""
    measured: dict[bool, dict[str, Measures]] = {True: {}, False: {}}
    try:
        for one in json.loads(path.read_text(encoding="utf-8"))["per_query"]:
            values = {name: float(value) for name, value in one["metrics"].items()}
            measured[bool(one["is_answerable"])][str(one["id"])] = values
    except OSError as error:
        raise UnreadableFile(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UnreadableFile(f"{path}: is not what `cleave eval --json` writes. Measure the baseline again.") from None
    return Baseline(path, measured[True], measured[False])


def check_same_questions(baseline: Baseline, answerable: Collection[str], unanswerable: Collection[str]) -> None:
    """Refuse to compare runs over different questions. Raises `InvalidRequest`."""
    different = set(baseline.answerable) ^ set(answerable)
    # Only a run with answers asks the unanswerable ones.
    if baseline.unanswerable and unanswerable:
        different |= set(baseline.unanswerable) ^ set(unanswerable)
    if different:
        raise InvalidRequest(
            f"{baseline.path} was measured on other questions: {len(different)} are in only one of both runs, such as "
            f"{min(different)}. Use the same set and the same --limit, or measure the baseline again."
        )


def compare(baseline: Baseline, asked: Iterable[Asked]) -> list[Comparison]:
    """Pair the questions and tell for each gated figure whether it got worse, by a bootstrap over the questions."""
    now = {one.id: one.metrics for one in asked}
    before = {**baseline.answerable, **baseline.unanswerable}
    comparisons = []
    for metric, measures in GATED.items():
        pairs = [_pairs(before, now, measure) for measure in measures]
        if all(len(paired) > 1 for paired in pairs):
            comparisons.append(_compare(metric, pairs))
    return comparisons


def _pairs(before: Mapping[str, Measures], now: Mapping[str, Measures], measure: str) -> Pairs:
    return {
        id: (before[id][measure], now[id][measure])
        for id in before.keys() & now.keys()
        if measure in before[id] and measure in now[id]
    }


def _compare(metric: str, pairs: Sequence[Pairs]) -> Comparison:
    sign = -1 if metric in LOWER_IS_BETTER else 1
    # In one order, so that the same two runs always give the same interval.
    values = [np.array([paired[id] for id in sorted(paired)]) for paired in pairs]
    low, high = interval(*(one[:, 1] - one[:, 0] for one in values))
    before, now = (mean_of_means(*(one[:, column] for one in values)) for column in (0, 1))
    is_loss = bool(max(sign * low, sign * high) < 0)
    drops = {id: sign * (after - earlier) for paired in pairs for id, (earlier, after) in paired.items()}
    worst = sorted((id for id in drops if drops[id] < 0), key=lambda id: (drops[id], id))[:NUM_EXAMPLES]
    return Comparison(
        metric,
        float(before),
        float(now),
        low,
        high,
        sum(map(len, pairs)),
        is_loss,
        worst if is_loss else [],
    )
