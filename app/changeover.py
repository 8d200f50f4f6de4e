"""`cleave reindex`: have a new index built beside the live one, and compare the two."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from itertools import product

from app.client import Client, Record, ServiceError
from app.domain import Ranking
from app.known_items import Comparison, compare, make_question, reciprocal_rank, sample
from app.settings import IndexSettings

POLL_S = 0.5
MAX_SILENCE_S = 900.0
"""Without a document more, building counts as broken off: a document of 25 MB takes minutes."""
NUM_FOUND = 10
RANKINGS: tuple[Ranking, ...] = ("hybrid", "dense")


async def build(client: Client, settings: IndexSettings) -> AsyncGenerator[Record, None]:
    """Start or go on building; yield how far it is until it is `built`, or `current` when nothing is to be done.

    Raises:
        ServiceError: it failed or was broken off.
    """
    loop = asyncio.get_running_loop()
    status = await client.reindex(settings.model_dump(mode="json"))
    progress, progressed_at = -1, loop.time()
    while status["state"] == "building":
        yield status
        if status["num_done"] != progress:
            progress, progressed_at = status["num_done"], loop.time()
        elif loop.time() - progressed_at > MAX_SILENCE_S:
            break
        await asyncio.sleep(POLL_S)
        status = await client.reindex_status()
    if status["state"] == "failed":
        raise ServiceError(f"The new index could not be built: {status['error']} The live one is as it was.")
    if status["state"] not in ("built", "current"):
        raise ServiceError("The process that built the new index has ended. Run `cleave reindex` again: it goes on.")
    yield status


async def compare_indexes(client: Client, report: Callable[[int, int], None]) -> dict[Ranking, Comparison]:
    """Ask the live and the new index the same known-item questions; `report` gets how many of how many are asked.

    As the service ranks, and by the vectors alone: BM25 finds half of a sentence also beside an encoder that is blind.
    """
    chosen = sample([document["id"] async for document in client.documents()])
    ranks: dict[tuple[Ranking, str], list[float]] = {pair: [] for pair in product(RANKINGS, ("live", "candidate"))}
    for number, document_id in enumerate(chosen, start=1):
        question = make_question(document_id, (await client.document(document_id))["text"])
        if question is not None:
            for (ranking, index), own in ranks.items():
                found = await client.search_index(question, index=index, ranking=ranking, top_k=NUM_FOUND)
                own.append(reciprocal_rank(found, document_id))
        report(number, len(chosen))
    return {ranking: compare(ranks[ranking, "live"], ranks[ranking, "candidate"]) for ranking in RANKINGS}
