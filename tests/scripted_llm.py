"""An engine that does what a test tells it."""

import asyncio
from collections.abc import AsyncGenerator

from app.domain import Delta, FinishReason, GenerationRequest, ModelInfo
from app.errors import CleaveError


class ScriptedLLM:
    """An `app.llm.LLM` that stands in because a real engine cannot be made to fail, hang or stray on command.

    The script is played in order: a text becomes a delta, an error is raised, an event is waited for. The last delta
    carries `finish_reason`; with None the stream just stops.
    """

    def __init__(
        self,
        *script: str | CleaveError | asyncio.Event,
        finish_reason: FinishReason | None = "stop",
        num_presented: int | None = None,
        num_dropped_messages: int = 0,
        down: CleaveError | None = None,
    ) -> None:
        self._script = script
        self._finish_reason = finish_reason
        self._num_presented = num_presented
        self._num_dropped_messages = num_dropped_messages
        self._down = down
        self.requests: list[GenerationRequest] = []
        self.num_played = 0
        self.began = asyncio.Event()
        self.closed = asyncio.Event()
        """The stream has come to an end: by itself, by an error, or because it was closed."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        self.requests.append(request)
        self.began.set()
        presented = len(request.passages) if self._num_presented is None else self._num_presented
        try:
            for position, step in enumerate(self._script, start=1):
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, CleaveError):
                    raise step
                else:
                    yield Delta(
                        step,
                        completion_tokens=position,
                        prompt_tokens=100,
                        num_presented=presented,
                        num_dropped_messages=self._num_dropped_messages,
                        finish_reason=self._finish_reason if position == len(self._script) else None,
                    )
                self.num_played += 1
        finally:
            self.closed.set()

    async def info(self) -> ModelInfo:
        if self._down:
            raise self._down
        return ModelInfo(id="scripted", engine="scripted", context_window=2048)

    async def close(self) -> None:
        pass
