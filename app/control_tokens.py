"""Control tokens: the marks between the turns of a chat, which no passage and no message may set itself.

A chat template is rendered to one string and then read by the tokenizer, so `<|im_end|>` inside a document would end
the turn, and what follows could speak as the system.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from app.domain import Message

COMMON = (
    r"<[|\uff5c][^\s<>]{1,60}[|\uff5c]>",  # ChatML, Llama 3, Phi, GPT-OSS, DeepSeek
    r"</?s>",
    r"\[/?INST\]",
    r"<</?SYS>>",
    r"</?(?:start|end)_of_turn>",  # Gemma
    r"</?think>",
)
"""Those of the usual model families: a server behind HTTP does not tell its own."""


def control_pattern(tokens: Iterable[str] = ()) -> re.Pattern[str]:
    """Match the first character of each control token: the common ones and the given ones, also where they overlap."""
    own = [re.escape(token) for token in sorted(tokens) if len(token) > 1]
    return re.compile(rf"(?=(?:{'|'.join([*COMMON, *own])}))([\s\S])", re.IGNORECASE)


def control_tokens(tokenizer: Any) -> set[str]:
    """List the control tokens of a Hugging Face tokenizer; runs of white space, which some have too, are none."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    found = {str(token) for token in added if token.special or str(token).startswith("<")}
    return found | {str(token) for token in getattr(tokenizer, "all_special_tokens", ())}


def defused(messages: Sequence[Message], pattern: re.Pattern[str]) -> list[Message]:
    """Break each control token in the messages by a space: people still read it, the tokenizer does not."""
    return [replace(message, content=pattern.sub(r"\1 ", message.content)) for message in messages]
