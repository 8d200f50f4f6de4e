"""`cleave eval`: a set of questions measured, alone or against an earlier run."""

import asyncio
import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from app.cli.options import DEFAULT_CONFIG
from app.cli.output import FAILED, check_writable, open_console, open_progress, open_table, printable, write_json

if TYPE_CHECKING:
    from app.evaluation.comparison import Comparison
    from app.evaluation.run import Report
    from app.evaluation.service import Target
    from app.evaluation.sets import EvaluationSet

NUM_WARNINGS = 5
"""Of an evaluation, shown in the terminal."""


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="corpus.jsonl, queries.jsonl, qrels.tsv.")],
    out: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write everything to this file.")] = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", metavar="OLD.json", help="Fail if worse than this earlier --json.")
    ] = None,
    answers: Annotated[bool, typer.Option("--answers", help="Ask for answers too, and score them.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Questions of each kind, evenly spaced.")] = None,
    config: Annotated[Path, typer.Option("--config", help="The Serve config whose settings are measured.")] = (
        DEFAULT_CONFIG
    ),
    keep: Annotated[bool, typer.Option("--keep", help="Keep the ingested documents for the next run.")] = False,
    url: Annotated[
        str | None, typer.Option("--url", help="Measure this running service. Default: one in this process.")
    ] = None,
) -> None:
    """Measure what is found, and with --answers what is answered, on an evaluation set.

    Its documents go into a collection of their own, which is removed afterwards. Exit code 1: significantly worse
    than the baseline.
    """
    from app.config import load_config
    from app.evaluation.comparison import check_same_questions, compare, read_baseline
    from app.evaluation.service import in_process, over_http
    from app.evaluation.sets import read_set

    # Whatever can be wrong is found before the long work.
    settings = None if url else load_config(config).settings
    earlier = read_baseline(baseline) if baseline else None
    if out:
        check_writable(out)
    evaluation_set = read_set(folder).limited(limit)
    if earlier:
        unanswerable = [one.id for one in evaluation_set.unanswerable] if answers else []
        check_same_questions(earlier, [one.id for one in evaluation_set.questions], unanswerable)
    if settings:
        service = in_process(settings, evaluation_set.name, with_llm=answers, is_kept=keep)
    else:
        service = over_http(url or "", evaluation_set.name, is_kept=keep)
    report = asyncio.run(_measure(evaluation_set, service, answers=answers))
    # vLLM's engine stands in a reference cycle. Left to the interpreter's exit, its destructor prints a traceback.
    gc.collect()
    comparisons = compare(earlier, report.asked) if earlier else []
    if out:
        write_json(out, {**report.to_json(), "comparison": [asdict(one) for one in comparisons]})
    _print_report(report)
    _print_comparisons(comparisons, report)
    if any(one.is_loss for one in comparisons):
        raise typer.Exit(FAILED)


async def _measure(
    evaluation_set: "EvaluationSet", service: "AbstractAsyncContextManager[Target]", *, answers: bool
) -> "Report":
    from app.evaluation.run import Report, answer, ingest, search

    with open_progress() as progress:

        def stage(name: str, total: int) -> Callable[[int], None]:
            return partial(progress.advance, progress.add_task(name, total=total))

        num_questions = len(evaluation_set.questions)
        starting = progress.add_task("Starting", total=None)
        async with service as target:
            progress.remove_task(starting)
            num_documents = len(evaluation_set.document_ids)
            warnings = await ingest(target.client, evaluation_set, stage("Ingesting", num_documents))
            asked, more = await search(target.client, evaluation_set, stage("Searching", num_questions))
            warnings += more
            if answers:
                total = num_questions + len(evaluation_set.unanswerable)
                warnings += await answer(target.client, evaluation_set, asked, stage("Answering", total))
    all_warnings = [*evaluation_set.warnings, *warnings]
    return Report(evaluation_set.name, target.settings, asked, all_warnings, num_documents)


def _print_report(report: "Report") -> None:
    console, errors = open_console(), open_console(stderr=True)
    for warning in report.warnings[:NUM_WARNINGS]:
        errors.print(Text("warning  ", "yellow") + Text(printable(warning)), soft_wrap=True)
    if len(report.warnings) > NUM_WARNINGS:
        errors.print(f"{len(report.warnings)} warnings in all; --json OUT writes them.")
    figures = open_table("measure", "value")
    for name, value in report.metrics.items():
        figures.add_row(name, f"{value:.3f}")
    times = open_table("stage", "p50 ms", "p95 ms")
    for stage, quantiles in report.latency_ms.items():
        times.add_row(stage, *(f"{value:.1f}" for value in quantiles.values()))
    console.print(f"{report.name}: {report.num_documents} documents, {len(report.asked)} questions")
    for table in (figures, times):
        console.print()
        console.print(table)
    for kind, counts in report.outcomes.items():
        if counts:
            console.print(f"{kind}: {', '.join(f'{count} {name}' for name, count in counts.items())}")


def _print_comparisons(comparisons: "Sequence[Comparison]", report: "Report") -> None:
    if not comparisons:
        return
    console = open_console()
    table = open_table("measure", "before", "now", "gain, 95% within", "")
    for one in comparisons:
        verdict = Text("worse", "bold red") if one.is_loss else Text("")
        table.add_row(one.metric, f"{one.before:.3f}", f"{one.now:.3f}", f"{one.low:+.3f} to {one.high:+.3f}", verdict)
    console.print()
    console.print(table)
    texts = {one.id: one.text for one in report.asked}
    for one in comparisons:
        if one.is_loss:
            console.print(f"\nLost most in {one.metric}:")
            for id in one.worst:
                console.print(printable(f"  {id}  {texts[id]}"), soft_wrap=True)
