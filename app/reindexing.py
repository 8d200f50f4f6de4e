"""One index brought up to date with another, whatever encoder and chunker each was written with."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Protocol

from app.domain import Document, StoredDocument
from app.errors import CleaveError
from app.loaders import normalise
from app.retrieval import Index
from app.store import Store
from app.store.payload import record_id

PAGE_SIZE = 256
MAX_DOCUMENTS = 8
MAX_CHARACTERS = 1_000
"""Of one write: two or three chunks, since a question that comes meanwhile waits until they are encoded."""


class Listing(Protocol):
    """Something whose documents can be listed in the order of their record ids."""

    async def documents(self, *, after: str | None = None, limit: int = 100) -> list[StoredDocument]:
        """Give a page of documents."""
        ...


async def _at_once() -> None:
    """Wait for nobody."""


def _unheard(num_done: int) -> None:
    """Tell nobody."""


async def synchronise(
    source: Store,
    target: Index,
    *,
    is_cleaned_anew: bool = False,
    before_write: Callable[[], Awaitable[None]] = _at_once,
    report: Callable[[int], None] = _unheard,
) -> int:
    """Make `target` hold the documents of `source`; return how many were written or deleted.

    Documents that are equal on both sides cost no encoding, so it goes on where it was cut short. What changes in
    `source` meanwhile is left for the next time. `report` gets the number of documents that are done.

    Args:
        is_cleaned_anew: the texts went through another version of the cleaner, and go through this one now.

    Raises:
        CleaveError: a document could not be written.
    """
    num_changed = num_done = 0
    waiting: list[Document] = []
    async with aclosing(_pairs(source, target)) as pairs:
        async for ours, theirs in pairs:
            if ours is None:
                num_changed += await _delete(target, theirs)
                continue
            num_done += 1
            if theirs is None or theirs.content_hash != ours.content_hash or is_cleaned_anew:
                waiting += await _read(source, ours.id, is_cleaned_anew=is_cleaned_anew)
            if len(waiting) >= MAX_DOCUMENTS or sum(len(one.text) for one in waiting) > MAX_CHARACTERS:
                num_changed += await _write(target, waiting, before_write)
                waiting = []
                report(num_done)
    num_changed += await _write(target, waiting, before_write)
    report(num_done)
    return num_changed


async def _delete(target: Index, stored: StoredDocument | None) -> int:
    assert stored is not None
    await target.delete(stored.id)
    return 1


async def _write(target: Index, documents: Sequence[Document], before_write: Callable[[], Awaitable[None]]) -> int:
    """Write documents; return how many were not there already."""
    await before_write()
    receipts = await target.ingest(documents)
    for receipt in receipts:
        if receipt.status == "failed":
            raise CleaveError(f"The document {receipt.document_id!r} could not be written: {receipt.error}")
    return sum(receipt.status != "unchanged" for receipt in receipts)


async def catch_up(source: Store, target: Index, *, since: float) -> None:
    """Copy what was written to `source` from a time on (seconds since the epoch), unless `target` has a newer one."""
    async with aclosing(_pairs(source, target)) as pairs:
        async for ours, theirs in pairs:
            if ours and ours.updated_at >= since and (theirs is None or theirs.updated_at < ours.updated_at):
                await target.ingest(await _read(source, ours.id))


async def _read(source: Store, document_id: str, *, is_cleaned_anew: bool = False) -> list[Document]:
    """Read a document with its text; nothing when it was deleted meanwhile."""
    found = await source.document(document_id)
    if found is None:
        return []
    stored, text = found
    title = stored.title
    if is_cleaned_anew:
        title, text = normalise(title).strip(), normalise(text)
    return [Document(stored.id, title, text, stored.url, stored.metadata)]


async def _pairs(
    source: Listing, target: Listing
) -> AsyncGenerator[tuple[StoredDocument | None, StoredDocument | None], None]:
    """Walk through both lists at once, which have the same order; what stands in one only comes without the other."""
    async with aclosing(_all(source)) as ours, aclosing(_all(target)) as theirs:
        left, right = await anext(ours, None), await anext(theirs, None)
        while left or right:
            first = min(record_id(one.id) for one in (left, right) if one)
            is_left, is_right = (one is not None and record_id(one.id) == first for one in (left, right))
            yield left if is_left else None, right if is_right else None
            left = await anext(ours, None) if is_left else left
            right = await anext(theirs, None) if is_right else right


async def _all(listing: Listing) -> AsyncGenerator[StoredDocument, None]:
    after = None
    while page := await listing.documents(after=after, limit=PAGE_SIZE):
        for one in page:
            yield one
        after = page[-1].id
