"""What clients see of an answer besides its text: the `rag` object, the sources and the citations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from app.chat import AnswerEnd, AnswerStart
from app.citations import Citation
from app.domain import Passage, Refusal
from app.telemetry import request_id


@dataclass(frozen=True, slots=True)
class Source:
    """A passage that was found, with the number that markers name it by and an address that resolves."""

    n: int
    passage: Passage
    url: str


class AnswerRecord:
    """Collects what the first and the last event say."""

    def __init__(self, *, base_url: str, collection: str | None = None) -> None:
        self._base_url = base_url.rstrip("/")
        self._collection = collection
        self.sources: Sequence[Source] = ()
        self.citations: Sequence[Citation] = ()
        self.rag: dict[str, Any] = {}

    def start(self, event: AnswerStart) -> dict[str, Any]:
        """Give the `rag` object of the beginning."""
        self.sources = [Source(n, one, self._url(one)) for n, one in enumerate(event.sources, start=1)]
        self.rag = {
            "request_id": request_id.get(),
            "sources": [{"n": one.n, **source(one.passage)} for one in self.sources],
            "rewritten_query": event.query,
            "recognised_filters": dict(event.recognised_filters),
            "notice": event.notice,
            "degraded": list(event.degraded),
        }
        return self.rag

    def end(self, event: AnswerEnd) -> dict[str, Any]:
        """Give the whole `rag` object."""
        self.citations = event.citations
        self.rag |= {
            "presented": list(range(1, event.num_presented + 1)),
            "cited": sorted({citation.n for citation in event.citations}),
            "grounded": event.grounded,
            "refusal": _refusal(event.refusal),
            "unsupported": list(event.unsupported),
            "removed_markers": event.num_removed_markers,
            "degraded": list(event.degraded),
            "timings_ms": dict(event.timings_ms),
        }
        return self.rag

    @property
    def summary(self) -> Mapping[str, Any]:
        """The `rag` object without the sources, which a stream has told at its beginning."""
        return {key: value for key, value in self.rag.items() if key != "sources"}

    def _url(self, passage: Passage) -> str:
        """Every passage has an address that resolves: its own, or that of its document here."""
        if passage.url.startswith(("http://", "https://")):
            return passage.url
        chunk = passage.chunk_id.rpartition("#")[2]
        return f"{self._base_url}{document_path(passage.document_id, self._collection)}#{chunk}"


def document_path(document_id: str, collection: str | None = None) -> str:
    """Give the path of a document in this API, which leads to it whatever its id is."""
    # A browser would take the segments "." and ".." for steps, so that there the slash must not look like one.
    has_steps = not {".", ".."}.isdisjoint(document_id.split("/"))
    query = "" if collection is None else f"?collection={collection}"
    return f"/v1/documents/{quote(document_id, safe='' if has_steps else '/')}{query}"


def source(passage: Passage) -> dict[str, Any]:
    """Show a passage as clients see it."""
    return {
        "document_id": passage.document_id,
        "chunk_id": passage.chunk_id,
        "title": passage.title,
        "url": passage.url,
        "metadata": dict(passage.metadata),
        "text": passage.text,
        "score": round(passage.score, 6),
        "also_in": list(passage.also_in),
    }


def _refusal(refusal: Refusal | None) -> dict[str, Any] | None:
    if refusal is None:
        return None
    return {"reason": refusal.reason, "score": round(refusal.score, 4), "missing": list(refusal.missing)}
