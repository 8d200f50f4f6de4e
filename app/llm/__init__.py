"""The language model: one interface; vLLM in this process, a server over HTTP, or quotes without a model."""

from collections.abc import AsyncGenerator
from typing import Protocol

from app.domain import Delta, GenerationRequest, ModelInfo


class LLM(Protocol):
    """Something that answers a conversation."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Stream the completion of `request.messages`.

        The first delta comes as soon as there is one and carries `prompt_tokens` and `num_presented`; the last one
        carries `finish_reason`, and the token counts as the engine knows them, where they were estimates before.
        Closing the generator frees the engine's slot.

        Raises:
            ContextTooLong: the messages alone do not fit, before the first delta.
            InvalidRequest: what is asked of the sampling cannot be done, likewise.
            LLMUnavailable: the engine is down.
        """
        ...

    async def info(self) -> ModelInfo:
        """What is served. Raises `LLMUnavailable` when nothing is."""
        ...

    async def close(self) -> None:
        """Stop the engine."""
        ...
