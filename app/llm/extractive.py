"""An engine without a model: it answers with the best sentences of the passages, quoted and cited.

It stands in when the language model is down, and can be chosen as the engine itself.
"""

from collections.abc import AsyncGenerator

from app.domain import Delta, GenerationRequest, ModelInfo
from app.errors import LLMUnavailable, UnsupportedParameter
from app.grounding import choose_quotes, quote, rank_evidence


class ExtractiveEngine:
    """An `LLM` that only quotes; it needs passages whose sentences are scored."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Stream one quote per delta; see `app.llm.LLM.generate`."""
        if request.sampling.json:
            raise UnsupportedParameter(
                "The quoting engine writes no JSON. Leave response_format out, or set llm.engine to one with a model.",
                param="response_format",
            )
        quotes = choose_quotes(rank_evidence(request.messages[-1].content, request.passages))
        if not quotes:
            raise LLMUnavailable(
                "No language model is available, and there is no passage to quote from. Try again shortly.",
                retry_after_s=10,
            )
        for position, evidence in enumerate(quotes, start=1):
            yield Delta(
                text=(" " if position > 1 else "") + quote(evidence),
                num_presented=len(request.passages),
                finish_reason="stop" if position == len(quotes) else None,
                is_quote=True,
            )

    async def info(self) -> ModelInfo:
        """Say what is served; see `app.llm.LLM.info`."""
        return ModelInfo(id="extractive", engine="extractive", context_window=0)

    async def close(self) -> None:
        """Nothing is held."""
