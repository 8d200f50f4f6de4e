"""A Serve config as Cleave itself reads it: for the launcher, the doctor and the terminal, before anything starts.

Ray Serve reads the same file minutes later, in several processes, and says what is wrong in tracebacks. Here each
problem is one line that names the file, the key and the way out.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from app.errors import ConfigurationError
from app.settings import Branch, Settings

Entry: TypeAlias = Mapping[str, Any]

BUILDERS = "deployments.application"
DEPLOYMENTS = {
    "monolith": ("Ingress",),
    "two_tier": ("Ingress", "LLM"),
    "three_tier": ("Ingress", "Retriever", "Batches", "LLM"),
}
"""What each topology is made of. The documents belong to the Retriever, or to the Ingress where there is none."""

LIMITS = {"Ingress": (256, 64.0), "Retriever": (64, 16.0), "Batches": (2, 1.0), "LLM": (64, 40.0)}
"""The code's own `max_ongoing_requests` and `target_ongoing_requests`, for what the file leaves out."""

# Ray Serve's own, likewise.
SERVE_HOST = "0.0.0.0"
SERVE_PORT = 8000
SERVE_MAX_ONGOING_REQUESTS = 5
SERVE_TARGET_ONGOING_REQUESTS = 2
SERVE_AUTO_MAX_REPLICAS = 100

EXPECTATION = "Input should be "
INSTANCE = re.compile(r"a valid dictionary or instance of \w+")
ANY_ADDRESS = ("0.0.0.0", "::", "")


@dataclass(frozen=True, slots=True)
class Config:
    """A checked Serve config. `topology` is the name of the builder; `deployments` are the entries as written."""

    path: Path
    settings: Settings
    topology: str
    host: str
    port: int
    deployments: tuple[Entry, ...] = ()

    @property
    def url(self) -> str:
        """Where this machine reaches the service."""
        host = "127.0.0.1" if self.host in ANY_ADDRESS else self.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def load_config(path: Path) -> Config:
    """Read and check a Serve config.

    Raises:
        ConfigurationError: one line that names file and key, and what to change.
    """
    try:
        return _check(path, _read(path))
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error.message}") from None


def check_single_owner(settings: Settings, *, owner: str, max_replicas: int) -> None:
    """Refuse several processes over documents that live in one. Raises `ConfigurationError`."""
    if settings.store.kind == "server" or max_replicas == 1:
        return
    reason = {
        "embedded": "locks its folder for one process",
        "memory": "keeps its documents in one process",
    }[settings.store.kind]
    raise ConfigurationError(
        f"{owner} may run {max_replicas} replicas, but store.kind: {settings.store.kind} {reason}. "
        f"Give {owner} one replica, or run a Qdrant server and set store.kind: server."
    )


def max_replicas(deployment: Entry) -> int:
    """Tell how many replicas an entry of `deployments` allows; Cleave's own default is one."""
    where = f"deployments: {deployment['name']}"
    autoscaling = _mapping(deployment, "autoscaling_config", where)
    fixed: Any = deployment.get("num_replicas")
    default = SERVE_AUTO_MAX_REPLICAS if fixed == "auto" else 1
    most = _number(autoscaling, "max_replicas", f"{where}.autoscaling_config", default=default)
    if fixed in (None, "auto"):
        return int(most)
    return int(max(_number(deployment, "num_replicas", where, default=1), most))


# --- The file --------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Entry:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(
            "there is no such file. Name an existing one, or run in the folder that holds serve_config.yaml."
        ) from None
    except OSError as error:
        raise ConfigurationError(f"cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise ConfigurationError("is not UTF-8 text. Save it as UTF-8.") from None
    except yaml.YAMLError as error:
        raise ConfigurationError(_explain_yaml(error)) from None
    if not isinstance(document, dict):
        raise ConfigurationError("is not a mapping of keys to values. Begin it with `applications:`.")
    return document


def _explain_yaml(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{where}is not valid YAML: {problem or str(error).splitlines()[0]}. Look there for a bracket, quote or tab."


def _check(path: Path, document: Entry) -> Config:
    http = _mapping(document, "http_options")
    port = _number(http, "port", "http_options", default=SERVE_PORT)
    host = http.get("host") or SERVE_HOST
    if not isinstance(host, str):
        raise ConfigurationError("http_options.host must be an address, such as 127.0.0.1.")
    if not 1 <= port <= 65535:
        raise ConfigurationError(f"http_options.port must be from 1 to 65535, and is {port:g}.")
    application = _application(document)
    topology = _topology(application)
    settings = _settings(application)
    deployments = _deployments(application)
    for deployment in deployments:
        _check_belongs(deployment, topology)
        _check_scaling(deployment)
        _check_keeps_gpu(deployment, topology, settings)
        if deployment["name"] == _owner(topology):
            check_single_owner(settings, owner=deployment["name"], max_replicas=max_replicas(deployment))
    return Config(path, settings, topology, host, int(port), deployments)


def _application(document: Entry) -> Entry:
    applications = document.get("applications")
    if not isinstance(applications, list) or not applications:
        raise ConfigurationError("has no application. Add one below `applications:`, with an import_path.")
    first = applications[0]
    if not isinstance(first, dict):
        raise ConfigurationError("applications: the first one must be a mapping with `name` and `import_path`.")
    return first


def _topology(application: Entry) -> str:
    import_path = application.get("import_path")
    module, _, topology = import_path.partition(":") if isinstance(import_path, str) else ("", "", "")
    if not module or not topology:
        raise ConfigurationError(f"import_path must name a builder, such as {BUILDERS}:three_tier.")
    if module == BUILDERS and topology not in DEPLOYMENTS:
        raise ConfigurationError(f"import_path: there is no topology {topology!r}. {_suggest(topology, DEPLOYMENTS)}")
    return topology


def _deployments(application: Entry) -> tuple[Entry, ...]:
    deployments = application.get("deployments")
    if deployments is None:
        return ()
    if not isinstance(deployments, list):
        raise ConfigurationError("deployments must be a list of entries, each with a `name`.")
    for position, deployment in enumerate(deployments):
        if not isinstance(deployment, dict) or not isinstance(deployment.get("name"), str):
            raise ConfigurationError(f"deployments[{position}] must be a mapping with a `name`.")
    return tuple(deployments)


def _mapping(parent: Entry, key: str, where: str = "") -> Entry:
    value = parent.get(key)
    if value is not None and not isinstance(value, dict):
        raise ConfigurationError(f"{where + '.' if where else ''}{key} must be a mapping of keys to values.")
    return value or {}


def _number(parent: Entry, key: str, where: str, *, default: float) -> float:
    value = parent.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigurationError(f"{where}.{key} must be a number, and is {value!r}.")
    return value


# --- Rules about deployments -----------------------------------------------------------------------------------------


def _owner(topology: str) -> str:
    """Name the deployment that owns the documents."""
    return "Retriever" if "Retriever" in DEPLOYMENTS.get(topology, ()) else "Ingress"


def _llm_holder(topology: str) -> str:
    """Name the deployment that holds the LLM."""
    return "LLM" if "LLM" in DEPLOYMENTS.get(topology, ()) else "Ingress"


def _check_belongs(deployment: Entry, topology: str) -> None:
    # A builder of the user's own may have any parts.
    parts = DEPLOYMENTS.get(topology)
    if parts is not None and deployment["name"] not in parts:
        raise ConfigurationError(
            f"deployments: {topology} has no {deployment['name']}, only {', '.join(parts)}. Remove that entry."
        )


def _check_scaling(deployment: Entry) -> None:
    """Refuse a target that a full replica never exceeds."""
    where = f"deployments: {deployment['name']}"
    default_most, default_target = LIMITS.get(deployment["name"], (SERVE_MAX_ONGOING_REQUESTS, None))
    most = _number(deployment, "max_ongoing_requests", where, default=default_most)
    if deployment.get("autoscaling_config") is not None:
        # It takes the place of the code's own as a whole.
        default_target = SERVE_TARGET_ONGOING_REQUESTS
    if default_target is None or deployment.get("num_replicas") not in (None, "auto"):
        return
    autoscaling = _mapping(deployment, "autoscaling_config", where)
    target = _number(autoscaling, "target_ongoing_requests", f"{where}.autoscaling_config", default=default_target)
    if target >= most:
        raise ConfigurationError(
            f"{where}: target_ongoing_requests ({target:g}) is not below max_ongoing_requests ({most:g}), so a full "
            "replica never asks for another. Set the target to 50-75% of the maximum."
        )


def _check_keeps_gpu(deployment: Entry, topology: str, settings: Settings) -> None:
    """Refuse options that take the GPU away: Serve puts them in place of the builder's own, not beside them."""
    options = _mapping(deployment, "ray_actor_options", f"deployments: {deployment['name']}")
    holds_the_llm = topology in DEPLOYMENTS and deployment["name"] == _llm_holder(topology)
    if holds_the_llm and settings.llm.device == "gpu" and options and not options.get("num_gpus"):
        raise ConfigurationError(
            f"deployments: {deployment['name']}.ray_actor_options has no num_gpus, so it would run without a GPU, but "
            "llm.device is gpu. Add num_gpus: 1."
        )


# --- Settings --------------------------------------------------------------------------------------------------------


def _settings(application: Entry) -> Settings:
    try:
        return Settings.model_validate(_mapping(application, "args"))
    except ValidationError as error:
        raise ConfigurationError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    """Say the first problem, a misspelt key before what is missing because of it."""
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    first = _key(problems[0])
    # A value that fits no member of a union has a problem with each of them: the one that got furthest counts.
    key = max((key for key in map(_key, problems) if key[: len(first)] == first), key=len)
    return _sentence(key, [problem for problem in problems if _key(problem) == key])


def _sentence(key: tuple[str, ...], problems: Sequence[ErrorDetails]) -> str:
    name, problem = ".".join(("args", *key)), problems[0]
    match problem["type"]:
        case "extra_forbidden":
            return f"{name} is not a setting. {_suggest(key[-1], _branch_at(key[:-1])[0].model_fields)}"
        case "missing":
            return f"{name} is missing. Add it."
    if problem["input"] is None:
        return f"{name} is empty. Give it a value, or remove the key."
    messages = [INSTANCE.sub("a mapping of settings", problem["msg"]) for problem in problems]
    if not all(message.startswith(EXPECTATION) for message in messages):
        return f"{name}: {messages[0].removeprefix('Value error, ')}."
    return f"{name} should be {' or '.join(message.removeprefix(EXPECTATION) for message in messages)}."


def _key(problem: ErrorDetails) -> tuple[str, ...]:
    """Give the key of a problem, without the names that pydantic puts in for the members of a union."""
    key: tuple[str, ...] = ()
    for part in map(str, problem["loc"]):
        branch, has_names = _branch_at(key)
        if has_names or part in branch.model_fields:
            key += (part,)
    if problem["type"] == "extra_forbidden":
        key += (str(problem["loc"][-1]),)
    return key


def _branch_at(key: Sequence[str]) -> tuple[type[Branch], bool]:
    """Find the innermost branch of the settings tree on the way to a key, and whether the user's own names follow."""
    branch: type[Branch] = Settings
    has_names = False
    for part in key:
        if has_names:
            has_names = False
            continue
        annotation = branch.model_fields[part].annotation
        for member in get_args(annotation) or (annotation,):
            if isinstance(member, type) and issubclass(member, Branch):
                branch = member
                has_names = get_origin(annotation) is dict
    return branch, has_names


def _suggest(misspelt: str, known: Mapping[str, object]) -> str:
    nearest = difflib.get_close_matches(misspelt, known, n=1, cutoff=0.5)
    return f"Did you mean {nearest[0]!r}?" if nearest else f"Known are {', '.join(known)}."
