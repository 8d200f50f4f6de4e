"""`cleave search`: passages without an answer."""

from typing import Annotated

import typer
from rich.text import Text

from app.cli.connection import call
from app.cli.options import DEFAULT_URL, URL, AsJSON, Authors, FilterOptions, TopK, read_filters
from app.cli.output import open_console, open_table, print_json, print_recognised, printable

PASSAGE_LENGTH = 240


def search(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What to find.")],
    author: Authors = None,
    filter_options: FilterOptions = None,
    top_k: TopK = None,
    as_json: AsJSON = False,
    url: URL = DEFAULT_URL,
) -> None:
    """Find passages, without an answer."""
    filters = read_filters(author, filter_options)
    body = call(url, lambda client: client.search(query, top_k=top_k, filters=filters))
    found = body["data"]
    if as_json:
        print_json(found)
        return
    table = open_table("n", "title", "passage", "documents")
    for source in found:
        passage = " ".join(source["text"].split())
        shortened = passage if len(passage) <= PASSAGE_LENGTH else f"{passage[:PASSAGE_LENGTH].rstrip()} …"
        documents = ", ".join([source["document_id"], *source.get("also_in", ())])
        table.add_row(*map(printable, (str(source["n"]), source["title"], shortened, documents)))
    open_console().print(
        table if found else Text(printable(body.get("notice") or "Nothing found.")), soft_wrap=not found
    )
    print_recognised(body)
