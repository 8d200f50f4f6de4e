"""How an answer tells the sources it cites: the same sources and citations, written in three ways."""

import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from app.api.answers import Source
from app.citations import Citation

_MARKDOWN = re.compile(r"([\\`*_\[\]<>!#|~&])")
_IN_LINKS = "/:?#@!$&*+,;=%[]~"
"""What stays as it is in an address; the rest could end the link."""


def annotations(sources: Sequence[Source], citations: Sequence[Citation]) -> list[dict[str, Any]]:
    """OpenAI's: each marker's place in the text with the address and the title of its source."""
    return [
        {
            "url": sources[citation.n - 1].url,
            "title": sources[citation.n - 1].passage.title,
            "start_index": citation.start,
            "end_index": citation.end,
        }
        for citation in citations
    ]


def source_events(sources: Sequence[Source], citations: Sequence[Citation]) -> list[dict[str, Any]]:
    """Open WebUI's: a source per event, in order and with an id of its own, since it numbers what is new to it.

    So the list goes as far as the last source that is cited, and `[2]` in the text opens the second.
    """
    last = max((citation.n for citation in citations), default=0)
    return [
        {
            "type": "source",
            "data": {
                "source": {"id": one.passage.chunk_id, "name": one.passage.title, "url": one.url},
                "document": [one.passage.text],
                "metadata": [
                    {"source": one.passage.chunk_id, "name": one.passage.title, "source_url": one.url}
                    | {"document_id": one.passage.document_id}
                ],
                "distances": [round(one.passage.score, 6)],
            },
        }
        for one in sources[:last]
    ]


def footer(sources: Sequence[Source], citations: Sequence[Citation]) -> str:
    """Markdown at the end of the text: the cited sources with their numbers, for clients that render nothing else."""
    cited = sorted({citation.n for citation in citations})
    lines = [f"- **\\[{n}\\]** {_link(sources[n - 1])}" for n in cited]
    return "\n\n---\n" + "\n".join(lines) if lines else ""


def _link(source: Source) -> str:
    """Link to a source; its title stays text, whatever of Markdown it holds."""
    title = _MARKDOWN.sub(r"\\\1", " ".join(source.passage.title.split()) or source.passage.document_id)
    return f"[{title}]({quote(source.url, safe=_IN_LINKS, errors='replace')})"
