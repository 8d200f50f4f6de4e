"""`cleave ingest`: files and folders into the documents, with progress."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import TextColumn
from rich.text import Text

from app.cli.connection import call
from app.cli.options import DEFAULT_URL, URL, AsJSON
from app.cli.output import FAILED, WRONG_USE, fail, open_console, open_progress, open_table, print_json, printable
from app.errors import AccessDenied, RateLimited, Unavailable

if TYPE_CHECKING:
    from app.client import Client, FoundFiles, Record


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
        fail(f"nothing to ingest in {names}: {reason}. Known are {', '.join(SUFFIXES)}.", WRONG_USE)
    summary = Summary(found.skipped)
    summary.add(found.failures)
    try:
        call(url, lambda client: _send_files(client, found, summary))
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

    rate = TextColumn("documents, {task.fields[chunks]} chunks, {task.fields[rate]:.0f}/s, left")
    with open_progress(rate) as progress:
        task = progress.add_task("Ingesting", total=found.count_documents(), chunks=0, rate=0.0)
        async for receipts in send(client, found.paths):
            summary.add(receipts)
            progress.update(task, advance=len(receipts), chunks=summary.num_chunks, rate=summary.chunks_per_second())


def _print_summary(summary: Summary, as_json: bool) -> None:
    numbers = summary.to_json()
    if as_json:
        print_json(numbers)
        return
    console = open_console()
    for failure in summary.failures:
        name, reason = failure["document_id"], failure["error"]
        line = reason if reason.startswith(name) else f"{name}: {reason}"
        console.print(Text("failed  ", "red") + Text(printable(line)), soft_wrap=True)
    if summary.skipped:
        console.print(f"skipped {_describe_skipped(summary.skipped)}", soft_wrap=True)
    shown = [key for key in numbers if key not in ("skipped", "failures")]
    table = open_table(*(key.replace("_", " ") for key in shown))
    table.add_row(*(str(numbers[key]) for key in shown))
    console.print(table)


def _describe_skipped(skipped: Sequence[Path]) -> str:
    """Name the kinds of skipped files, the most frequent first."""
    kinds = Counter(path.suffix.lower() or "without a suffix" for path in skipped)
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"files of unknown kinds ({counted})"
