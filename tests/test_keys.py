"""The file of keys: written whole, read at once, closed when it is broken."""

import asyncio
import json
import multiprocessing
import re
import shlex
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from app.cli import main
from app.config import Config
from app.errors import ConfigurationError, InvalidKey, InvalidRequest, KeysUnreadable
from app.keys import FORM, Key, KeyFile, check_keys, create_key, read_keys, revoke_key
from app.settings import AccessSettings, Settings

PATIENCE_S = 60.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


async def eventually(found: Callable[[], Any]) -> Any:
    """Wait until it gives no false value."""
    async with asyncio.timeout(PATIENCE_S):
        while not (value := await found()):  # noqa: ASYNC110  # Nothing tells when the file is read.
            await asyncio.sleep(0.02)
        return value


def refused(keys: KeyFile, sent: str) -> Callable[[], Any]:
    async def is_refused() -> bool:
        try:
            await keys.find(sent)
        except InvalidKey:
            return True
        return False

    return is_refused


# --- The file --------------------------------------------------------------------------------------------------------


def test_only_a_hash_is_kept_and_only_the_owner_reads_it(path: Path) -> None:
    key, sent = create_key(path, "acme", read=["acme"])
    secret = FORM.fullmatch(sent)["secret"]  # type: ignore[index]
    assert len(secret) * 6 >= 256
    text = path.read_text()
    assert secret not in text
    assert key.hash in text
    assert secret not in repr(key)
    assert key.hash not in repr(key)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_a_key_is_found_by_its_secret_alone(path: Path, tmp_path: Path) -> None:
    key, sent = create_key(path, "acme", read=["acme"])
    keys = KeyFile(Settings(data_dir=tmp_path))
    assert await keys.find(sent) == key
    for wrong in (
        sent[:-1],
        sent + "x",
        sent.upper(),
        f"cleave-{key.id}-",
        f"cleave-{key.id}-{key.hash}",
        "",
        "unused",
    ):
        with pytest.raises(InvalidKey):
            await keys.find(wrong)


@given(sent=st.text())
async def test_no_text_is_an_error_of_another_kind(sent: str) -> None:
    with pytest.raises(InvalidKey):
        await KeyFile(Settings(data_dir=Path("nowhere"))).find(sent)


async def test_an_expired_key_is_refused_by_name(path: Path, tmp_path: Path) -> None:
    _, sent = create_key(path, "acme", read=["*"], expires_at=datetime.now(UTC) - timedelta(seconds=1))
    with pytest.raises(InvalidKey, match="'acme' has expired"):
        await KeyFile(Settings(data_dir=tmp_path)).find(sent)


async def test_a_running_service_takes_new_keys_and_refuses_revoked_ones(path: Path, tmp_path: Path) -> None:
    keys = KeyFile(Settings(data_dir=tmp_path))
    assert not await keys.are_needed()
    _, first = create_key(path, "first", is_admin=True)
    assert await eventually(keys.are_needed)
    _, second = create_key(path, "second", is_admin=True)
    await eventually(lambda: _negated(refused(keys, second)))
    revoke_key(path, "first")
    await eventually(refused(keys, first))
    assert (await keys.find(second)).name == "second"


async def _negated(question: Callable[[], Any]) -> bool:
    return not await question()


@pytest.mark.parametrize("loss", [lambda path: path.unlink(), lambda path: path.write_text('{"keys": []}')])
async def test_losing_the_keys_opens_nothing(path: Path, tmp_path: Path, loss: Callable[[Path], Any]) -> None:
    _, sent = create_key(path, "acme", is_admin=True)
    keys = KeyFile(Settings(data_dir=tmp_path))
    assert await keys.find(sent)
    loss(path)
    await eventually(refused(keys, sent))
    assert await keys.are_needed()


async def test_a_file_that_is_named_is_needed_before_it_is_there(tmp_path: Path) -> None:
    keys = KeyFile(Settings(access=AccessSettings(keys_file=tmp_path / "mounted.json")))
    assert await keys.are_needed()


@pytest.mark.parametrize(
    "content", ['{"keys": [', "[]", '{"keys": [{"name": "x"}]}', '{"keys": [], "key": 1}', b"\xff"], ids=str
)
async def test_a_broken_file_lets_nobody_in_until_it_is_mended(
    path: Path, tmp_path: Path, content: str | bytes, caplog: pytest.LogCaptureFixture
) -> None:
    _, sent = create_key(path, "acme", is_admin=True)
    whole = await asyncio.to_thread(path.read_bytes)
    keys = KeyFile(Settings(data_dir=tmp_path))
    assert await keys.find(sent)

    async def is_closed() -> bool:
        try:
            await keys.find(sent)
        except KeysUnreadable:
            return True
        return False

    await asyncio.to_thread(path.write_bytes, content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigurationError, match=r"the file of keys is broken .* `cleave keys create`") as caught:
        read_keys(path)
    assert "\n" not in caught.value.message
    await eventually(is_closed)
    assert await keys.are_needed()
    await asyncio.to_thread(path.write_bytes, whole)
    await eventually(lambda: _negated(is_closed))


def _create(path: Path, number: int) -> None:
    create_key(path, f"key-{number}", read=["*"])


def test_keys_that_are_created_at_the_same_time_are_all_kept(path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        pool.starmap(_create, [(path, number) for number in range(12)])
    assert {key.name for key in read_keys(path)} == {f"key-{number}" for number in range(12)}
    assert {one.name for one in path.parent.iterdir()} == {path.name, f".{path.name}.lock"}


@pytest.mark.parametrize(
    ("name", "rights", "message"),
    [
        ("acme", {}, "A key must be allowed something"),
        ("acme", {"read": ["a/b"]}, "read: 'a/b' cannot be one"),
        ("a b", {"read": ["*"]}, "name: 'a b' cannot be one"),
        ("acme", {"read": ["*"], "default_collection": "a*"}, "default_collection: 'a\\*' cannot be one"),
        ("taken", {"read": ["*"]}, "There is a key 'taken' already"),
    ],
)
def test_a_key_that_cannot_be_is_refused(path: Path, name: str, rights: dict[str, Any], message: str) -> None:
    create_key(path, "taken", is_admin=True)
    with pytest.raises(InvalidRequest, match=message):
        create_key(path, name, **rights)
    assert [key.name for key in read_keys(path)] == ["taken"]


COLLECTION = st.text("abcXYZ019_-", min_size=1, max_size=6)


@given(collection=COLLECTION, other=COLLECTION)
def test_rights_are_those_of_the_patterns(collection: str, other: str) -> None:
    def key(**rights: Any) -> Key:
        return Key(id="0" * 12, name="x", hash="0" * 64, created_at=datetime.now(UTC), **rights)

    exact = key(read=[collection], write=[f"{collection}*"])
    assert exact.may_read(other) == (other == collection)
    assert exact.may_write(other) == other.startswith(collection)
    assert key(read=["*"]).may_read(other)
    assert not key(read=["*"]).may_write(other)
    assert key(is_admin=True).may_write(other)


# --- Other machines --------------------------------------------------------------------------------------------------


def config(host: str, folder: Path, **access: Any) -> Config:
    return Config(Path("x.yaml"), Settings(data_dir=folder, access=AccessSettings(**access)), "monolith", host, 8000)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::"])
def test_other_machines_are_served_with_a_key_only(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"`cleave keys create NAME --admin`, or set http_options.host: 127"):
        check_keys(config(host, tmp_path))
    create_key(tmp_path / "keys.json", "old", read=["*"], expires_at=datetime.now(UTC) - timedelta(seconds=1))
    with pytest.raises(ConfigurationError, match="there is no key in"):
        check_keys(config(host, tmp_path))
    check_keys(config(host, tmp_path, allow_without_keys=True))
    create_key(tmp_path / "keys.json", "acme", read=["*"])
    check_keys(config(host, tmp_path))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_this_machine_needs_no_key(host: str, tmp_path: Path) -> None:
    check_keys(config(host, tmp_path))


# --- cleave keys -----------------------------------------------------------------------------------------------------


def cleave_keys(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["keys", *arguments, "--file", str(path)], env={"COLUMNS": "200"})


def test_the_terminal_creates_lists_and_revokes(path: Path) -> None:
    created = cleave_keys(path, "create", "acme", "--read", "acme*", "--write", "acme", "--requests-per-minute", "60")
    assert created.exit_code == 0, created.output
    assert FORM.fullmatch(created.stdout.strip()), "a script can take it from standard output"
    assert "shown this once" in created.stderr
    made = json.loads(cleave_keys(path, "create", "root", "--admin", "--expires", "2999-01-01", "--json").stdout)
    assert FORM.fullmatch(made["key"])
    assert (made["name"], made["is_admin"]) == ("root", True)
    listed = cleave_keys(path, "list")
    for part in ("acme*", "60", "2999-01-01"):
        assert part in listed.stdout
    secrets = [created.stdout.strip().rpartition("-")[2], made["key"].rpartition("-")[2]]
    as_json = cleave_keys(path, "list", "--json").stdout
    assert [(one["name"], one["default_collection"]) for one in json.loads(as_json)] == [
        ("acme", "acme"),
        ("root", None),
    ]
    assert not any(secret in listed.output + as_json for secret in secrets)
    assert "hash" not in as_json
    assert cleave_keys(path, "revoke", "acme").exit_code == 0
    assert [key.name for key in read_keys(path)] == ["root"]
    again = cleave_keys(path, "revoke", "acme")
    assert (again.exit_code, again.stdout) == (2, "")
    assert "There is no key 'acme'" in again.stderr


def test_no_keys_are_said_and_a_broken_file_is_one_line(path: Path) -> None:
    assert "No keys" in cleave_keys(path, "list").stdout
    path.write_text("{")
    broken = cleave_keys(path, "list")
    assert (broken.exit_code, broken.stderr.count("\n")) == (2, 1)


def test_the_config_says_where_the_keys_are(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "applications: [{name: cleave, import_path: 'deployments.application:monolith', "
        f"args: {{data_dir: '{tmp_path}/data'}}}}]"
    )
    result = CliRunner().invoke(main, ["keys", "create", "acme", "--read", "*", "--config", str(file)])
    assert result.exit_code == 0, result.output
    assert [key.name for key in read_keys(tmp_path / "data" / "keys.json")] == ["acme"]


def test_the_key_of_the_readme_is_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^cleave (keys create [^#\n]+)", readme, re.MULTILINE)
    (tmp_path / "serve_config.yaml").write_text(
        yaml.safe_dump({"applications": [{"import_path": "deployments.application:three_tier"}]}), encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, shlex.split(command))
    assert result.exit_code == 0, result.output
    (key,) = read_keys(tmp_path / ".cleave" / "keys.json")
    assert (key.read, key.write, key.requests_per_minute) == (("acme",), ("acme",), 60)
