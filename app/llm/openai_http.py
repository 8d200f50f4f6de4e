"""Any OpenAI-compatible server over HTTP: vLLM's own, Ollama, a hosted one."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from pydantic import BaseModel, ValidationError

from app.control_tokens import control_pattern, defused
from app.domain import Delta, FinishReason, GenerationRequest, JSONFormat, Message, ModelInfo
from app.errors import (
    CleaveError,
    ConfigurationError,
    ContextTooLong,
    InvalidRequest,
    LLMUnavailable,
    Overloaded,
    Unavailable,
)
from app.prompts import Fit, fitting
from app.settings import LLMSettings

TIMEOUT = httpx.Timeout(30, connect=5, read=300)
"""A net only: the caller's deadline comes first, and a first token may take long."""
PROBE_TIMEOUT_S = 5.0
"""For questions that a server answers without its model."""
KEEPALIVE_S = 2.0
"""Shorter than vLLM's 5 s, so that no request goes out on a connection that the server is closing."""
USAGE_TIMEOUT_S = 1.0
"""The usage comes right behind the last token, or not at all."""
MAX_INFO_AGE_S, MAX_WINDOW_AGE_S = 1.0, 60.0
MAX_EVENT_BYTES, MAX_ERROR_BYTES = 4 * 2**20, 2**16
MAX_RETRY_AFTER_S = 3600
MAX_QUOTED = 300
"""Characters of the server's own words in a message of ours."""

ASSUMED_CONTEXT_WINDOW = 4096
"""Of a server that tells none. It is Ollama's default, which cuts longer prompts without a word."""
BYTES_PER_TOKEN, TOKENS_PER_MESSAGE = 2, 8
"""For a server without a tokenizer. A small English vocabulary takes 3.8 bytes of English per token, 2.6 of German, 2.3
of Russian and 1.7 of Chinese, larger ones more; a chat template puts some 6 tokens around a message."""

CONTROL = control_pattern()

FINISH_REASONS: Mapping[str, FinishReason] = {"stop": "stop", "repetition": "stop", "length": "length"}
"""Others, such as `abort` or `content_filter`, mean that the answer is not whole."""


class OpenAIEngine:
    """An `LLM` over the chat completions of another server. Its model may change there while this one runs."""

    def __init__(self, settings: LLMSettings, *, api_key: str | None) -> None:
        self._url = check_url(settings.url or "")
        self._model = settings.model_on("cpu")
        self._max_model_len = settings.max_model_len
        self._api_key = check_api_key(api_key)
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        self._client = httpx.AsyncClient(
            base_url=self._url,
            headers=headers,
            timeout=TIMEOUT,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=KEEPALIVE_S),
            # A proxy meant for the internet would stand before a server on this machine; SSL_CERT_FILE counts.
            trust_env=False,
            verify=httpx.create_ssl_context(),
        )
        self._models: dict[str, int | None] = {}
        self._models_at_s = float("-inf")
        self._has_tokenizer = False
        self._num_running = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Stream the completion; see `app.llm.LLM.generate`."""
        with self._translated_errors():
            fit = await self._fit(request)
            num_chunks = 0
            usage: _Usage | None = None
            reason: str | None = None

            def delta(text: str, *, is_last: bool = False) -> Delta:
                return Delta(
                    text=text,
                    # A chunk is one token or a few; the last delta has the server's own count, if it gives one.
                    completion_tokens=(usage and usage.completion_tokens) or num_chunks,
                    prompt_tokens=(usage and usage.prompt_tokens) or fit.num_tokens,
                    num_presented=fit.num_presented,
                    num_dropped_messages=fit.num_dropped_messages,
                    finish_reason=FINISH_REASONS[reason or ""] if is_last else None,
                )

            self._num_running += 1
            try:
                # Leaving closes the connection, which is what makes the server abort when the reader has left.
                async with self._client.stream(
                    "POST", "chat/completions", content=self._body(request, fit)
                ) as response:
                    await self._check(response)
                    async with aclosing(_chunks(response)) as chunks:
                        async for chunk in chunks:
                            usage = chunk.usage or usage
                            if chunk.text:
                                num_chunks += 1
                                yield delta(chunk.text)
                            reason = chunk.finish_reason
                            if reason is not None:
                                break
                        if reason not in FINISH_REASONS:
                            raise _broken(f"ended with {reason}" if reason else "ended before its answer did")
                        usage = await _late_usage(chunks) or usage
            finally:
                self._num_running -= 1
            yield delta("", is_last=True)

    async def info(self) -> ModelInfo:
        """Say what is served; see `app.llm.LLM.info`. `num_running` counts the requests of this process."""
        models = await self.models(max_age_s=MAX_INFO_AGE_S)
        return ModelInfo(
            id=self._model,
            engine="openai",
            context_window=self._context_window(models),
            num_running=self._num_running,
        )

    async def models(self, *, max_age_s: float = 0.0) -> dict[str, int | None]:
        """Ask which models the server has, each with its context window if the server tells.

        Raises:
            LLMUnavailable: the server is not there, or is no such server.
        """
        with self._translated_errors():
            now = asyncio.get_running_loop().time()
            if now - self._models_at_s >= max_age_s:
                self._models = await self._list_models()
                self._models_at_s = now
                # vLLM tells the window, and has the route.
                self._has_tokenizer = self._models.get(self._model) is not None
        return self._models

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _list_models(self) -> dict[str, int | None]:
        # httpx bounds each step; this bounds all of them.
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            response = await self._client.get("models")
        if not response.is_success:
            refusal = self._refusal(response, response.content, models={})
            # Nobody's request is at fault here.
            raise refusal if isinstance(refusal, Unavailable) else LLMUnavailable(self._no_api(refusal.message))
        try:
            found = _Models.model_validate_json(response.content)
        except ValidationError as error:
            raise LLMUnavailable(self._no_api("what it answers to GET models is no list of models")) from error
        return {model.id: model.max_model_len for model in found.data or ()}

    # --- The prompt ------------------------------------------------------------------------------------------------

    async def _fit(self, request: GenerationRequest) -> Fit:
        models = await self.models(max_age_s=MAX_WINDOW_AGE_S)
        steps = fitting(request, self._context_window(models))
        messages = next(steps)
        while True:
            num_tokens = await self._count(messages)
            try:
                messages = steps.send(num_tokens)
            except StopIteration as end:
                fit: Fit = end.value
                return fit

    def _context_window(self, models: Mapping[str, int | None]) -> int:
        told = [window for window in (models.get(self._model), self._max_model_len) if window]
        return min(told, default=ASSUMED_CONTEXT_WINDOW)

    async def _count(self, messages: Sequence[Message]) -> int:
        """Count by vLLM's tokenizer, or estimate."""
        if self._has_tokenizer:
            body = json.dumps({"model": self._model, "messages": _wire(messages)})
            with suppress(httpx.HTTPError, ValidationError):
                # The route stands beside /v1, not under it.
                url = f"{self._url.removesuffix('/v1')}/tokenize"
                response = await self._client.post(url, content=body, timeout=PROBE_TIMEOUT_S)
                if response.is_success:
                    return _Tokenized.model_validate_json(response.content).count
            self._has_tokenizer = False
        num_bytes = sum(len(message.content.encode(errors="replace")) for message in messages)
        return num_bytes // BYTES_PER_TOKEN + TOKENS_PER_MESSAGE * (len(messages) + 1)

    def _body(self, request: GenerationRequest, fit: Fit) -> str:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self._model,
            "messages": _wire(fit.messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": fit.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "frequency_penalty": sampling.frequency_penalty,
            "presence_penalty": sampling.presence_penalty,
        }
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.logit_bias:
            body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
        if sampling.json:
            body["response_format"] = _response_format(sampling.json)
        return json.dumps(body)

    # --- What goes wrong -------------------------------------------------------------------------------------------

    async def _check(self, response: httpx.Response) -> None:
        if response.is_success:
            kind = response.headers.get("content-type", "nothing").partition(";")[0]
            if kind != "text/event-stream":
                raise LLMUnavailable(self._no_api(f"it answers with {kind[:60]} in place of an event stream"))
            return
        body = b""
        async for piece in response.aiter_bytes():
            body += piece
            if len(body) > MAX_ERROR_BYTES:
                break
        models: dict[str, int | None] = {}
        if response.status_code == 404:
            with suppress(LLMUnavailable):
                models = await self.models(max_age_s=MAX_INFO_AGE_S)
        raise self._refusal(response, body, models=models)

    def _refusal(self, response: httpx.Response, body: bytes, *, models: Mapping[str, int | None]) -> CleaveError:
        """Translate a status that is no success."""
        status, said = response.status_code, self._said(body)
        retry_after_s = _retry_after_s(response.headers.get("retry-after", ""))
        if status == 429:
            message = f"The language model's server has too many requests{said}. Try again shortly."
            return Overloaded(message, retry_after_s=retry_after_s or 2)
        if status in (401, 403):
            what = "refuses llm.api_key or LLM_API_KEY" if self._api_key else "asks for a key: set LLM_API_KEY"
            return LLMUnavailable(f"The language model's server at {self._url} {what} ({status}).", retry_after_s=60)
        if status == 404 and models and self._model not in models:
            return LLMUnavailable(
                f"The language model's server at {self._url} has no model {self._model!r}. "
                f"Set llm.model to one that it has: {', '.join(list(models)[:10])}.",
                retry_after_s=60,
            )
        if status in (404, 405) or response.is_redirect:
            return LLMUnavailable(self._no_api(f"it answers {status}{said}"), retry_after_s=60)
        if 400 <= status < 500 and status != 408:
            if _is_about_context(said):
                return ContextTooLong(f"The prompt does not fit the model's context window{said}.", param="messages")
            message = f"The language model's server refuses the request ({status}){said}."
            return InvalidRequest(message, param=_param_of(body))
        message = f"The language model's server at {self._url} has failed ({status}){said}."
        return LLMUnavailable(message, retry_after_s=retry_after_s or 10)

    def _no_api(self, why: str) -> str:
        return f"There is no OpenAI-compatible API at {self._url}: {why}. Correct llm.url, up to and including /v1."

    def _said(self, body: bytes) -> str:
        """Quote the first line of an error object; a page of HTML has nothing to say."""
        try:
            found = json.loads(body)
        except ValueError:
            return ""
        said = _message_of(found.get("error", found)) if isinstance(found, dict) else ""
        if self._api_key:
            said = said.replace(self._api_key, "...")
        return f": {said}" if said else ""

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """Turn httpx's errors into ours at this border."""
        if self._client.is_closed:
            raise LLMUnavailable("The connection to the language model's server is closed.")
        try:
            yield
        except (httpx.HTTPError, TimeoutError) as error:
            self._models_at_s = float("-inf")  # What it had may be gone.
            raise self._lost(error) from error

    def _lost(self, error: httpx.HTTPError | TimeoutError) -> LLMUnavailable:
        server, reason = f"The language model's server at {self._url}", _first_line(str(error))
        if isinstance(error, (httpx.TimeoutException, TimeoutError)):
            return LLMUnavailable(f"{server} does not answer in time. Try again shortly.", retry_after_s=10)
        if isinstance(error, httpx.ConnectError):
            message = f"{server} cannot be reached ({reason}). Start it, or correct llm.url."
            return LLMUnavailable(message, retry_after_s=10)
        return _broken(f"broke off ({reason or type(error).__name__})")


class _Model(BaseModel):
    id: str
    max_model_len: int | None = None


class _Models(BaseModel):
    data: list[_Model] | None


class _Tokenized(BaseModel):
    count: int


class _Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Text(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    delta: _Text | None = None
    finish_reason: str | None = None


class _Chunk(BaseModel):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None

    @property
    def text(self) -> str:
        found = self.choices[0].delta if self.choices else None
        return (found and found.content) or ""

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason if self.choices else None


def check_url(url: str) -> str:
    """Refuse what can be no server's address; return it without a slash at its end."""
    try:
        parts = httpx.URL(url.strip())
    except httpx.InvalidURL:
        parts = httpx.URL("")
    if parts.scheme not in ("http", "https") or not parts.host or parts.userinfo or parts.query:
        raise ConfigurationError(
            f"llm.url: {_without_login(url)!r} is no address of a server. Write it like http://127.0.0.1:8001/v1; "
            "a key belongs into the environment variable LLM_API_KEY."
        )
    address = str(parts).rstrip("/")
    if address.endswith("/completions"):
        raise ConfigurationError(f"llm.url: {address} names a route. Write it up to and including /v1.")
    return address


def check_api_key(api_key: str | None) -> str:
    """Refuse a key that no HTTP header can carry; return it without the white space around it."""
    key = (api_key or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigurationError("llm.api_key: it holds characters that cannot stand in a key. Copy it again.")
    return key


def _without_login(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}".partition("?")[0]


def _wire(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in defused(messages, CONTROL)]


def _response_format(wanted: JSONFormat) -> dict[str, Any]:
    if wanted.schema is None:
        return {"type": "json_object"}
    described: dict[str, Any] = {"name": wanted.name, "schema": json.loads(wanted.schema)}
    if wanted.is_strict is not None:
        described["strict"] = wanted.is_strict
    return {"type": "json_schema", "json_schema": described}


async def _chunks(response: httpx.Response) -> AsyncGenerator[_Chunk, None]:
    async with aclosing(_events(response)) as events:
        async for data in events:
            # Read on behind it to the end, so that the connection can serve again.
            if data.strip() == b"[DONE]":
                continue
            try:
                chunk = _Chunk.model_validate_json(data)
            except ValidationError as error:
                raise _broken("holds a chunk that cannot be read") from error
            if chunk.error is not None:
                raise _broken(f"ended with an error: {_message_of(chunk.error) or 'it gave no reason'}")
            yield chunk


async def _events(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """Yield the data of each server-sent event.

    httpx's own lines end at U+2028 too, which may stand in a JSON text.
    """
    rest = b""
    data: list[bytes] = []
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > MAX_EVENT_BYTES:
            raise _broken(f"holds a chunk of more than {MAX_EVENT_BYTES // 2**20} MiB")
        for line in lines:
            if line.startswith(b"data:"):
                data.append(line.removeprefix(b"data:").removeprefix(b" ").rstrip(b"\r"))
            elif not line.rstrip(b"\r") and data:
                yield b"\n".join(data)
                data = []
    if rest.startswith(b"data:"):
        data.append(rest.removeprefix(b"data:"))
    if data:
        yield b"\n".join(data)


async def _late_usage(chunks: AsyncGenerator[_Chunk, None]) -> _Usage | None:
    """Wait a moment for what follows the last token; the answer is whole without it."""
    usage = None
    with suppress(TimeoutError, LLMUnavailable, httpx.HTTPError):
        async with asyncio.timeout(USAGE_TIMEOUT_S):
            async for chunk in chunks:
                usage = chunk.usage or usage
    return usage


def _broken(how: str) -> LLMUnavailable:
    return LLMUnavailable(f"The language model's stream {how}. Try again shortly.", retry_after_s=2)


def _is_about_context(said: str) -> bool:
    """Recognise the words of vLLM, OpenAI, Ollama and llama.cpp."""
    said = said.lower()
    return "context" in said and any(word in said for word in ("length", "window", "size"))


def _message_of(error: object) -> str:
    """Find the words in an error object, which is a mapping, or plain text."""
    if isinstance(error, Mapping):
        error = error.get("message") or error.get("detail")
    return _first_line(error).rstrip(".") if isinstance(error, str) else ""


def _param_of(body: bytes) -> str | None:
    """Find which field an error object is about."""
    try:
        param = json.loads(body)["error"]["param"]
    except (ValueError, LookupError, TypeError):
        return None
    return param[:MAX_QUOTED] if isinstance(param, str) else None


def _retry_after_s(header: str) -> int | None:
    """Read seconds or a date, as HTTP allows both."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return round(min(max(seconds, 1), MAX_RETRY_AFTER_S)) if seconds == seconds else None


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0][:MAX_QUOTED]
