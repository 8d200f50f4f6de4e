"""What can be wrong with a model reference is found before an engine starts, and said in one line."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from app.errors import ConfigurationError
from app.models import (
    BUNDLED_CHAT_MODELS,
    BUNDLED_ENCODERS,
    HUB_ID,
    ModelReference,
    check_chat_model,
    is_prepared,
    resolve_chat_model,
    resolve_encoder,
)
from app.services import check_models
from app.settings import LLMSettings, ModelByDevice

BUNDLED = "SmolLM2-135M-Instruct"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def complaint(reference: str | Path, **options: Path) -> str:
    """The one line that says why a chat model cannot be used."""
    with pytest.raises(ConfigurationError) as caught:
        check_chat_model(str(reference), **options)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_the_bundled_models_are_found_without_a_network() -> None:
    for reference in BUNDLED_CHAT_MODELS:
        assert Path(check_chat_model(reference).source).is_file()
    for reference in BUNDLED_ENCODERS:
        assert (Path(resolve_encoder(reference).source) / "config.json").is_file()


# --- Folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_taken_by_its_full_path(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert check_chat_model(str(model)) == resolve_encoder(str(model)) == ModelReference(str(model))
    monkeypatch.chdir(tmp_path)
    assert check_chat_model("model") == check_chat_model("./model") == ModelReference(str(model))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_chat_model("~/model") == ModelReference(str(model))


@pytest.mark.parametrize(
    "reference",
    [
        "/nowhere/model",
        "./model",
        "../model",
        "~/nothing",
        "~no-such-user/model",
        "SmolLM",
        "a/b/c",
        "a b/c",
        "x" * 5000,
        "a\0b",
    ],
)
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused_with_the_forms_that_there_are(
    reference: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    message = complaint(reference)
    assert message.startswith("llm.model: there is no folder ")
    assert "owner/model@revision" in message
    assert BUNDLED in message


def test_the_encoders_errors_name_its_own_setting() -> None:
    with pytest.raises(ConfigurationError, match=r"^embedding\.model: there is no folder.*all-MiniLM-L6-v2"):
        resolve_encoder("/nowhere")


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("config.json", "has no config.json. Name the folder that holds the model itself"),
        ("tokenizer.json", "has no tokenizer (tokenizer.json, tokenizer.model or the like)"),
        ("model.safetensors", "has no weights (*.safetensors)"),
        ("tokenizer_config.json", "has no chat template. Set llm.chat_template to a Jinja file"),
    ],
)
def test_a_folder_says_what_it_lacks(model: Path, missing: str, said: str) -> None:
    (model / missing).unlink()
    message = complaint(model)
    assert message.startswith(f"llm.model: {model} ")
    assert said in message


@pytest.mark.parametrize("content", ["{}", '{"chat_template": null}', "[]", "{", ""])
def test_a_tokenizer_without_a_usable_template_is_refused(model: Path, content: str) -> None:
    (model / "tokenizer_config.json").write_text(content, encoding="utf-8")
    assert "has no chat template" in complaint(model)


def test_a_template_may_stand_in_a_file_of_the_folder_or_of_the_settings(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer_config.json").unlink()
    own = tmp_path / "own.jinja"
    own.write_text(TEMPLATE, encoding="utf-8")
    assert check_chat_model(str(model), chat_template=own) == ModelReference(str(model))
    own.rename(model / "chat_template.jinja")
    assert check_chat_model(str(model)) == ModelReference(str(model))


def test_a_template_file_that_is_not_there_is_named_for_every_model(model: Path, tmp_path: Path) -> None:
    for reference in (model, BUNDLED):
        message = complaint(reference, chat_template=tmp_path / "no.jinja")
        assert message == f"llm.chat_template: there is no file '{tmp_path / 'no.jinja'}'."


def test_an_encoder_needs_no_chat_template(model: Path) -> None:
    (model / "tokenizer_config.json").unlink()
    assert resolve_encoder(str(model)) == ModelReference(str(model))


def test_the_model_of_the_device_is_checked_and_none_without_an_engine_that_needs_one() -> None:
    settings = LLMSettings(model=ModelByDevice(gpu="/nowhere/gpu", cpu=BUNDLED))
    check_models(settings, "cpu")
    with pytest.raises(ConfigurationError, match="/nowhere/gpu"):
        check_models(settings, "gpu")
    check_models(LLMSettings(engine="extractive", model="/nowhere"), "gpu")


# --- The hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("owner/model", ("owner/model", None)),
        ("Qwen/Qwen3-4B-Instruct-2507@cdbee75", ("Qwen/Qwen3-4B-Instruct-2507", "cdbee75")),
        ("owner/model@refs/pr/1", ("owner/model", "refs/pr/1")),
        ("owner/model@", None),
        ("owner/model@a@b", None),
        ("owner", None),
        ("a/b/c", None),
        ("https://huggingface.co/a/b", None),
        ("owner/model\n", None),
    ],
)
def test_a_hub_id_may_name_a_revision(reference: str, expected: tuple[str, str | None] | None) -> None:
    match = HUB_ID.fullmatch(reference)
    assert (match and (match["id"], match["revision"])) == expected


class Hub(BaseHTTPRequestHandler):
    """Answers like the model hub, by the name that is asked for."""

    def do_GET(self) -> None:
        error = next((error for error in ("RepoNotFound", "GatedRepo", "RevisionNotFound") if error in self.path), None)
        self.send_response({"RepoNotFound": 401, "GatedRepo": 403, "RevisionNotFound": 404, None: 200}[error])
        if error:
            self.send_header("X-Error-Code", error)
        body = b"{}" if error else b'{"id": "owner/model", "modelId": "owner/model"}'
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


CHECK = """
import sys
from app.errors import ConfigurationError
from app.models import check_chat_model
for reference in sys.argv[1:]:
    try:
        print(check_chat_model(reference))
    except ConfigurationError as error:
        print(error.message)
"""


def checked(folder: Path, references: list[str], **environment: str) -> list[str]:
    """Check in a process of its own, since the hub's client reads its environment when it is imported."""
    quiet = {"PATH": "", "HF_HOME": str(folder), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*"}
    process = subprocess.run(
        [sys.executable, "-c", CHECK, *references],
        capture_output=True,
        text=True,
        timeout=180,
        env={**quiet, **environment},
        cwd=Path(__file__).parent.parent,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def test_the_hubs_answers_are_said_with_the_way_out(hub: str, tmp_path: Path) -> None:
    references = ["owner/model@main", "owner/RepoNotFound", "owner/GatedRepo", "owner/model@RevisionNotFound"]
    found, unknown, gated, revision = checked(tmp_path, references, HF_ENDPOINT=hub)
    assert found == "ModelReference(source='owner/model', revision='main')"
    assert unknown.startswith("llm.model: the hub has no model 'owner/RepoNotFound' (or it is private: set HF_TOKEN).")
    assert gated == (
        "llm.model: access to owner/GatedRepo must be granted on its hub page. Ask there, then set HF_TOKEN."
    )
    assert revision == "llm.model: owner/model has no revision 'RevisionNotFound'. Correct it or leave it out."


@pytest.mark.parametrize("environment", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_a_hub_that_cannot_be_reached_is_said_at_once(environment: dict[str, str], tmp_path: Path) -> None:
    [message] = checked(tmp_path, ["owner/model"], **environment)
    assert message.startswith("llm.model: 'owner/model' is not in the local cache and the model hub cannot be reached")
    assert message.endswith("Connect, download it beforehand, or name a folder, or a bundled model.")


def test_a_model_in_the_local_cache_needs_no_hub(tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--owner--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc", encoding="utf-8")
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "snapshots" / "abc" / "config.json").write_text("{}", encoding="utf-8")
    [found] = checked(tmp_path, ["owner/model"], HF_HUB_OFFLINE="1")
    assert found == "ModelReference(source='owner/model', revision=None)"


def test_an_id_that_the_hub_could_not_have_is_refused(hub: str, tmp_path: Path) -> None:
    messages = checked(tmp_path, ["owner/a--b", "owner/.a", f"owner/{'x' * 200}", "owner/model.git"], HF_ENDPOINT=hub)
    assert len(messages) == 4
    assert all(message.startswith("llm.model: ") for message in messages)


# --- Preparing the bundled model -------------------------------------------------------------------------------------


def test_a_model_is_prepared_when_its_folder_is_whole(tmp_path: Path) -> None:
    assert not is_prepared(BUNDLED, tmp_path)
    folder = tmp_path / "models" / BUNDLED
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    assert not is_prepared(BUNDLED, tmp_path)
    (folder / "config.json").touch()
    assert is_prepared(BUNDLED, tmp_path)
    assert is_prepared("owner/model", tmp_path)


def test_a_prepared_model_is_not_prepared_again(tmp_path: Path) -> None:
    folder = tmp_path / "models" / BUNDLED
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    assert resolve_chat_model(BUNDLED, data_dir=tmp_path) == ModelReference(str(folder))
    assert [path.name for path in folder.parent.iterdir()] == [BUNDLED]


def test_a_data_folder_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(ConfigurationError, match=r"^data_dir: cannot write .*It needs 300 MB of free space\.$"):
        resolve_chat_model(BUNDLED, data_dir=tmp_path / "data")
