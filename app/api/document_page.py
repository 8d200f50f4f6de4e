"""A document as a page for people: its text with an anchor per chunk, where citations lead."""

from collections.abc import Sequence
from html import escape
from string import Template

from app.domain import Chunk, StoredDocument

PAGE = Template(
    """<!doctype html>
<html lang="">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
<title>$title</title>
<link rel="icon" href="/web/icon.svg">
<link rel="stylesheet" href="/web/colours.css">
<link rel="stylesheet" href="/web/document.css">
</head>
<body>
<main>
<h1 dir="auto">$title</h1>
<dl>
$facts
</dl>
<article dir="auto">$text</article>
</main>
</body>
</html>
"""
)


def document_page(stored: StoredDocument, text: str, chunks: Sequence[Chunk]) -> str:
    """Write the page. Nothing of a document becomes markup, and the page has no script."""
    facts = {"id": stored.id, "version": stored.version, **stored.metadata}
    rows = [_row(name, escape(str(value))) for name, value in facts.items()]
    if stored.url.startswith(("http://", "https://")):
        address = escape(stored.url)
        rows.insert(0, _row("address", f'<a href="{address}" rel="noreferrer nofollow">{address}</a>'))
    title = escape(stored.title or stored.id)
    return PAGE.substitute(title=title, facts="\n".join(rows), text=_marked(text, chunks))


def _row(name: str, value: str) -> str:
    return f'<div><dt>{escape(name)}</dt><dd dir="auto">{value}</dd></div>'


def _marked(text: str, chunks: Sequence[Chunk]) -> str:
    """Put the text of each chunk into an element that bears its index, and leave every character as it is."""
    pieces = []
    position = 0
    for chunk in chunks:
        pieces.append(escape(text[position : chunk.start]))
        pieces.append(f'<span id="{chunk.index}">{escape(text[chunk.start : chunk.end])}</span>')
        position = chunk.end
    return "".join([*pieces, escape(text[position:])])
