"""`cleave ask`: an answer with its sources, and with --chat a conversation."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from app.cli.connection import call
from app.cli.options import DEFAULT_URL, URL, AsJSON, Authors, FilterOptions, TopK, read_filters
from app.cli.output import exit_code, open_console, print_error, print_json, print_recognised, printable
from app.domain import Message
from app.errors import CleaveError, InvalidRequest

if TYPE_CHECKING:
    from app.client import Client, Record

GROUNDED = {
    "model": "the model's words, supported by the sources",
    "mixed": "partly the model's words, supported by the sources, partly quoted",
    "quotes": "quoted from the sources",
    "refused": "the documents hold no answer",
    "flagged": "the model's words, partly not supported by the sources",
    "unchecked": "the model's words, not checked",
}
"""How an answer was made, by `rag.grounded`."""
DEGRADED = {
    "llm_unavailable": "the language model was not available",
    "llm_cold": "the language model was not running yet",
    "overloaded": "the language model had too many requests",
    "llm_timeout": "the language model was too slow",
    "llm_failed": "the language model broke off",
    "history_trimmed": "the oldest messages did not fit",
    "passages_dropped": "not all passages fitted into the prompt",
    "reranking_skipped": "the passages could not be reranked in time",
    "rewriting_skipped": "the question was searched for as it is",
}
"""What an answer had to do without, by `rag.degraded`."""


def ask(
    question: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="The question; with --chat the first one, or none.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Go on with further questions, one a line.")] = False,
    author: Authors = None,
    filter_options: FilterOptions = None,
    top_k: TopK = None,
    raw: Annotated[bool, typer.Option("--raw", help="Ask the model alone, without documents.")] = False,
    as_json: AsJSON = False,
    url: URL = DEFAULT_URL,
) -> None:
    """Answer a question from the documents, with its sources.

    With --chat each question may follow on from the ones before. Ctrl-C stops an answer, Ctrl-D ends the conversation.
    With --json too, an answer is one line of JSON.
    """
    options: dict[str, Any] = {"filters": read_filters(author, filter_options), "top_k": top_k, "enabled": not raw}
    if chat:
        raise typer.Exit(_converse(question, options, url, as_json=as_json))
    if question is None:
        raise InvalidRequest("Write a question behind `cleave ask`, or --chat for a conversation.")
    if as_json:
        print_json(call(url, lambda client: client.chat(question, **options)))
    else:
        call(url, lambda client: _stream_answer(client, question, (), options))


def _converse(first: str | None, options: Mapping[str, Any], url: str, *, as_json: bool) -> int:
    """Answer question after question; give the exit code. Only what was answered stays in the conversation."""
    history: list[Message] = []
    code = 0
    for question in _questions(first):
        try:
            if as_json:
                completion = call(url, partial(_chat, question=question, history=history, options=options))
                typer.echo(json.dumps(completion, ensure_ascii=False))
                answer = completion["choices"][0]["message"]["content"]
            else:
                answer = call(url, partial(_stream_answer, question=question, history=history, options=options))
        except KeyboardInterrupt:
            open_console(stderr=True).print(Text("stopped; this question is forgotten", "dim"))
        except CleaveError as error:
            print_error(error.message)
            code = exit_code(error)
        else:
            history += [Message("user", question), Message("assistant", answer)]
    return code


def _questions(first: str | None) -> Iterator[str]:
    """Give the questions that are typed, or the lines of a file, to its end."""
    if first is not None:
        yield first
    console = open_console(stderr=True)
    while True:
        try:
            # Readline and the prompt belong to a terminal.
            line = console.input("\n> ") if sys.stdin.isatty() else next(sys.stdin)
        except (EOFError, StopIteration, KeyboardInterrupt):
            return
        if question := line.strip():
            yield question


async def _chat(client: "Client", question: str, history: Sequence[Message], options: Mapping[str, Any]) -> "Record":
    return await client.chat(question, history=history, **options)


async def _stream_answer(
    client: "Client", question: str, history: Sequence[Message], options: Mapping[str, Any]
) -> str:
    """Print an answer as it comes, then its sources; give its text."""
    started = time.monotonic()
    first_word_s: float | None = None
    pieces: list[str] = []
    rag: Record = {}
    usage: Record = {}
    try:
        async for chunk in client.stream_chat(question, history=history, **options):
            rag |= chunk.get("rag") or {}
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                if text := choice["delta"].get("content"):
                    first_word_s = first_word_s or time.monotonic() - started
                    pieces.append(text)
                    typer.echo(printable(text), nl=False)
    finally:
        if pieces:
            typer.echo()
    _print_sources(rag)
    print_recognised(rag)
    tokens = f"{usage.get('completion_tokens', 0)} tokens"
    times = f"{first_word_s or 0:.1f} s to the first word, {time.monotonic() - started:.1f} s in all"
    open_console().print(Text(" · ".join([*_describe_answer(rag), times, tokens]), "dim"), soft_wrap=True)
    return "".join(pieces)


def _print_sources(rag: "Record") -> None:
    console = open_console()
    sources, cited = rag.get("sources", []), rag.get("cited", [])
    console.print()
    if sources:
        console.print("Sources (* cited)" if cited else "Sources, none cited", style="bold")
    for source in sources:
        mark, style = ("*", "default") if source["n"] in cited else (" ", "dim")
        details = [source["metadata"].get(key) for key in ("author", "platform", "date")]
        title = " · ".join(str(one) for one in (source["title"] or source["document_id"], *details) if one)
        place = source["url"] or source["document_id"]
        line = f"{mark} [{source['n']}] {title}\n      {place}"
        console.print(Text(printable(line), style), soft_wrap=True)
    if sources:
        console.print()


def _describe_answer(rag: "Record") -> list[str]:
    grounded = str(rag.get("grounded", "unchecked"))
    said = [GROUNDED.get(grounded, grounded)]
    if unsupported := rag.get("unsupported"):
        said.append(f"{len(unsupported)} unsupported sentence{'s' if len(unsupported) > 1 else ''}")
    return said + [DEGRADED.get(reason, reason) for reason in map(str, rag.get("degraded", ()))]
