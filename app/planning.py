"""Before retrieval: what to search for, from a conversation."""

from collections.abc import Sequence

from app.domain import Message
from app.errors import InvalidRequest
from app.loaders import normalise


def plan_query(messages: Sequence[Message]) -> str:
    """Take the last message as the question, in the same normal form as the documents.

    Earlier turns are for the model, not for the search: pasting them in front was measured to cost a quarter of the
    recall on multi-turn questions.

    Raises:
        InvalidRequest: the last message is not the user's, or is empty.
    """
    if not messages or messages[-1].role != "user":
        raise InvalidRequest("The last message must be the user's question.", param="messages")
    question = normalise(messages[-1].content).strip()
    if not question:
        raise InvalidRequest("The question is empty.", param=f"messages.{len(messages) - 1}.content")
    return question
