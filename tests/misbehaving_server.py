"""A small OpenAI-compatible server over real HTTP, which misbehaves on command: no real one does."""

import asyncio
import json
import re
import threading
from collections.abc import Coroutine
from typing import Any, TypeAlias

MODEL = "parrot"
WINDOW = 1024

Script: TypeAlias = list[bytes | float | None]
"""Bytes are sent, seconds are waited, None cuts the connection."""


def head(status: str = "200 OK", content_type: str = "text/event-stream", **headers: str) -> bytes:
    """The head of a response whose body is sent in pieces; see `piece`."""
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if content_type:
        lines.append(f"Content-Type: {content_type}")
    return "\r\n".join([f"HTTP/1.1 {status}", "Transfer-Encoding: chunked", *lines, "", ""]).encode()


def piece(data: bytes) -> bytes:
    """A piece of a body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


END = b"0\r\n\r\n"
DONE = piece(b"data: [DONE]\n\n")


def event(content: object) -> bytes:
    return piece(b"data: " + json.dumps(content).encode() + b"\n\n")


def text(content: str | None, finish_reason: str | None = None) -> bytes:
    """A chunk of a completion."""
    return event({"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish_reason}]})


def usage(prompt_tokens: int, completion_tokens: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}})


def page(status: str, body: str | dict[str, Any], content_type: str = "application/json", **headers: str) -> Script:
    """A whole response that is no stream."""
    content = body if isinstance(body, str) else json.dumps(body)
    return [head(status, content_type, **headers), *([piece(content.encode())] if content else []), END]


class MisbehavingServer:
    """Behaves until a `script` is set, which is then played for every completion.

    Its model repeats the words that it is sent, one token per word, for as long as it may. `has_tokenizer` and
    `tells_window` make it look like vLLM; `script_of_models` is played for the list of models.
    """

    def __init__(self, *, has_tokenizer: bool = True, tells_window: bool = True, pace_s: float = 0.005) -> None:
        self.script: Script | None = None
        self.script_of_models: Script | None = None
        self.greeting = b""
        """What is sent to whoever connects, before any request."""
        self.has_tokenizer = has_tokenizer
        self.tells_window = tells_window
        self.pace_s = pace_s
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        """Route, headers and body of each request."""
        self.num_connections = 0
        self.num_running = 0
        self.num_left = 0
        """How many completions their client has left before the end."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="misbehaving-server", daemon=True)
        self._thread.start()
        self._connections: set[asyncio.StreamWriter] = set()
        self._server = self._run(asyncio.start_server(self._connected, "127.0.0.1", 0))
        self.port = int(self._server.sockets[0].getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def bodies(self, route: str = "/v1/chat/completions") -> list[Any]:
        return [body for path, _, body in self.requests if path == route]

    def stop(self) -> None:
        """Stop like a process that is killed; doing it twice is fine."""
        if self._loop.is_closed():
            return
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=60)

    async def _end(self) -> None:
        self._server.close()
        for writer in self._connections:
            writer.transport.abort()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        self.num_connections += 1
        try:
            writer.write(self.greeting)
            while True:
                start = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                found = re.findall(r"^([\w-]+): *(.*?)\r$", start, re.MULTILINE)
                headers = {name.lower(): value for name, value in found}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                route = start.split(" ", 2)[1]
                self.requests.append((route, headers, json.loads(body) if body else None))
                await self._answer(route, self.requests[-1][2], writer, reader)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _answer(self, route: str, body: Any, writer: asyncio.StreamWriter, reader: asyncio.StreamReader) -> None:
        if route == "/v1/models":
            model = {"id": MODEL, **({"max_model_len": WINDOW} if self.tells_window else {})}
            await self._play(self.script_of_models or page("200 OK", {"data": [model]}), writer)
        elif route == "/tokenize" and self.has_tokenizer:
            await self._play(page("200 OK", {"count": len(_words(body["messages"]))}), writer)
        elif route == "/v1/chat/completions":
            self.num_running += 1
            try:
                await self._until_left(reader, self._complete(body, writer))
            finally:
                self.num_running -= 1
        else:
            await self._play(page("404 Not Found", {"detail": "Not Found"}), writer)

    async def _until_left(self, reader: asyncio.StreamReader, work: Coroutine[Any, Any, None]) -> None:
        """Stop working when the client leaves, as vLLM does."""
        working = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(_left(reader))
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not working.done():
            self.num_left += 1
            working.cancel()
            raise ConnectionResetError
        working.result()

    async def _complete(self, body: Any, writer: asyncio.StreamWriter) -> None:
        if self.script is not None:
            await self._play(self.script, writer)
            return
        prompt = _words(body["messages"])
        said, whole = 0, ""
        script: Script = [head(), text(None)]
        for word in (prompt * body["max_tokens"])[: body["max_tokens"]]:
            said += 1
            whole += f"{word} "
            if any(stop in whole for stop in body.get("stop", [])):
                break
            script += [text(f"{word} "), self.pace_s]
        reason = "length" if said == body["max_tokens"] else "stop"
        await self._play([*script, text("", reason), usage(len(prompt), said), DONE, END], writer)

    async def _play(self, script: Script, writer: asyncio.StreamWriter) -> None:
        for step in script:
            if step is None:
                writer.transport.abort()
                raise ConnectionResetError
            if isinstance(step, bytes):
                writer.write(step)
                await writer.drain()
            else:
                await asyncio.sleep(step)


async def _left(reader: asyncio.StreamReader) -> None:
    while not reader.at_eof():  # noqa: ASYNC110  # Reading would take a byte of the next request.
        await asyncio.sleep(0.005)


def _words(messages: list[dict[str, str]]) -> list[str]:
    return [word for message in messages for word in message["content"].split()]
