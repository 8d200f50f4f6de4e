"""The offline batch on Ray Data: lines are read, searched for, answered and written, as a stream.

`cleave batch` runs it as a program, which tells on its standard output how far it is, in lines of JSON.
"""

import argparse
import asyncio
import json
import logging
import os
import pickle
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, cast

import pyarrow as pa
import ray
import ray.data
from ray.actor import ActorHandle
from ray.data import ActorPoolStrategy, DataContext, Dataset, ExecutionResources, TaskPoolStrategy
from ray.exceptions import RayActorError, RayError, RayTaskError

from app.batch_lines import Line, is_success, read_lines
from app.cli.output import FAILED, exit_code
from app.config import Config, load_config
from app.domain import SearchQuery, SearchResult
from app.errors import CleaveError, ConfigurationError, InvalidRequest, RetrieverUnavailable, StoreInUse
from app.offline_answers import Completion, Load, MeasuredLLM, Preparation, settings_of_answers
from app.offline_input import MIN_RANGE_LINES, Index, Range, fingerprint, read_index, read_range
from app.offline_output import Output
from app.retrieval import Retriever
from app.services import build_llm, build_retriever, spare_from_collection
from app.settings import Device, Settings
from app.telemetry import configure_logging, logger
from deployments.placement import business_options, choose_device, cluster_has_gpu, llm_options
from deployments.replica import end_when_dead

INTERRUPTED = 130
MIN_CPUS = 4
"""Logical ones: each stage reserves a share, and with fewer cores than stages none may wait for another's for ever."""
OBJECT_STORE_BYTES = 2**30
READ_AHEAD_BYTES = 256 * 2**20
"""Of lines that are searched for and not yet answered, and of results that wait for an earlier one."""
NUM_READERS = 2
MIN_RANGES_IN_FLIGHT = 4
RELEASE_PATIENCE_S = 20.0
"""How long the processes of a run that was killed may keep the documents."""
HEALTH_CHECK_S = 5.0
CONNECT_TIMEOUT_S = 5.0
MAX_RESTARTS = 3
"""Of a process that dies: then the run ends, and the next one goes on."""
HELD = (
    "The documents are open in another process, such as the service, and the embedded store has one owner: stop it, "
    "use store.kind: server, or send the file to it as a batch (POST /v1/batches)."
)


# --- The stages ------------------------------------------------------------------------------------------------------


class _Retrieval:
    """The process that owns the documents: prepares lines, and searches for those that needed the model first."""

    def __init__(self, settings: Settings, device: Device, base_url: str, patience_s: float) -> None:
        configure_logging(settings.logging)
        self._settings, self._device, self._base_url = settings, device, base_url
        self._patience_s = patience_s
        self._opening: asyncio.Task[tuple[Retriever, Preparation]] | None = None

    async def prepare(self, lines: Sequence[Line], repeated: Sequence[int]) -> list[bytes]:
        """Do the first half of each line."""
        _, preparation = await self._opened()
        return [pickle.dumps(one) for one in await preparation.prepare(lines, repeated)]

    async def search(self, query: SearchQuery) -> SearchResult:
        """Find passages."""
        retriever, _ = await self._opened()
        return await retriever.search(query)

    async def _opened(self) -> tuple[Retriever, Preparation]:
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        return await self._opening

    async def _open(self) -> tuple[Retriever, Preparation]:
        started = time.monotonic()
        while True:
            try:
                retriever = await build_retriever(self._settings)
                break
            except StoreInUse:
                if time.monotonic() - started > self._patience_s:
                    raise ConfigurationError(HELD) from None
                await asyncio.sleep(1)
        await retriever.info()  # Raises when the collection was written with other settings.
        spare_from_collection()
        return retriever, Preparation(self._settings, self._device, retriever, base_url=self._base_url)


class _RemoteSearcher:
    """An `app.retrieval.Searcher` over the process that owns the documents."""

    def __init__(self, retrieval: ActorHandle) -> None:
        self._retrieval = retrieval

    async def search(self, query: SearchQuery) -> SearchResult:
        """See `Searcher.search`."""
        try:
            return cast(SearchResult, await self._retrieval.search.remote(query))
        except RayTaskError as error:
            if isinstance(error.cause, CleaveError):
                raise error.cause from None
            raise
        except RayActorError as error:
            raise RetrieverUnavailable("The retriever is restarting.") from error


class _Generation:
    """The process with the language model."""

    def __init__(self, settings: Settings, device: Device, retrieval: ActorHandle, base_url: str) -> None:
        configure_logging(settings.logging)
        self._settings, self._device, self._base_url = settings, device, base_url
        self._searcher = _RemoteSearcher(retrieval)
        self._id = uuid.uuid4().hex
        # The engine needs a running event loop, and Ray Data has none yet.
        self._opening: asyncio.Task[tuple[MeasuredLLM, Completion]] | None = None
        self._watching: asyncio.Task[None] | None = None

    async def __call__(self, prepared: pa.Table) -> pa.Table:
        """Do the second half of each line."""
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        llm, completion = await self._opening
        lines = [pickle.loads(one) for one in prepared["prepared"].to_pylist()]
        results = await asyncio.gather(*map(completion.complete, lines))
        return pa.table(
            {
                "result": pa.array([json.dumps(one, ensure_ascii=False).encode(errors="replace") for one in results]),
                "is_failed": [not is_success(one) for one in results],
                "engine": [self._id] * len(results),
                "load": [json.dumps(asdict(llm.load()))] * len(results),
            }
        )

    async def _open(self) -> tuple[MeasuredLLM, Completion]:
        settings = self._settings
        llm = MeasuredLLM(await build_llm(settings, self._device), max_num_seqs=settings.llm.max_num_seqs)
        spare_from_collection()
        if settings.llm.engine == "vllm":
            self._watching = asyncio.create_task(self._watch(llm))
        return llm, Completion(settings, self._device, self._searcher, llm, base_url=self._base_url)

    async def _watch(self, llm: MeasuredLLM) -> None:
        """End this process when its engine is dead: Ray starts another, which does the same lines."""
        while True:
            await asyncio.sleep(HEALTH_CHECK_S)
            await end_when_dead(llm)


def _prepared(ranges: pa.Table, source: Path, retrievals: Sequence[ActorHandle]) -> Iterator[pa.Table]:
    """Read ranges of lines, and have each prepared."""
    for one in ranges.to_pylist():
        found = Range(**one)
        lines = read_range(source, found)
        retrieval = retrievals[found.number % len(retrievals)]
        yield pa.table(
            {"prepared": pa.array(ray.get(retrieval.prepare.remote(lines, found.repeated)), pa.large_binary())}
        )


def _dataset(
    index: Index, source: Path, settings: Settings, device: Device, base_url: str, patience_s: float
) -> Dataset:
    """Tie the stages together. Only this node is sure to have the input, and the documents of an embedded store."""
    # Without a reservation: the head of a cluster often offers no CPUs.
    here = {"num_cpus": 0, "label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()}}
    num_engines = int(ray.cluster_resources().get("GPU", 1)) if device == "gpu" else 1
    is_shared = settings.store.kind == "server"
    placed = business_options(device, num_cpus=0.4) if is_shared else here
    retrieval = ray.remote(_Retrieval).options(max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS, **placed)
    retrievals = [
        retrieval.remote(settings, device, base_url, patience_s) for _ in range(max(num_engines, 1) if is_shared else 1)
    ]
    num_in_flight = max(MIN_RANGES_IN_FLIGHT, 4 * settings.llm.max_num_seqs // MIN_RANGE_LINES)
    ranges = ray.data.from_items([asdict(one) for one in index.ranges], override_num_blocks=len(index.ranges))
    return ranges.map_batches(
        _prepared,
        batch_size=None,
        batch_format="pyarrow",
        fn_args=(source, retrievals),
        compute=TaskPoolStrategy(size=NUM_READERS),
        **here,
    ).map_batches(
        _Generation,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=(settings, device, retrievals[0], base_url),
        compute=ActorPoolStrategy(
            min_size=1,
            max_size=max(num_engines, 1),
            max_tasks_in_flight_per_actor=num_in_flight,
            max_concurrent_calls_per_actor=num_in_flight,
        ),
        ray_remote_args_fn=lambda: {"max_restarts": MAX_RESTARTS, "max_task_retries": MAX_RESTARTS},
        **llm_options(device, num_cpus=0.4),
    )


def _configure_ray_data() -> None:
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=READ_AHEAD_BYTES)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


# --- The run ---------------------------------------------------------------------------------------------------------


def _run(
    config: Config, source: Path, target: Path, *, address: str | None, overwrite: bool, tell: Callable[..., None]
) -> dict[str, Any]:
    """Answer what is not answered yet; give the summary."""
    started = time.monotonic()
    settings = _absolute(config.settings)
    if target.exists() and target.samefile(source):
        raise InvalidRequest("The output would take the place of the input. Name another file.")
    if source.exists() and not source.is_file():
        raise InvalidRequest(f"{source} is no regular file. Write its content to one first.")
    found = fingerprint(source)
    is_empty = next(read_lines(source), None) is None
    if not is_empty:
        _start_ray(address)
    device: Device = "cpu" if is_empty else choose_device(settings)
    if device == "gpu" and not cluster_has_gpu():
        raise ConfigurationError(
            f"llm.device is gpu, and {'no node' if address else 'Ray here'} has one. Set it to cpu."
        )
    run = {"input": found, "settings": settings_of_answers(settings, device)}
    with Output.open(target, run, overwrite=overwrite) as output:
        num_before = output.num_done
        index = read_index(source, num_done=num_before, tell=lambda num_bytes: tell(phase="reading", done=num_bytes))

        def tell_progress() -> None:
            tell(phase="answering", done=output.num_done, failed=output.num_failed, total=index.num_requests)

        tell_progress()
        loads: dict[str, Load] = {}
        if index.ranges:
            _configure_ray_data()
            patience_s = RELEASE_PATIENCE_S if output.is_continued else 0.0
            dataset = _dataset(index, source, settings, device, config.url, patience_s)
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                output.append(batch["result"].to_pylist(), num_failed=sum(batch["is_failed"].to_pylist()))
                loads[batch["engine"][-1].as_py()] = Load(**json.loads(batch["load"][-1].as_py()))
                tell_progress()
        output.finish()
        seconds = time.monotonic() - started
        return _summary(output, num_before=num_before, seconds=seconds, load=sum(loads.values(), Load()))


def _summary(output: Output, *, num_before: int, seconds: float, load: Load) -> dict[str, Any]:
    return {
        "requests": output.num_done,
        "completed": output.num_done - output.num_failed,
        "failed": output.num_failed,
        "resumed_from": num_before,
        "seconds": round(seconds, 1),
        "requests_per_second": round((output.num_done - num_before) / seconds, 2),
        "engine": {
            "seconds": round(load.seconds, 1),
            "busy": round(load.busy_s / (load.seconds or 1), 3),
            "full": round(load.full_s / (load.seconds or 1), 3),
            "prompt_tokens": load.prompt_tokens,
            "completion_tokens": load.completion_tokens,
        },
    }


def _start_ray(address: str | None) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        num_cpus = max(MIN_CPUS, os.cpu_count() or 1)
        options |= {"num_cpus": num_cpus, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    else:
        _check_address(address)
    try:
        ray.init(address=address or "local", **options)
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        where = f"the cluster at {address}" if address else "Ray"
        raise ConfigurationError(f"--address: {where} cannot be reached ({_first_line(error)}).") from error


def _check_address(address: str) -> None:
    """Refuse in seconds what Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdecimal():
        raise InvalidRequest(f"--address: {address!r} is neither HOST:PORT, as `ray start` tells it, nor auto.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError):
        raise InvalidRequest(
            f"--address: no Ray cluster answers at {address}. Name another, or leave it out."
        ) from None


def _absolute(settings: Settings) -> Settings:
    """Make paths independent of the folder that a process runs in."""
    update: dict[str, Any] = {"data_dir": settings.data_dir.resolve()}
    if settings.seed is not None:
        update["seed"] = settings.seed.resolve()
    if settings.llm.chat_template is not None:
        update["llm"] = settings.llm.model_copy(update={"chat_template": settings.llm.chat_template.resolve()})
    return settings.model_copy(update=update)


def _cause(error: BaseException | None) -> CleaveError | None:
    """Find the error of ours in what Ray and Ray Data make of it."""
    while error is not None:
        if isinstance(error, CleaveError) and not isinstance(error, RayError):
            return error
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


# --- The program -----------------------------------------------------------------------------------------------------


def _tell(descriptor: int, **what: Any) -> None:
    """Tell whoever has started this program."""
    line = json.dumps(what, ensure_ascii=False) + "\n"
    os.write(descriptor, line.encode(errors="replace"))


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    """Stop when whoever has started this program has ended, however that happened."""
    # Unbuffered: a thread that waits within Python's own buffer keeps the interpreter from its end.
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGINT)


def main() -> int:
    """Run one offline batch; return the exit code of `cleave batch`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--address")
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    tell = partial(_tell, os.dup(1))
    os.dup2(2, 1)  # What libraries print is told to nobody.
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        config = load_config(arguments.config)
        configure_logging(config.settings.logging)
        summary = _run(
            config,
            arguments.source.resolve(),
            arguments.target.resolve(),
            address=arguments.address,
            overwrite=arguments.overwrite,
            tell=tell,
        )
        tell(phase="done", summary=summary)
        return FAILED if summary["failed"] else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        logger.exception("the run ended early")
        found = _cause(error)
        tell(
            phase="failed",
            message=found.message if found else f"unexpected error ({type(error).__name__}: {_first_line(error)})",
        )
        return exit_code(found) if found else FAILED
    finally:
        ray.shutdown()


if __name__ == "__main__":
    # Ray passes on by its name what an imported module holds, and by value what stands in this one.
    from deployments.offline import main as run_imported

    sys.exit(run_imported())
