"""Before retrieval: what to search for, from a conversation."""

import asyncio
import re
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

from app import sparse
from app.domain import GenerationRequest, Message, SamplingParams
from app.errors import CleaveError, InvalidRequest
from app.llm import LLM
from app.loaders import normalise
from app.prompts import rewriting_messages

MAX_CONTEXT = 3
"""Earlier questions that a search takes into account; a fourth changed nothing."""
MAX_CONTEXT_CHARACTERS = 1_000
"""Of one earlier question: about what the encoder reads."""
MAX_REWRITTEN_TOKENS = 64
MIN_SHARED_TERMS = 0.5
"""Share of a rewritten question's terms that the conversation must hold; with fewer the model has strayed."""

_LABEL = re.compile(r"^(?:(?:standalone |rewritten |search )?(?:question|query)):\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to search for: the question, and the user's earlier ones, newest first, which count lightly."""

    question: str
    context: tuple[str, ...] = ()

    @property
    def may_depend(self) -> bool:
        """Whether the question may need earlier turns to be understood; a long text stands alone."""
        return bool(self.context) and len(self.question) <= MAX_CONTEXT_CHARACTERS


class RewritingFailed(Exception):
    """The model gave no standalone question; the text says why, for the log."""


def plan_query(messages: Sequence[Message]) -> Plan:
    """Take the last message as the question, in the same normal form as the documents, and earlier ones as context.

    Raises:
        InvalidRequest: the last message is not the user's, or is empty.
    """
    if not messages or messages[-1].role != "user":
        raise InvalidRequest("The last message must be the user's question.", param="messages")
    question = normalise(messages[-1].content).strip()
    if not question:
        raise InvalidRequest("The question is empty.", param=f"messages.{len(messages) - 1}.content")
    earlier = [message.content for message in reversed(messages[:-1]) if message.role == "user"][:MAX_CONTEXT]
    context = (normalise(text[:MAX_CONTEXT_CHARACTERS]).strip() for text in earlier)
    return Plan(question, tuple(text for text in context if text))


async def rewrite_question(messages: Sequence[Message], llm: LLM, *, request_id: str, timeout_s: float) -> str:
    """Have the language model make the last message a question that stands alone.

    Raises:
        RewritingFailed: in time it gave none that can be one; search for the last message then.
    """
    prompt = rewriting_messages(messages)
    request = GenerationRequest(f"{request_id}-rewrite", tuple(prompt), SamplingParams(max_tokens=MAX_REWRITTEN_TOKENS))
    try:
        async with asyncio.timeout(timeout_s):
            text = await _completed(llm, request)
    except TimeoutError:
        raise RewritingFailed(f"no question within {timeout_s:g} s") from None
    except CleaveError as error:
        raise RewritingFailed(error.message) from error
    question = _LABEL.sub("", normalise(text).strip()).partition("\n")[0].strip(" \"'“”")
    terms = set(sparse.encode_query(question))
    known = set(sparse.encode_query(prompt[-1].content))
    if not terms or len(terms & known) < MIN_SHARED_TERMS * len(terms):
        raise RewritingFailed(f"not a question about the conversation: {question[:100]!r}")
    return question


async def _completed(llm: LLM, request: GenerationRequest) -> str:
    text = ""
    async with aclosing(llm.generate(request)) as deltas:
        async for delta in deltas:
            text += delta.text
            if delta.finish_reason == "stop":
                return text
    raise RewritingFailed("the question did not come to an end")
