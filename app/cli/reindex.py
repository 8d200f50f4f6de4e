"""`cleave reindex`: the index rebuilt by new settings, compared, and swapped."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.connection import call
from app.cli.options import DEFAULT_CONFIG, DEFAULT_URL, URL, AsJSON
from app.cli.output import FAILED, open_console, open_progress, print_json, printable
from app.errors import InvalidRequest

if TYPE_CHECKING:
    from app.client import Client


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
        status = call(
            url, lambda client: client.rollback_index() if rollback else client.discard_index(), collection=collection
        )
        report: dict[str, Any] = {"status": status, "is_swapped": rollback}
        said = f"Live is the index before, with {_model_of(status['live'])}." if rollback else "Live is the only index."
    else:
        report = call(url, lambda client: _reindex(client, config, is_forced=force), collection=collection)
        said = _describe_reindex(report)
    if as_json:
        print_json(report)
    else:
        open_console().print(printable(said), soft_wrap=True)
    if report.get("is_refused"):
        raise typer.Exit(FAILED)


async def _reindex(client: "Client", config: Path, *, is_forced: bool) -> dict[str, Any]:
    from dataclasses import asdict

    from app.changeover import build, compare_indexes
    from app.config import load_config
    from app.settings import IndexSettings

    settings = load_config(config).settings
    with open_progress() as progress:
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
