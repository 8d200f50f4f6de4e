"""The terminal: every verb of `cleave`.

Verbs talk to a running service over HTTP, like any other client. Results go to standard output, everything else to
standard error. What goes wrong is one line; nobody sees a traceback.
"""

import asyncio
import gc
import io
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup
from typer.exceptions import TyperException

from app.domain import Scalar
from app.errors import (
    AccessDenied,
    CleaveError,
    CollectionMismatch,
    ConfigurationError,
    InvalidRequest,
    RateLimited,
    Unavailable,
)
from app.self_query import describe

if TYPE_CHECKING:
    # Imported where it is used: httpx and what it brings would double the time of `cleave --help`.
    from app.client import Client, FoundFiles, Record
    from app.doctor import Status
    from app.evaluation.comparison import Comparison
    from app.evaluation.run import Report
    from app.evaluation.service import Target
    from app.evaluation.sets import EvaluationSet
    from app.keys import Key

FAILED, WRONG_USE, UNREACHABLE = 1, 2, 3
DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_CONFIG = Path("serve_config.yaml")
PIPED_WIDTH = 200
"""Columns of a table that goes to a file or another program."""
PASSAGE_LENGTH = 240
NUM_WARNINGS = 5
"""Of an evaluation, shown in the terminal."""
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

GROUNDED = {
    "model": "the model's words, supported by the sources",
    "mixed": "partly the model's words, supported by the sources, partly quoted",
    "quotes": "quoted from the sources",
    "refused": "the documents hold no answer",
    "flagged": "the model's words, partly not supported by the sources",
    "unchecked": "the model's words, not checked",
}
"""How an answer was made, by `rag.grounded`."""
DEGRADED = {
    "llm_unavailable": "the language model was not available",
    "llm_timeout": "the language model was too slow",
    "llm_failed": "the language model broke off",
    "history_trimmed": "the oldest messages did not fit",
    "reranking_skipped": "the passages could not be reranked in time",
    "rewriting_skipped": "the question was searched for as it is",
}
"""What an answer had to do without, by `rag.degraded`."""

FINDING_STYLES: "Mapping[Status, str]" = {"ok": "green", "warning": "yellow", "failed": "bold red"}

T = TypeVar("T")


class Commands(TyperGroup):
    """The verbs; turns every error of theirs into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb that was typed."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A terminal that knows ASCII only gets question marks, not an error.
            sys.stdout.reconfigure(errors="replace")
        try:
            return super().invoke(ctx)
        except CleaveError as error:
            _fail(error.message, _exit_code(error))
        except Exception as error:
            # Typer's own, which it prints itself, and a reader that has gone (`cleave documents | head`).
            is_expected = isinstance(error, TyperException | typer.Exit | typer.Abort | BrokenPipeError)
            if is_expected or "CLEAVE_TRACEBACK" in os.environ:
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            _fail(f"unexpected error ({reason}). Set CLEAVE_TRACEBACK=1 to see where, and report it.", FAILED)


main = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 something failed, 2 wrong use or configuration, 3 no service answers, 130 Ctrl-C.",
)
documents = typer.Typer(invoke_without_command=True, epilog="Example: cleave documents --json | jq -r '.[].id'")
main.add_typer(documents, name="documents")
keys = typer.Typer(
    no_args_is_help=True,
    help="Create, list and revoke the keys that the service takes.",
    epilog="Example: cleave keys create acme --read acme --write acme --requests-per-minute 60",
)
main.add_typer(keys, name="keys")

URL = Annotated[str, typer.Option("--url", envvar="CLEAVE_URL", help="Where the service is.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
TopK = Annotated[int | None, typer.Option("--top-k", min=1, max=50, help="Passages to find.")]
Authors = Annotated[list[str] | None, typer.Option("--author", help="Only what this author wrote; repeatable.")]
FilterOptions = Annotated[
    list[str] | None,
    typer.Option("--filter", metavar="KEY=VALUE", help="Only documents with this field; repeatable."),
]


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"cleave {version('cleave')}")
        raise typer.Exit


@main.callback()
def cleave(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Ask your own writing, with citations: start the service, feed it, ask it."""


# --- Serve -----------------------------------------------------------------------------------------------------------


@main.command(epilog="Example: cleave serve serve_config.yaml")
def serve(config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The Serve config.")] = DEFAULT_CONFIG) -> None:
    """Serve in the foreground until Ctrl-C."""
    from app.launcher import serve as launch

    raise typer.Exit(launch(config))


@main.command(epilog="Example: cleave doctor --config serve_config.yaml")
def doctor(
    config: Annotated[Path, typer.Option("--config", help="The Serve config to check.")] = DEFAULT_CONFIG,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="NAME|SIZE", help="Does the model fit this GPU? Default: the one found here."),
    ] = None,
    model_config: Annotated[
        Path | None,
        typer.Option("--model-config", metavar="FILE", help="The model's config.json, if the hub is out of reach."),
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Check installation, config, machine and running service, and say what to fix.

    `--gpu` takes a name (L4, A100-80GB) or a size (24GiB), and asks whether the model of the config fits it.
    """
    from app.doctor import examine
    from app.sizing import parse_gpu

    asked = parse_gpu(gpu) if gpu else None
    with _console(stderr=True).status("Checking ..."):
        checks = examine(
            config, lambda url: _call(url, lambda client: client.readiness()), gpu=asked, model_config=model_config
        )
        findings = list(checks)
    if as_json:
        shown = (asdict(finding) for finding in findings)
        _print_json([{key: value for key, value in one.items() if key != "numbers" or value} for one in shown])
    else:
        table = _table("", "check", "finding")
        for finding in findings:
            text = Text(_printable(finding.detail))
            if finding.fix:
                text.append(f"\n{_printable(finding.fix)}", "bold")
            table.add_row(Text(finding.status, FINDING_STYLES[finding.status]), finding.name, text)
        _console().print(table)
        counts = Counter(finding.status for finding in findings)
        _console().print(", ".join(f"{counts[status]} {status}" for status in FINDING_STYLES))
    if any(finding.status == "failed" for finding in findings):
        raise typer.Exit(FAILED)


# --- Ingest ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Summary:
    """What became of the documents of one run."""

    skipped: Sequence[Path]
    counts: Counter[str] = field(default_factory=Counter)
    failures: "list[Record]" = field(default_factory=list)
    num_chunks: int = 0
    """Written in this run: those of unchanged documents stood there before."""
    num_truncated_chunks: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, receipts: "Iterable[Record]") -> None:
        """Count receipts."""
        for receipt in receipts:
            self.counts[receipt["status"]] += 1
            if receipt["status"] == "failed":
                self.failures.append({"document_id": receipt["document_id"], "error": receipt["error"]})
            elif receipt["status"] != "unchanged":
                self.num_chunks += receipt["num_chunks"]
                self.num_truncated_chunks += receipt["num_truncated_chunks"]

    def chunks_per_second(self) -> float:
        """Tell the rate so far."""
        return self.num_chunks / max(time.monotonic() - self.started, 1e-3)

    def to_json(self) -> dict[str, Any]:
        """Give the counts and the failures under the names that scripts read."""
        return {
            **{status: self.counts[status] for status in ("created", "updated", "unchanged", "failed")},
            "chunks": self.num_chunks,
            "truncated_chunks": self.num_truncated_chunks,
            "seconds": round(time.monotonic() - self.started, 1),
            "chunks_per_second": round(self.chunks_per_second(), 1),
            "skipped": [str(path) for path in self.skipped],
            "failures": self.failures,
        }


@main.command(epilog="Example: cleave ingest notes/ report.pdf corpus.jsonl")
def ingest(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", exists=True, help="Files and folders.")],
    as_json: AsJSON = False,
    url: URL = DEFAULT_URL,
) -> None:
    """Take files and folders into the documents: md, txt, html, pdf, docx, jsonl.

    A document's id is its file's name, with the folders from the one you name downwards. Sending a file again changes
    nothing unless the file has changed. A .jsonl file holds one document a line: id, title, text, source, ...
    """
    from app.client import find_files
    from app.loaders import SUFFIXES

    found = find_files(paths)
    if not found.paths and not found.failures:
        names = ", ".join(map(str, paths))
        reason = f"only {_describe_skipped(found.skipped)}" if found.skipped else "there is no file"
        _fail(f"nothing to ingest in {names}: {reason}. Known are {', '.join(SUFFIXES)}.", WRONG_USE)
    summary = Summary(found.skipped)
    summary.add(found.failures)
    try:
        _call(url, lambda client: _send_files(client, found, summary))
    except (Unavailable, AccessDenied, RateLimited):
        # What was sent before stays sent, and running again goes on from there.
        if summary.counts:
            _print_summary(summary, as_json)
        raise
    _print_summary(summary, as_json)
    if summary.failures:
        raise typer.Exit(FAILED)


async def _send_files(client: "Client", found: "FoundFiles", summary: Summary) -> None:
    from app.client import ingest as send

    console = _console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("documents, {task.fields[chunks]} chunks, {task.fields[rate]:.0f}/s, left"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("Ingesting", total=found.count_documents(), chunks=0, rate=0.0)
        async for receipts in send(client, found.paths):
            summary.add(receipts)
            progress.update(task, advance=len(receipts), chunks=summary.num_chunks, rate=summary.chunks_per_second())


def _print_summary(summary: Summary, as_json: bool) -> None:
    numbers = summary.to_json()
    if as_json:
        _print_json(numbers)
        return
    console = _console()
    for failure in summary.failures:
        name, reason = failure["document_id"], failure["error"]
        line = reason if reason.startswith(name) else f"{name}: {reason}"
        console.print(Text("failed  ", "red") + Text(_printable(line)), soft_wrap=True)
    if summary.skipped:
        console.print(f"skipped {_describe_skipped(summary.skipped)}", soft_wrap=True)
    shown = [key for key in numbers if key not in ("skipped", "failures")]
    table = _table(*(key.replace("_", " ") for key in shown))
    table.add_row(*(str(numbers[key]) for key in shown))
    console.print(table)


def _describe_skipped(skipped: Sequence[Path]) -> str:
    """Name the kinds of skipped files, the most frequent first."""
    kinds = Counter(path.suffix.lower() or "without a suffix" for path in skipped)
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"files of unknown kinds ({counted})"


# --- Ask -------------------------------------------------------------------------------------------------------------


@main.command(epilog="Example: cleave ask 'How long did the Reading Room outage last?' --author 'Noor Hallivant'")
def ask(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question.")],
    author: Authors = None,
    filter_options: FilterOptions = None,
    top_k: TopK = None,
    raw: Annotated[bool, typer.Option("--raw", help="Ask the model alone, without documents.")] = False,
    as_json: AsJSON = False,
    url: URL = DEFAULT_URL,
) -> None:
    """Answer a question from the documents, with its sources."""
    options: dict[str, Any] = {"filters": _filters(author, filter_options), "top_k": top_k, "enabled": not raw}
    if as_json:
        _print_json(_call(url, lambda client: client.chat(question, **options)))
    else:
        _call(url, lambda client: _stream_answer(client, question, options))


async def _stream_answer(client: "Client", question: str, options: Mapping[str, Any]) -> None:
    started = time.monotonic()
    first_word_s: float | None = None
    rag: Record = {}
    usage: Record = {}
    try:
        async for chunk in client.stream_chat(question, **options):
            rag |= chunk.get("rag") or {}
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                if text := choice["delta"].get("content"):
                    first_word_s = first_word_s or time.monotonic() - started
                    typer.echo(_printable(text), nl=False)
    finally:
        if first_word_s is not None:
            typer.echo()
    _print_sources(rag)
    _print_recognised(rag)
    tokens = f"{usage.get('completion_tokens', 0)} tokens"
    times = f"{first_word_s or 0:.1f} s to the first word, {time.monotonic() - started:.1f} s in all"
    _console().print(Text(" · ".join([*_describe_answer(rag), times, tokens]), "dim"), soft_wrap=True)


def _print_sources(rag: "Record") -> None:
    console = _console()
    sources, cited = rag.get("sources", []), rag.get("cited", [])
    console.print()
    if sources:
        console.print("Sources (* cited)" if cited else "Sources, none cited", style="bold")
    for source in sources:
        mark, style = ("*", "default") if source["n"] in cited else (" ", "dim")
        details = [source["metadata"].get(key) for key in ("author", "platform", "date")]
        title = " · ".join(str(one) for one in (source["title"] or source["document_id"], *details) if one)
        place = source["url"] or source["document_id"]
        line = f"{mark} [{source['n']}] {title}\n      {place}"
        console.print(Text(_printable(line), style), soft_wrap=True)
    if sources:
        console.print()


def _print_recognised(found: "Record") -> None:
    """Say what the question was taken to ask for, since that narrows what is found."""
    if recognised := found.get("recognised_filters"):
        _console().print(Text(_printable(f"Only documents with {describe(recognised)}, named in the question."), "dim"))


def _describe_answer(rag: "Record") -> list[str]:
    grounded = str(rag.get("grounded", "unchecked"))
    said = [GROUNDED.get(grounded, grounded)]
    if unsupported := rag.get("unsupported"):
        said.append(f"{len(unsupported)} unsupported sentence{'s' if len(unsupported) > 1 else ''}")
    return said + [DEGRADED.get(reason, reason) for reason in map(str, rag.get("degraded", ()))]


# --- Search and documents --------------------------------------------------------------------------------------------


@main.command(epilog="Example: cleave search 'size of the KV cache' --top-k 3 --json")
def search(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What to find.")],
    author: Authors = None,
    filter_options: FilterOptions = None,
    top_k: TopK = None,
    as_json: AsJSON = False,
    url: URL = DEFAULT_URL,
) -> None:
    """Find passages, without an answer."""
    filters = _filters(author, filter_options)
    body = _call(url, lambda client: client.search(query, top_k=top_k, filters=filters))
    found = body["data"]
    if as_json:
        _print_json(found)
        return
    table = _table("n", "title", "passage", "documents")
    for source in found:
        passage = " ".join(source["text"].split())
        shortened = passage if len(passage) <= PASSAGE_LENGTH else f"{passage[:PASSAGE_LENGTH].rstrip()} …"
        documents = ", ".join([source["document_id"], *source.get("also_in", ())])
        table.add_row(*map(_printable, (str(source["n"]), source["title"], shortened, documents)))
    _console().print(table if found else Text(_printable(body.get("notice") or "Nothing found.")), soft_wrap=not found)
    _print_recognised(body)


@documents.callback()
def list_documents(ctx: typer.Context, as_json: AsJSON = False, url: URL = DEFAULT_URL) -> None:
    """List the documents; show or delete one."""
    ctx.obj = url
    if ctx.invoked_subcommand is None:
        found = _call(url, _all_documents)
        if as_json:
            _print_json(found)
        else:
            _print_documents(found)


SameURL = Annotated[str | None, typer.Option("--url", help="Where the service is.", show_default=False)]
DocumentId = Annotated[str, typer.Argument(metavar="ID", help="As `cleave documents` lists it.")]


@documents.command(epilog="Example: cleave documents show notes/plan.md")
def show(ctx: typer.Context, document_id: DocumentId, as_json: AsJSON = False, url: SameURL = None) -> None:
    """Show one document with its text."""
    document = _call(url or ctx.obj, lambda client: client.document(document_id))
    if as_json:
        _print_json(document)
        return
    fields = {"id": document["id"], "url": document["url"], **document["metadata"]}
    fields |= {"version": document["version"], "chunks": document["num_chunks"]}
    console = _console()
    console.print(Text(_printable(document["title"]), "bold"), soft_wrap=True)
    for key, value in fields.items():
        if value != "":
            console.print(Text(_printable(f"{key}: {value}"), "dim"), soft_wrap=True)
    console.print()
    console.print(_printable(document["text"]), soft_wrap=True)


@documents.command(epilog="Example: cleave documents delete notes/plan.md --yes")
def delete(
    ctx: typer.Context,
    document_id: DocumentId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJSON = False,
    url: SameURL = None,
) -> None:
    """Delete one document, and say how it was proved that nothing of it is found any more."""
    if not yes:
        typer.confirm(f"Delete {_printable(document_id)}?", abort=True, err=True)
    receipt = _call(url or ctx.obj, lambda client: client.delete(document_id))
    if as_json:
        _print_json(receipt)
        return
    queries = ", ".join(f"{count} by {check}" for check, count in receipt["checks"].items())
    deleted = f"Deleted {_printable(document_id)}, version {receipt['version']}, chunks: {receipt['num_chunks']}."
    proof = f"Queries that looked for them and found none: {queries}; {_moment(receipt['verified_at'], '%H:%M:%S')}."
    _console(stderr=True).print(f"{deleted} {proof}", soft_wrap=True)


async def _all_documents(client: "Client") -> "list[Record]":
    return [document async for document in client.documents()]


def _print_documents(found: "Sequence[Record]") -> None:
    table = _table("document", "title", "author", "version", "chunks", "updated")
    for document in found:
        author = str(document["metadata"].get("author", ""))
        numbers = (str(document["version"]), str(document["num_chunks"]), _moment(document["updated_at"]))
        table.add_row(*map(_printable, (document["id"], document["title"], author, *numbers)))
    _console().print(table if found else "No documents. `cleave ingest PATH` takes some in.")


def _moment(seconds: float, form: str = "%Y-%m-%d %H:%M") -> str:
    return datetime.fromtimestamp(seconds).strftime(form)


# --- Evaluate --------------------------------------------------------------------------------------------------------


@main.command("eval", epilog="Example: cleave eval sets/handbook --json new.json --baseline old.json")
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
        _check_writable(out)
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
        _write_json(out, {**report.to_json(), "comparison": [asdict(one) for one in comparisons]})
    _print_report(report)
    _print_comparisons(comparisons, report)
    if any(one.is_loss for one in comparisons):
        raise typer.Exit(FAILED)


async def _measure(
    evaluation_set: "EvaluationSet", service: "AbstractAsyncContextManager[Target]", *, answers: bool
) -> "Report":
    from app.evaluation.run import Report, answer, ingest, search

    console = _console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

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
    console, errors = _console(), _console(stderr=True)
    for warning in report.warnings[:NUM_WARNINGS]:
        errors.print(Text("warning  ", "yellow") + Text(_printable(warning)), soft_wrap=True)
    if len(report.warnings) > NUM_WARNINGS:
        errors.print(f"{len(report.warnings)} warnings in all; --json OUT writes them.")
    figures = _table("measure", "value")
    for name, value in report.metrics.items():
        figures.add_row(name, f"{value:.3f}")
    times = _table("stage", "p50 ms", "p95 ms")
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
    console = _console()
    table = _table("measure", "before", "now", "gain, 95% within", "")
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
                console.print(_printable(f"  {id}  {texts[id]}"), soft_wrap=True)


# --- Reindex ---------------------------------------------------------------------------------------------------------


@main.command(epilog="Example: cleave reindex --config serve_config.yaml")
def reindex(
    config: Annotated[Path, typer.Option("--config", help="The file with the new settings.")] = DEFAULT_CONFIG,
    collection: Annotated[
        str | None, typer.Option("--collection", metavar="NAME", help="Default: the service's own.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Swap even if the new index finds less.")] = False,
    rollback: Annotated[bool, typer.Option("--rollback", help="Go back to the index before.")] = False,
    discard: Annotated[bool, typer.Option("--discard", help="Remove the new index and the one before.")] = False,
    as_json: AsJSON = False,
    url: URL = DEFAULT_URL,
) -> None:
    """Rebuild the documents' index by the embedding and chunking of the config, without an interruption.

    The service builds the new index beside the live one. Both are asked questions made from your documents; unless
    the new one finds significantly less (exit code 1), it takes the other's place. Run again, it goes on where it was
    cut short.
    """
    if rollback and discard:
        raise InvalidRequest("--rollback and --discard: name one of them.")
    if rollback or discard:
        status = _call(
            url, lambda client: client.rollback_index() if rollback else client.discard_index(), collection=collection
        )
        report: dict[str, Any] = {"status": status, "is_swapped": rollback}
        said = f"Live is the index before, with {_model_of(status['live'])}." if rollback else "Live is the only index."
    else:
        report = _call(url, lambda client: _reindex(client, config, is_forced=force), collection=collection)
        said = _describe_reindex(report)
    if as_json:
        _print_json(report)
    else:
        _console().print(_printable(said), soft_wrap=True)
    if report.get("is_refused"):
        raise typer.Exit(FAILED)


async def _reindex(client: "Client", config: Path, *, is_forced: bool) -> dict[str, Any]:
    from dataclasses import asdict

    from app.changeover import build, compare_indexes
    from app.config import load_config
    from app.settings import IndexSettings

    settings = load_config(config).settings
    console = _console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        building = progress.add_task("Building", total=None)
        wanted = IndexSettings(embedding=settings.embedding, chunking=settings.chunking)
        async for status in build(client, wanted):
            progress.update(building, completed=status["num_done"], total=status["num_documents"])
        if status["state"] == "current":
            return {"status": status, "is_swapped": False}
        report: dict[str, Any] = {"before": status["live"]}
        if status["is_live_served"]:
            asking = progress.add_task("Comparing", total=None)
            comparisons = await compare_indexes(
                client, lambda number, total: progress.update(asking, completed=number, total=total)
            )
            report["comparison"] = {ranking: asdict(one) for ranking, one in comparisons.items()}
            if any(one.is_loss for one in comparisons.values()) and not is_forced:
                return {**report, "status": status, "is_swapped": False, "is_refused": True}
        progress.add_task("Swapping", total=None)
        return {**report, "status": await client.swap_index(), "is_swapped": True}


def _describe_reindex(report: "Mapping[str, Any]") -> str:
    lines = []
    for ranking, one in report.get("comparison", {}).items():
        lines.append(
            f"{one['num_questions']} questions from your documents, {ranking}, mean reciprocal rank of the right one: "
            f"live {one['live']:.3f}, new {one['candidate']:.3f}, gain within {one['low']:+.3f} to {one['high']:+.3f}."
        )
    if report.get("is_refused"):
        lines.append(
            "The new index finds significantly less and does not take the other's place. `cleave reindex --force` "
            "swaps all the same, `cleave reindex --discard` removes it."
        )
    elif report["is_swapped"]:
        lines.append(
            f"Live is the new index, with {_model_of(report['status']['live'])}; before it was "
            f"{_model_of(report['before'])}. `cleave reindex --rollback` goes back."
        )
    else:
        lines.append(f"The index is written with these settings already ({_model_of(report['status']['live'])}).")
    return "\n".join(lines)


def _model_of(manifest: "Mapping[str, Any]") -> str:
    return f"{manifest.get('embedding.model')}, chunks of {manifest.get('chunking.max_tokens')} tokens"


# --- Keys ------------------------------------------------------------------------------------------------------------

KeyName = Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is.")]
OfConfig = Annotated[Path, typer.Option("--config", help="The Serve config that says where the keys are.")]
OfFile = Annotated[Path | None, typer.Option("--file", help="The file of keys itself, in place of --config.")]
Collections = list[str] | None


@keys.command(epilog="Example: cleave keys create acme --read 'acme*' --write acme --requests-per-minute 60")
def create(
    name: KeyName,
    read: Annotated[
        Collections, typer.Option("--read", metavar="COLLECTION", help="May search it; repeatable; * for any letters.")
    ] = None,
    write: Annotated[
        Collections, typer.Option("--write", metavar="COLLECTION", help="May add and delete there; likewise.")
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="May do all in all collections, and reindex.")] = False,
    default_collection: Annotated[
        str | None,
        typer.Option(
            "--default-collection", metavar="NAME", help="Meant when a request names none. Default: the first named."
        ),
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option("--requests-per-minute", min=1)] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option("--tokens-per-minute", min=1, help="Of the language model, read and written.")
    ] = None,
    expires: Annotated[
        datetime | None, typer.Option("--expires", formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M"], help="In local time.")
    ] = None,
    config: OfConfig = DEFAULT_CONFIG,
    file: OfFile = None,
    as_json: AsJSON = False,
) -> None:
    """Create a key and show it, once: only a hash of it is kept. A running service takes it a second later."""
    from app.keys import create_key

    key, secret = create_key(
        _keys_path(config, file),
        name,
        read=read or (),
        write=write or (),
        default_collection=default_collection,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        expires_at=expires.astimezone() if expires else None,
        is_admin=admin,
    )
    if as_json:
        _print_json({**_key_record(key), "key": secret})
        return
    _console(stderr=True).print(
        f"The key of {name}. It is shown this once; it goes into the header `Authorization: Bearer KEY`, and for "
        "`cleave` into the environment variable CLEAVE_API_KEY:",
        soft_wrap=True,
    )
    typer.echo(secret)


@keys.command("list", epilog="Example: cleave keys list --json")
def list_keys(config: OfConfig = DEFAULT_CONFIG, file: OfFile = None, as_json: AsJSON = False) -> None:
    """List the keys: whose they are and what they may do."""
    from app.keys import read_keys

    found = read_keys(_keys_path(config, file))
    if as_json:
        _print_json([_key_record(key) for key in found])
        return
    table = _table("name", "id", "reads", "writes", "default", "requests/min", "tokens/min", "expires")
    for key in found:
        reads, writes = ("all" if key.is_admin else ", ".join(one) or "-" for one in (key.read, key.write))
        limits = (str(one or "-") for one in (key.requests_per_minute, key.tokens_per_minute))
        expires = f"{key.expires_at.astimezone():%Y-%m-%d %H:%M}{' (over)' * key.is_expired}" if key.expires_at else "-"
        table.add_row(key.name, key.id, reads, writes, key.default_collection or "-", *limits, expires)
    _console().print(table if found else "No keys: only this machine is served. `cleave keys create NAME` makes one.")


@keys.command(epilog="Example: cleave keys revoke acme")
def revoke(name: KeyName, config: OfConfig = DEFAULT_CONFIG, file: OfFile = None, as_json: AsJSON = False) -> None:
    """Revoke a key. A running service refuses it a second later."""
    from app.keys import revoke_key

    key = revoke_key(_keys_path(config, file), name)
    if as_json:
        _print_json(_key_record(key))
    else:
        _console(stderr=True).print(f"Revoked the key {name} ({key.id}).")


def _keys_path(config: Path, file: Path | None) -> Path:
    from app.config import load_config
    from app.keys import keys_path

    return file or keys_path(load_config(config).settings)


def _key_record(key: "Key") -> "Record":
    return key.model_dump(mode="json", exclude={"hash"})


# --- Shared ----------------------------------------------------------------------------------------------------------


def _call(url: str, use: "Callable[[Client], Awaitable[T]]", *, collection: str | None = None) -> T:
    """Use the service for one verb. A key is not taken from the command line, which every user of a machine can see."""
    from app.client import Client

    async def connected() -> T:
        async with Client(url, collection=collection, api_key=os.environ.get("CLEAVE_API_KEY")) as client:
            return await use(client)

    return asyncio.run(connected())


def _filters(authors: Sequence[str] | None, options: Sequence[str] | None) -> dict[str, list[Scalar]]:
    """Read the filters; values of the same field are alternatives."""
    filters: dict[str, list[Scalar]] = {"author": list(authors)} if authors else {}
    for option in options or ():
        key, equals, value = option.partition("=")
        if not key or not equals:
            raise InvalidRequest(f"--filter: {option!r} is not KEY=VALUE. Write it like --filter platform=Medium.")
        filters.setdefault(key, []).extend(_readings(value))
    return filters


def _readings(value: str) -> list[Scalar]:
    """Read a value as a text and, where it looks like one, as a number or boolean: documents may hold either."""
    try:
        other = json.loads(value, parse_constant=str)
    except ValueError:
        return [value]
    return [value, other] if isinstance(other, bool | int | float) else [value]


def _console(*, stderr: bool = False) -> Console:
    """Open a console. Text from documents is no markup, and what is piped is not wrapped to a narrow window."""
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    return console


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _printable(text: str) -> str:
    """Leave out what would steer the reader's terminal."""
    return CONTROL_CHARACTERS.sub("", text)


def _check_writable(path: Path) -> None:
    """Refuse a file that could not be written later."""
    if path.exists() and not path.is_file():
        raise InvalidRequest(f"--json: {path} is not a file. Name another.")
    try:
        with NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InvalidRequest(f"--json: {path} cannot be written ({error.strerror}). Name another.") from None


def _write_json(path: Path, value: object) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise InvalidRequest(f"--json: {path} cannot be written ({error.strerror}).") from None


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


def _exit_code(error: CleaveError) -> int:
    if isinstance(error, InvalidRequest | AccessDenied | ConfigurationError | CollectionMismatch):
        return WRONG_USE
    return UNREACHABLE if isinstance(error, Unavailable) else FAILED


def _fail(message: str, exit_code: int) -> NoReturn:
    _console(stderr=True).print(Text("cleave: ", "red") + Text(_printable(message)), soft_wrap=True)
    raise typer.Exit(exit_code)
