"""A process that works on the ingestions of a folder, to be killed; what it ingests is noted in a file."""

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app import ingestion_jobs
from app.domain import Document, IngestReceipt
from app.ingestion_jobs import IngestionJobs
from app.settings import APISettings


class NotingRetriever:
    """Takes documents in by writing lines: who begins, each document, who ends."""

    def __init__(self, log: Path) -> None:
        self._log = log

    async def ingest(self, documents: Sequence[Document], *, collection: str | None = None) -> list[IngestReceipt]:
        receipts = []
        self._note("begin")
        for document in documents:
            self._note(document.id)
            receipts.append(IngestReceipt(document.id, "created", num_chunks=1))
            await asyncio.sleep(0.002)
        self._note("end")
        return receipts

    def _note(self, what: str) -> None:
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"{os.getpid()} {what}\n")


async def work(folder: Path, log: Path) -> None:
    ingestion_jobs.POLL_S = 0.05
    retriever: Any = NotingRetriever(log)
    IngestionJobs(folder, retriever, APISettings()).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(work(Path(sys.argv[1]), Path(sys.argv[2])))
