"""Deleting a document, and the proof: after it was removed, queries look for its chunks in every way there is."""

import time

from app.domain import DeletionReceipt
from app.errors import DeletionFailed
from app.store import Store

MAX_TRIES = 3


async def delete(store: Store, document_id: str) -> DeletionReceipt | None:
    """Remove a document with all its chunks; None when there was none.

    Raises:
        DeletionFailed: chunks of it are found even after several tries.
    """
    located = await store.locate(document_id)
    if located is None:
        return None
    writes = {located.write}
    for _ in range(MAX_TRIES):
        await store.remove(document_id, writes)
        leftovers = await store.find_leftovers(document_id, located.vectors)
        writes = set[str]().union(*leftovers.values())
        if not writes:
            num_sparse = sum(1 for _, sparse in located.vectors if sparse)
            checks = {"filter": 1, "dense": len(located.vectors), "sparse": num_sparse}
            return DeletionReceipt(document_id, located.stored.version, located.stored.num_chunks, time.time(), checks)
    ways = " and ".join(check for check, found in leftovers.items() if found)
    raise DeletionFailed(
        f"The document {document_id!r} was removed {MAX_TRIES} times, and chunks of it are still found by {ways}: "
        "delete it again, and look into the store's log if that does not help."
    )
