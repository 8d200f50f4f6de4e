"""A process that works on the batches of a folder, to be killed; what it is asked is noted in a file."""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from app import batch_worker
from app.batch_worker import BatchWorker
from app.domain import Delta, GenerationRequest, ModelInfo
from app.services import build_services
from app.settings import AnswerSettings, BatchSettings, LLMSettings, Settings, StoreSettings


class NotingLLM:
    """Answers with the question, and notes who was asked what."""

    def __init__(self, log: Path) -> None:
        self._log = log

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        question = request.messages[-1].content
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"{os.getpid()} {question}\n")
        await asyncio.sleep(0.02)
        yield Delta(f"About {question}", prompt_tokens=1, completion_tokens=1, finish_reason="stop")

    async def info(self) -> ModelInfo:
        return ModelInfo(id="noting", engine="noting", context_window=2048)

    async def close(self) -> None:
        """Nothing is held."""


class NoRetriever:
    """The model is asked by itself."""

    async def close(self) -> None:
        """Nothing is held."""


async def work(folder: Path, log: Path) -> None:
    batch_worker.WATCH_S = batch_worker.SEARCHED_EVERY_S = 0.1
    retriever: Any = NoRetriever()
    settings = Settings(
        data_dir=folder,
        store=StoreSettings(kind="memory"),
        llm=LLMSettings(engine="extractive"),
        answer=AnswerSettings(grounding="flag"),
        batch=BatchSettings(num_concurrent=3),
    )
    services = await build_services(settings, retriever=retriever, llm=NotingLLM(log), ingests=False)
    BatchWorker(services).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(work(Path(sys.argv[1]), Path(sys.argv[2])))
