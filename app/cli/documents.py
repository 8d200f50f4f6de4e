"""`cleave documents`: what is there; one of them shown or deleted."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from app.cli.connection import call
from app.cli.options import DEFAULT_URL, URL, AsJSON
from app.cli.output import format_moment, open_console, open_table, print_json, printable
from app.errors import CleaveError

if TYPE_CHECKING:
    from app.client import Client, Record

SameURL = Annotated[str | None, typer.Option("--url", help="Where the service is.", show_default=False)]


def _complete_id(incomplete: str) -> list[str]:
    """Give the ids that begin so, for the shell. A service that does not answer offers none."""
    try:
        found = call(os.environ.get("CLEAVE_URL", DEFAULT_URL), _all_documents)
    except CleaveError:
        return []
    return [one["id"] for one in found if one["id"].startswith(incomplete)]


DocumentId = Annotated[
    str, typer.Argument(metavar="ID", help="As `cleave documents` lists it.", autocompletion=_complete_id)
]


def list_documents(ctx: typer.Context, as_json: AsJSON = False, url: URL = DEFAULT_URL) -> None:
    """List the documents; show or delete one."""
    ctx.obj = url
    if ctx.invoked_subcommand is None:
        found = call(url, _all_documents)
        if as_json:
            print_json(found)
        else:
            _print_documents(found)


def show(ctx: typer.Context, document_id: DocumentId, as_json: AsJSON = False, url: SameURL = None) -> None:
    """Show one document with its text."""
    document = call(url or ctx.obj, lambda client: client.document(document_id))
    if as_json:
        print_json(document)
        return
    fields = {"id": document["id"], "url": document["url"], **document["metadata"]}
    fields |= {"version": document["version"], "chunks": document["num_chunks"]}
    console = open_console()
    console.print(Text(printable(document["title"]), "bold"), soft_wrap=True)
    for key, value in fields.items():
        if value != "":
            console.print(Text(printable(f"{key}: {value}"), "dim"), soft_wrap=True)
    console.print()
    console.print(printable(document["text"]), soft_wrap=True)


def delete(
    ctx: typer.Context,
    document_id: DocumentId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJSON = False,
    url: SameURL = None,
) -> None:
    """Delete one document, and say how it was proved that nothing of it is found any more."""
    if not yes:
        typer.confirm(f"Delete {printable(document_id)}?", abort=True, err=True)
    receipt = call(url or ctx.obj, lambda client: client.delete(document_id))
    if as_json:
        print_json(receipt)
        return
    queries = ", ".join(f"{count} by {check}" for check, count in receipt["checks"].items())
    deleted = f"Deleted {printable(document_id)}, version {receipt['version']}, chunks: {receipt['num_chunks']}."
    when = format_moment(receipt["verified_at"], "%H:%M:%S")
    proof = f"Queries that looked for them and found none: {queries}; {when}."
    open_console(stderr=True).print(f"{deleted} {proof}", soft_wrap=True)


async def _all_documents(client: "Client") -> "list[Record]":
    return [document async for document in client.documents()]


def _print_documents(found: "Sequence[Record]") -> None:
    table = open_table("document", "title", "author", "version", "chunks", "updated")
    for document in found:
        author = str(document["metadata"].get("author", ""))
        numbers = (str(document["version"]), str(document["num_chunks"]), format_moment(document["updated_at"]))
        table.add_row(*map(printable, (document["id"], document["title"], author, *numbers)))
    open_console().print(table if found else "No documents. `cleave ingest PATH` takes some in.")
