"""What stands in deploy/ fits the code and itself. Nothing is started: no Ray, no container, no Kubernetes."""

import importlib.metadata
import importlib.util
import json
import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve._private.build_app import build_app
from ray.serve.deployment import Deployment
from ray.serve.schema import ServeDeploySchema

from app.config import DEPLOYMENTS, Config, load_config
from app.settings import Settings
from deployments import application

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OPTION = re.compile(r"^( +)# ", re.MULTILINE)
"""An option that is commented out. Other comments are not indented, or follow something."""


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


# --- Serve configs ---------------------------------------------------------------------------------------------------

KUBERAY = (DEPLOY / "kuberay.yaml").read_text(encoding="utf-8")
RAY_SERVICES = {"kuberay.yaml": KUBERAY, "kuberay.yaml with all options": OPTION.sub(r"\1", KUBERAY)}
SERVE_CONFIGS = {
    path.name: path.read_text(encoding="utf-8")
    for path in [ROOT / "serve_config.yaml", *sorted(DEPLOY.glob("*.yaml"))]
    if any("applications" in one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")))
} | {name: yaml.safe_load(text)["spec"]["serveConfigV2"] for name, text in RAY_SERVICES.items()}
GUIDE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
(MANUAL,) = re.findall(r"^ *```yaml\n(.*?)^ *```", GUIDE, re.MULTILINE | re.DOTALL)
SERVE_CONFIGS["docs/deploy.md"] = textwrap.dedent(MANUAL)


@dataclass(frozen=True)
class Served:
    """A Serve config, and the deployments that come of it."""

    document: dict[str, Any]
    config: Config
    device: str
    deployments: Mapping[str, Deployment]


@pytest.fixture(params=sorted(SERVE_CONFIGS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["as written", "gpu"])
def served(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Served:
    monkeypatch.chdir(ROOT)
    path = tmp_path / "config.yaml"
    path.write_text(SERVE_CONFIGS[name], encoding="utf-8")
    config, document = load_config(path), yaml.safe_load(SERVE_CONFIGS[name])
    llm = config.settings.llm
    device = llm.device if request.param == "as written" else "gpu"
    llm = llm.model_copy(update={"model": str(model) if llm.engine == "vllm" else llm.model, "device": device})
    built = build_app(
        getattr(application, config.topology)(config.settings.model_copy(update={"llm": llm})), name="cleave"
    )
    deployments = {one.name: one for one in built.deployments}
    assert set(deployments) == set(DEPLOYMENTS[config.topology])
    for entry in config.deployments:
        options = {key: value for key, value in entry.items() if key != "name"}
        deployments[entry["name"]] = deployments[entry["name"]].options(**options)
    return Served(document, config, device, deployments)


def test_the_shipped_configs_are_found() -> None:
    expected = {"serve_config.yaml", "monolith.yaml", "two_tier.yaml", "container.yaml", "docs/deploy.md"}
    assert expected <= set(SERVE_CONFIGS)


def test_ray_serve_reads_every_config(name: str) -> None:
    ServeDeploySchema.model_validate(yaml.safe_load(SERVE_CONFIGS[name]))


def test_every_config_builds_its_application(served: Served) -> None:
    assert served.config.settings == Settings.model_validate(served.document["applications"][0]["args"])


def test_no_replica_is_full_before_the_next_one_starts(served: Served) -> None:
    for deployment in served.deployments.values():
        scaling = deployment._deployment_config.autoscaling_config
        assert scaling is None or scaling.get_target_ongoing_requests() < deployment.max_ongoing_requests


def test_only_the_deployment_with_the_language_model_takes_a_gpu(served: Served) -> None:
    """What an entry says in `ray_actor_options` replaces what the builder reserves."""
    takers = [one.name for one in served.deployments.values() if one.ray_actor_options.get("num_gpus")]
    holder = DEPLOYMENTS[served.config.topology][-1]
    assert takers == ([holder] if served.device == "gpu" else [])


def test_what_a_laptop_runs_fits_on_two_cores(served: Served) -> None:
    if served.config.settings.llm.device == "auto":
        assert sum(one.ray_actor_options["num_cpus"] for one in served.deployments.values()) <= 2


@pytest.mark.parametrize("file", ["monolith.yaml", "two_tier.yaml"])
def test_the_topologies_differ_from_the_default_only_in_their_deployments(file: str) -> None:
    default, other = load_config(ROOT / "serve_config.yaml"), load_config(DEPLOY / file)
    assert other.topology == file.removesuffix(".yaml")
    assert (other.settings, other.host, other.port) == (default.settings, default.host, default.port)


def test_the_container_differs_from_the_default_in_its_address_and_its_folder() -> None:
    default, container = load_config(ROOT / "serve_config.yaml"), load_config(DEPLOY / "container.yaml")
    assert container.host == "0.0.0.0"
    assert container.settings.model_copy(update={"data_dir": default.settings.data_dir}) == default.settings
    assert (container.topology, container.deployments) == (default.topology, default.deployments)


# --- Kubernetes ------------------------------------------------------------------------------------------------------


def pods(ray_service: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The pod of each group."""
    cluster = ray_service["spec"]["rayClusterConfig"]
    workers = {group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"]["spec"], **workers}


def keys(tree: Any) -> Iterator[str]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield key
            yield from keys(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from keys(value)


@pytest.fixture(params=sorted(RAY_SERVICES))
def ray_service(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(RAY_SERVICES[request.param])
    return found


def test_the_options_of_the_ray_service_are_commented_out_and_fit() -> None:
    with_options = yaml.safe_load(RAY_SERVICES["kuberay.yaml with all options"])
    names = [one["name"] for one in pods(with_options)["gpu"]["containers"][0]["env"]]
    assert "gcsFaultToleranceOptions" in with_options["spec"]["rayClusterConfig"]
    assert "RAY_SERVE_ENABLE_HA_PROXY" in names
    assert "max_surge_percent: 100" in with_options["spec"]["serveConfigV2"]
    assert "# max_surge_percent" in yaml.safe_load(KUBERAY)["spec"]["serveConfigV2"]


def test_the_ray_service_is_of_the_installed_ray(ray_service: dict[str, Any]) -> None:
    assert (ray_service["apiVersion"], ray_service["kind"]) == ("ray.io/v1", "RayService")
    version = ray_service["spec"]["rayClusterConfig"]["rayVersion"]
    assert f"ray[serve,data]=={version}" in PYPROJECT["project"]["dependencies"]


def test_each_deployment_fits_one_group_of_pods_and_no_other(ray_service: dict[str, Any]) -> None:
    """Ray's own autoscaler says what a pod offers."""
    cluster = ray_service["spec"]["rayClusterConfig"]
    resource = {"metadata": {"name": "cleave", "namespace": "default"}, "spec": cluster}
    offered = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
    entries = yaml.safe_load(ray_service["spec"]["serveConfigV2"])["applications"][0]["deployments"]
    places = {}
    for entry in entries:
        options = entry["ray_actor_options"]
        asked = {"CPU": options["num_cpus"], "GPU": options.get("num_gpus", 0)}
        places[entry["name"]] = [
            group for group, kind in offered.items() if all(kind["resources"].get(k, 0) >= v for k, v in asked.items())
        ]
    assert places == {"Ingress": ["cpu"], "Retriever": ["cpu"], "Batches": ["cpu"], "LLM": ["gpu"]}
    together = sum(entry["ray_actor_options"]["num_cpus"] for entry in entries)
    assert together <= offered["cpu"]["resources"]["CPU"], "a pod holds one replica of each"
    for entry in entries:
        assert entry["autoscaling_config"]["max_replicas"] <= offered[places[entry["name"]][0]]["max_workers"]
    assert (offered["cpu"]["min_workers"], offered["gpu"]["min_workers"]) == (1, 0)
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_every_pod_of_ray_has_the_same_environment_and_its_own_folder(ray_service: dict[str, Any]) -> None:
    data_dir = yaml.safe_load(ray_service["spec"]["serveConfigV2"])["applications"][0]["args"]["data_dir"]
    containers = [container for pod in pods(ray_service).values() for container in pod["containers"]]
    assert all(container["env"] == containers[0]["env"] for container in containers)
    for pod in pods(ray_service).values():
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert data_dir in mounts
        assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}


def test_the_pods_of_the_api_have_the_keys_that_it_needs(ray_service: dict[str, Any]) -> None:
    file = Path(yaml.safe_load(ray_service["spec"]["serveConfigV2"])["applications"][0]["args"]["access"]["keys_file"])
    with_keys = {
        group
        for group, pod in pods(ray_service).items()
        if any(Path(mount["mountPath"]) == file.parent for mount in pod["containers"][0]["volumeMounts"])
    }
    assert with_keys == {"cpu"}
    [secret] = [volume["secret"] for volume in pods(ray_service)["cpu"]["volumes"] if "secret" in volume]
    assert secret["optional"], "a pod starts without it, and lets nobody in"
    assert secret["defaultMode"] & 0o007 == 0


def test_pods_run_the_images_of_the_dockerfile_with_the_command_of_the_operator(ray_service: dict[str, Any]) -> None:
    images = {group: [one["image"] for one in pod["containers"]] for group, pod in pods(ray_service).items()}
    assert images == {"head": ["cleave:cpu"], "cpu": ["cleave:cpu"], "gpu": ["cleave:gpu"]}
    for pod in pods(ray_service).values():
        assert {"command", "args"}.isdisjoint(pod["containers"][0])
        assert {"requests", "limits"} == set(pod["containers"][0]["resources"])
    assert pods(ray_service)["gpu"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pods(ray_service)["gpu"]["tolerations"][0]["key"] == "nvidia.com/gpu"


def test_no_pod_is_privileged() -> None:
    qdrant = next(one for one in documents("qdrant.yaml") if one["kind"] == "StatefulSet")["spec"]["template"]["spec"]
    for pod in [*pods(yaml.safe_load(KUBERAY)).values(), qdrant]:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert {"privileged", "hostNetwork", "hostPID", "hostIPC", "hostPath"}.isdisjoint(keys(pod))
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_secrets_come_from_secrets_and_may_be_missing(ray_service: dict[str, Any]) -> None:
    environment = pods(ray_service)["head"]["containers"][0]["env"]
    secrets = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in environment if "valueFrom" in one}
    assert set(secrets) == {"HF_TOKEN", "QDRANT_API_KEY", "LLM_API_KEY"}
    assert all(secret["optional"] for secret in secrets.values())


def test_the_ray_service_names_the_qdrant_server_and_its_key() -> None:
    service, server, policy = documents("qdrant.yaml")
    ray_service = yaml.safe_load(KUBERAY)
    store = yaml.safe_load(ray_service["spec"]["serveConfigV2"])["applications"][0]["args"]["store"]
    (port,) = service["spec"]["ports"]
    assert store["kind"] == "server"
    assert urlsplit(store["url"]).netloc == f"{service['metadata']['name']}:{port['port']}"
    labels = server["spec"]["template"]["metadata"]["labels"]
    assert labels == service["spec"]["selector"] == policy["spec"]["podSelector"]["matchLabels"]
    (container,) = server["spec"]["template"]["spec"]["containers"]
    key = next(one["valueFrom"] for one in container["env"] if one["name"] == "QDRANT__SERVICE__API_KEY")
    environment = pods(ray_service)["head"]["containers"][0]["env"]
    assert key == next(one["valueFrom"] for one in environment if one["name"] == "QDRANT_API_KEY")


# --- The Dockerfile --------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """A stage of the Dockerfile: what it is based on, and its instructions."""

    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [text for word, text in self.instructions if word == instruction]


def read_dockerfile() -> dict[str, Stage]:
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#")).replace("\\\n", " ")
    stages: dict[str, Stage] = {}
    for line in filter(str.strip, text.splitlines()):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stages[name] = stage = Stage(base)
        else:
            stage.instructions.append((word, " ".join(rest.split())))
    return stages


STAGES = read_dockerfile()
IMAGES = ("cpu", "gpu")


def lineage(name: str) -> list[Stage]:
    """A stage and those that it is based on, nearest first."""
    stage = STAGES[name]
    return [stage, *(lineage(stage.base) if stage.base in STAGES else [])]


def environment_of(name: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for stage in reversed(lineage(name)):
        for line in stage.all("ENV"):
            found |= dict(re.findall(r'(\w+)=("[^"]*"|\S+)', line))
    return found


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_the_user_of_the_pods(image: str) -> None:
    (user,) = STAGES[image].all("USER")
    uid = pods(yaml.safe_load(KUBERAY))["head"]["securityContext"]["runAsUser"]
    assert user == f"{uid}:{uid}"
    assert any(f"useradd --uid {uid} " in line for line in STAGES["base"].all("RUN"))


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_serves_a_file_that_it_holds_on_the_port_that_it_says(image: str) -> None:
    base = STAGES["base"]
    assert base in lineage(image)
    *command, file = json.loads(base.all("CMD")[0])
    assert command == ["cleave", "serve"]
    assert f"{Path(file).parent}/" in [line.split()[0] for line in STAGES[image].all("COPY")]
    config = load_config(ROOT / file)
    assert str(config.port) in base.all("EXPOSE")[0].split()
    assert f":{config.port}/livez" in base.all("HEALTHCHECK")[0]
    assert base.all("VOLUME") == [str(config.settings.data_dir)]


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_installs_for_its_own_device_as_the_makefile_does(image: str) -> None:
    assert f"--from=build-{image} /app/.venv/ .venv/" in STAGES[image].all("COPY")
    assert STAGES[f"build-{image}"].all("RUN")[0].startswith(f"make install DEVICE={image} &&")
    environment = environment_of(image)
    written = [environment[name] for name in ("HF_HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR")]
    assert all(folder.startswith("/data/") for folder in written)


def test_what_the_dockerfile_copies_exists_and_is_not_ignored() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line[1:].rstrip("/") for line in ignore if line.startswith("!")}
    copied = [
        source.rstrip("/")
        for stage in STAGES.values()
        for line in stage.all("COPY")
        if not line.startswith("--from")
        for source in line.split()[:-1]
    ]
    assert copied
    assert set(copied) == allowed
    assert not [source for source in copied if not (ROOT / source).exists()]
    assert "*" in ignore


def test_the_images_hold_what_stands_beside_the_code() -> None:
    copies = [[line for line in STAGES[image].all("COPY") if not line.startswith("--from")] for image in IMAGES]
    assert copies[0] == copies[1]
    packages = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {f"{package}/ {package}/" for package in packages} <= set(copies[0])


def test_nothing_is_run_from_the_network_and_no_registry_is_named() -> None:
    for stage in STAGES.values():
        assert stage.base in STAGES or re.fullmatch(r"[a-z]+:[\w.-]+", stage.base)
        assert not stage.all("ADD")
        for line in stage.all("RUN"):
            assert not re.search(r"\b(curl|wget)\b.*\|", line)
            assert "http" not in line


def test_the_tools_that_the_images_leave_out_are_for_development_only() -> None:
    left_out = set(environment_of("build-cpu")["DEVELOPMENT"].strip('"').split())
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert left_out <= {canonicalize_name(Requirement(line).name) for line in extras["dev"]}
    assert left_out.isdisjoint(needed("cleave", frozenset({"cpu"})))


def needed(package: str, extras: frozenset[str]) -> set[str]:
    """All installed packages that a package needs, itself included."""
    found: set[tuple[str, frozenset[str]]] = set()
    todo = [(package, extras)]
    while todo:
        one = todo.pop()
        if one in found:
            continue
        try:
            requires = importlib.metadata.requires(one[0]) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(one)
        for requirement in map(Requirement, requires):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *one[1]}):
                todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return {name for name, _ in found}


# --- Environment variables -------------------------------------------------------------------------------------------

READ_BY = {
    "HF_TOKEN": ("huggingface_hub", "constants.py"),
    "HF_HOME": ("huggingface_hub", "constants.py"),
    "QDRANT_API_KEY": ("app", "services.py"),
    "LLM_API_KEY": ("app", "services.py"),
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": ("ray", "serve/_private/constants.py"),
    "RAY_SERVE_ENABLE_HA_PROXY": ("ray", "serve/_private/constants.py"),
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": ("ray", "serve/_private/constants.py"),
    "RAY_USAGE_STATS_ENABLED": ("ray", "_common/usage/usage_constants.py"),
    "VLLM_CACHE_ROOT": ("vllm", "envs.py"),
    "VLLM_NO_USAGE_STATS": ("vllm", "envs.py"),
}
"""The file that reads a variable."""
READ_ELSEWHERE = {
    "PATH",
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONUNBUFFERED",
    "TRITON_CACHE_DIR",
    "NVIDIA_DRIVER_CAPABILITIES",
}


def test_every_variable_that_is_set_is_read_by_somebody() -> None:
    with_options = yaml.safe_load(RAY_SERVICES["kuberay.yaml with all options"])
    names = {one["name"] for one in pods(with_options)["head"]["containers"][0]["env"]}
    names |= set(environment_of("cpu")) | set(environment_of("gpu"))
    assert names == set(READ_BY) | READ_ELSEWHERE
    for name, (package, file) in READ_BY.items():
        spec = importlib.util.find_spec(package)
        assert spec
        assert spec.submodule_search_locations
        folder = Path(spec.submodule_search_locations[0])
        assert name in (folder / file).read_text(encoding="utf-8"), name
