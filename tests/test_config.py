"""`load_config`: the shipped file is accepted, and each mistake is one line that names file, key and way out."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from app.config import LIMITS, Config, check_single_owner, load_config
from app.errors import ConfigurationError
from app.settings import Settings, StoreSettings

ROOT = Path(__file__).parent.parent


def write(folder: Path, *, topology: str = "three_tier", http: object = None, **application: Any) -> Path:
    path = folder / "service.yaml"
    entry = {"name": "cleave", "import_path": f"deployments.application:{topology}", **application}
    document = {"applications": [entry], **({"http_options": http} if http is not None else {})}
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    """The message without the file's name, which each begins with."""
    with pytest.raises(ConfigurationError) as caught:
        load_config(path)
    message = caught.value.message
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_the_shipped_config_loads() -> None:
    config = load_config(ROOT / "serve_config.yaml")
    assert (config.topology, config.host, config.port) == ("three_tier", "127.0.0.1", 8000)
    assert config.settings.llm.device == "auto"
    assert [deployment["name"] for deployment in config.deployments] == ["Ingress", "Retriever", "Batches", "LLM"]


def test_what_the_file_leaves_out_takes_the_defaults_of_ray_serve(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    assert (config.host, config.port, config.settings, config.deployments) == ("0.0.0.0", 8000, Settings(), ())


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:9000"),
        ("::", "http://127.0.0.1:9000"),
        ("10.0.0.7", "http://10.0.0.7:9000"),
        ("::1", "http://[::1]:9000"),
    ],
)
def test_the_url_is_where_this_machine_reaches_the_service(host: str, url: str) -> None:
    assert Config(Path("x"), Settings(), "monolith", host, 9000).url == url


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a mapping"),
        ("- a\n- b\n", "is not a mapping"),
        ("applications: []\n", "has no application"),
        ("http_options: {port: 8000}\n", "has no application"),
        ("applications: [7]\n", "the first one must be a mapping"),
        ("applications:\n  - name: cleave\n", "import_path must name a builder"),
        ("applications:\n  - import_path: nothing\n", "import_path must name a builder"),
        ("a:\n  b: [1\n", "line 3, column 1: is not valid YAML"),
        ("a: 1\n\tb: 2\n", "line 2, column 1: is not valid YAML"),
    ],
)
def test_a_file_that_is_no_serve_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "service.yaml"
    path.write_text(text, encoding="utf-8")
    assert message in refusal(path)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    assert "there is no such file" in refusal(tmp_path / "nowhere.yaml")


def test_a_folder_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    assert "cannot be read (Is a directory)" in refusal(tmp_path)
    binary = tmp_path / "service.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8" in refusal(binary)


def test_a_misspelt_topology_gets_the_nearest_one(tmp_path: Path) -> None:
    assert "Did you mean 'three_tier'?" in refusal(write(tmp_path, topology="three_teir"))


def test_a_builder_of_ones_own_is_taken(tmp_path: Path) -> None:
    path = write(tmp_path, import_path="my.module:build", deployments=[{"name": "Mine", "num_replicas": 3}])
    assert load_config(path).topology == "build"


@pytest.mark.parametrize(
    ("http", "message"),
    [
        (7, "http_options must be a mapping"),
        ({"port": "x"}, "http_options.port must be a number, and is 'x'"),
        ({"port": 0}, "http_options.port must be from 1 to 65535"),
        ({"host": 5}, "http_options.host must be an address"),
    ],
)
def test_a_wrong_address_is_refused(tmp_path: Path, http: object, message: str) -> None:
    assert message in refusal(write(tmp_path, http=http))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"llm": {"devise": "cpu"}}, "args.llm.devise is not a setting. Did you mean 'device'?"),
        ({"zzz": 1}, "args.zzz is not a setting. Known are data_dir, seed, embedding"),
        ({"llm": {"model": {"gpu": "a", "cppu": "b"}}}, "args.llm.model.cppu is not a setting. Did you mean 'cpu'?"),
        ({"llm": {"model": {"gpu": "a"}}}, "args.llm.model.cpu is missing."),
        ({"llm": {"model": 5}}, "args.llm.model should be a valid string or a mapping of settings."),
        ({"profiles": {"mine": {"topk": 3}}}, "args.profiles.mine.topk is not a setting. Did you mean 'top_k'?"),
        ({"profiles": {"mine": {"top_k": 0}}}, "args.profiles.mine.top_k should be greater than or equal to 1."),
        ({"profiles": {"mine": 3}}, "args.profiles.mine should be a mapping of settings."),
        ({"llm": {"device": "tpu"}}, "args.llm.device should be 'auto', 'gpu' or 'cpu'."),
        ({"answer": {"grounding": "gatee"}}, "args.answer.grounding should be 'gate', 'flag' or 'off' or 'auto'."),
        ({"answer": {"temperature": 9}}, "args.answer.temperature should be less than or equal to 2."),
        ({"retrieval": {"top_k": "many"}}, "args.retrieval.top_k should be a valid integer"),
        ({"store": {"collection": "a b"}}, "args.store.collection: String should match pattern"),
        ({"answer": None}, "args.answer is empty."),
        ({"answer": 5}, "args.answer should be a mapping of settings."),
        ({"answer": {"num_passages": 9}}, "answer.num_passages (9) is more than retrieval.top_k (5)"),
        ("text", "args must be a mapping"),
    ],
)
def test_a_wrong_setting_is_named_by_its_path(tmp_path: Path, args: object, message: str) -> None:
    assert message in refusal(write(tmp_path, args=args))


def test_a_secret_of_the_wrong_type_is_not_repeated(tmp_path: Path) -> None:
    assert "4711" not in refusal(write(tmp_path, args={"store": {"api_key": 4711}}))


SEVERAL = [
    {"num_replicas": 2},
    {"num_replicas": "auto"},
    {"autoscaling_config": {"max_replicas": 4}},
    {"num_replicas": "auto", "autoscaling_config": {"max_replicas": 2}},
]
ONE: list[dict[str, Any]] = [
    {},
    {"num_replicas": 1},
    {"num_replicas": None, "autoscaling_config": None},
    {"autoscaling_config": {"min_replicas": 1}},
    {"num_replicas": "auto", "autoscaling_config": {"max_replicas": 1}},
]
OWNERS = [("three_tier", "Retriever"), ("two_tier", "Ingress"), ("monolith", "Ingress")]


@pytest.mark.parametrize("kind", ["embedded", "memory"])
@pytest.mark.parametrize(("topology", "owner"), OWNERS)
@pytest.mark.parametrize("scaling", SEVERAL, ids=str)
def test_documents_in_one_process_refuse_several_owners(
    tmp_path: Path, topology: str, owner: str, scaling: dict[str, Any], kind: str
) -> None:
    deployments = [{"name": owner, **scaling}]
    path = write(tmp_path, topology=topology, args={"store": {"kind": kind}}, deployments=deployments)
    message = refusal(path)
    assert f"{owner} may run" in message
    assert f"store.kind: {kind}" in message
    assert "set store.kind: server" in message


@pytest.mark.parametrize(("topology", "owner"), OWNERS)
@pytest.mark.parametrize("scaling", ONE, ids=str)
def test_one_owner_is_taken(tmp_path: Path, topology: str, owner: str, scaling: dict[str, Any]) -> None:
    load_config(write(tmp_path, topology=topology, deployments=[{"name": owner, **scaling}]))


@pytest.mark.parametrize("scaling", SEVERAL, ids=str)
def test_a_qdrant_server_allows_several_retrievers(tmp_path: Path, scaling: dict[str, Any]) -> None:
    deployments = [{"name": "Retriever", **scaling}]
    load_config(write(tmp_path, args={"store": {"kind": "server"}}, deployments=deployments))


@pytest.mark.parametrize("name", ["Ingress", "LLM"])
def test_parts_without_documents_may_be_several(tmp_path: Path, name: str) -> None:
    load_config(write(tmp_path, deployments=[{"name": name, "num_replicas": 4}]))


def test_the_rule_stands_for_a_replica_that_knows_its_own_maximum() -> None:
    check_single_owner(Settings(), owner="Retriever", max_replicas=1)
    check_single_owner(Settings(store=StoreSettings(kind="server")), owner="Retriever", max_replicas=9)
    with pytest.raises(ConfigurationError, match="Retriever may run 9 replicas"):
        check_single_owner(Settings(), owner="Retriever", max_replicas=9)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"name": "LLM", "max_ongoing_requests": 8, "autoscaling_config": {"target_ongoing_requests": 8}},
            "target_ongoing_requests (8) is not below max_ongoing_requests (8)",
        ),
        (
            {"name": "LLM", "max_ongoing_requests": 2, "autoscaling_config": {"min_replicas": 0}},
            "target_ongoing_requests (2) is not below",
        ),
        ({"name": "Retrievr"}, "three_tier has no Retrievr, only Ingress, Retriever, Batches, LLM"),
        ({"nam": "LLM"}, "deployments[0] must be a mapping with a `name`"),
        ({"name": "Retriever", "num_replicas": "two"}, "num_replicas must be a number, and is 'two'"),
        ({"name": "Retriever", "autoscaling_config": 3}, "autoscaling_config must be a mapping"),
    ],
    ids=str,
)
def test_a_deployment_that_cannot_work_is_refused(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    assert message in refusal(write(tmp_path, deployments=[entry]))


def test_a_deployment_of_another_topology_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, topology="monolith", deployments=[{"name": "LLM"}])
    assert "monolith has no LLM, only Ingress. Remove that entry." in refusal(path)


@pytest.mark.parametrize(
    ("deployment", "said"),
    [
        ({"name": "LLM", "autoscaling_config": {"target_ongoing_requests": 100}}, "(100) is not below .* (64)"),
        ({"name": "Ingress", "max_ongoing_requests": 20}, "(64) is not below .* (20)"),
    ],
)
def test_what_the_file_leaves_out_counts_too(tmp_path: Path, deployment: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said.replace("(", r"\(").replace(")", r"\)")):
        load_config(write(tmp_path, deployments=[deployment]))


def test_the_limits_are_those_of_the_code() -> None:
    from deployments import ingress, llm, retriever

    for deployment in (ingress.Ingress, retriever.Retriever, llm.LLM):
        autoscaling = deployment._deployment_config.autoscaling_config
        assert LIMITS[deployment.name] == (deployment.max_ongoing_requests, autoscaling.target_ongoing_requests)


def test_options_that_take_the_gpu_away_are_refused(tmp_path: Path) -> None:
    args = {"llm": {"device": "gpu"}}
    for options in ({"num_cpus": 2}, {"num_cpus": 2, "num_gpus": 0}):
        with pytest.raises(ConfigurationError, match=r"LLM\.ray_actor_options has no num_gpus"):
            load_config(write(tmp_path, args=args, deployments=[{"name": "LLM", "ray_actor_options": options}]))
    load_config(write(tmp_path, args=args, deployments=[{"name": "LLM", "ray_actor_options": {"num_gpus": 1}}]))
