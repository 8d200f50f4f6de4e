"""Uploads: written to disk as they come, within limits; and what bad clients send, on real sockets."""

import asyncio
import errno
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api import middleware
from app.api.multipart import MAX_FIELD_BYTES, receive_form
from app.domain import Document
from app.errors import ConfigurationError, StorageFull, TooLarge
from app.settings import APISettings
from app.uploads import Loaded, UploadWriter, count_documents, load
from tests.conftest import running as run_service
from tests.conftest import sample_settings
from tests.small_disk import small_disk
from tests.test_ingestions import service
from tests.waiting import wait_until

PATIENCE_S = 60.0
LIMITS = APISettings(max_file_bytes=100_000, max_body_bytes=200_000, max_upload_bytes=2_000_000, min_free_bytes=0)
FORM = "multipart/form-data; boundary=cut"


class Running:
    """A service with small limits, and the folder that uploads go to."""

    def __init__(self, url: str, data_dir: Path) -> None:
        self.url = url
        self.data_dir = data_dir
        self._address = (urlsplit(url).hostname, urlsplit(url).port)

    def connect(self) -> socket.socket:
        return socket.create_connection(self._address, timeout=PATIENCE_S)

    def is_unharmed(self) -> bool:
        """It answers, and nothing is left of the upload."""
        with httpx.Client(base_url=self.url, trust_env=False, timeout=PATIENCE_S) as client:
            assert client.get("/livez").json() == {"status": "ok"}
            assert client.post("/v1/search", json={"query": "tides"}).status_code == 200
        return not self.uploads()

    def uploads(self) -> list[Path]:
        return list((self.data_dir / "uploads").glob("*"))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    data_dir = tmp_path_factory.mktemp("uploads")
    with run_service(sample_settings(data_dir, seed=None, api=LIMITS)) as running_service:
        yield Running(running_service.url, data_dir)


def head(route: str = "/v1/documents", content_type: str = FORM, **headers: str) -> bytes:
    lines = [f"POST {route} HTTP/1.1", "Host: localhost", f"Content-Type: {content_type}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def part(filename: bytes, content: bytes, name: bytes = b"files") -> bytes:
    disposition = b'Content-Disposition: form-data; name="' + name + b'"; filename="' + filename + b'"'
    return b"--cut\r\n" + disposition + b"\r\n\r\n" + content + b"\r\n"


END = b"--cut--\r\n"


def answer(connection: socket.socket) -> tuple[int, dict[str, Any], str]:
    """Read one answer: status, body and head."""
    data = b""
    while b"\r\n\r\n" not in data and (piece := connection.recv(65536)):
        data += piece
    top, _, body = data.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in top.split(b"\r\n")[1:])
    while len(body) < int(fields[b"content-length"]):
        body += connection.recv(65536)
    return int(top.split()[1]), json.loads(body), top.decode()


def send_form(running: Running, form: bytes, route: str = "/v1/documents") -> tuple[int, dict[str, Any]]:
    with running.connect() as connection:
        connection.sendall(head(route, Content_Length=str(len(form))) + form)
        status, body, _ = answer(connection)
    return status, body


# --- Slow, and gone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content_type", [FORM, "application/json"])
@pytest.mark.parametrize("drips", [False, True])
def test_a_body_that_hardly_comes_is_given_up_and_leaves_nothing(
    running: Running, content_type: str, drips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "SLOW_BODY_PATIENCE_S", 0.4)
    # However much came before.
    begin = part(b"slow.md", b"x" * 90_000) if content_type == FORM else b'{"documents": [' + b" " * 90_000
    with running.connect() as connection:
        connection.sendall(head(content_type=content_type, Content_Length="100000") + begin)
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.02):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return  # It has been given up.

        dripping = threading.Thread(target=drip if drips else stop.wait)
        dripping.start()
        try:
            status, body, top = answer(connection)
        finally:
            stop.set()
            dripping.join()
        assert (status, body["error"]["code"]) == (408, "too_slow")
        assert "connection: close" in top.lower()
    assert running.is_unharmed()


def test_a_slow_body_holds_nobody_else_up(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(head(Content_Length="100000") + part(b"slow.md", b"x" * 10))
        wait_until(running.uploads)
        status, body = send_form(running, part(b"quick.md", b"Quick tides.") + END)
        assert (status, body["data"][0]["status"]) == (200, "created")
        assert not running.is_unharmed(), "the slow one is still there"
    wait_until(lambda: not running.uploads())


def test_a_client_that_leaves_in_the_middle_leaves_nothing(running: Running) -> None:
    connection = running.connect()
    connection.sendall(head(Content_Length="1900000") + part(b"a.md", b"a" * 50_000) + part(b"b.md", b"b" * 1_400_000))
    # Some of it is on disk before it leaves.
    wait_until(lambda: any(path.stat().st_size for path in (running.data_dir / "uploads").glob("*/files/*")))
    connection.close()
    wait_until(lambda: not running.uploads())
    assert running.is_unharmed()


# --- Too much --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["/v1/documents", "/v1/documents?background=true", "/v1/search"])
def test_a_large_body_is_refused_by_its_announcement(running: Running, route: str) -> None:
    with running.connect() as connection:
        connection.sendall(head(route, "application/json", Content_Length=str(100 * 2**20)))
        status, body, top = answer(connection)
    assert (status, body["error"]["code"]) == (413, "too_large")
    assert "connection: close" in top.lower()
    assert running.is_unharmed()


@pytest.mark.parametrize(("content_type", "limit"), [("application/json", 200_000), (FORM, 2_000_000)])
def test_a_body_of_unknown_length_is_refused_when_it_is_over_the_limit(
    running: Running, content_type: str, limit: int
) -> None:
    num_sent = 0
    with running.connect() as connection:
        connection.sendall(head(content_type=content_type, Transfer_Encoding="chunked"))
        piece = part(b"a.md", b"x" * 60_000)
        try:
            while num_sent < 100 * 2**20:
                connection.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                num_sent += len(piece)
        except OSError:
            pass  # It does not listen any more.
        else:
            pytest.fail("all of it was taken")
        status, body, _ = answer(connection)
    assert num_sent > limit
    assert (status, body["error"]["code"]) == (413, "too_large")
    assert str(limit) in body["error"]["message"]
    assert running.is_unharmed()


def test_only_uploads_may_be_as_long_as_uploads(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(head("/v1/search", Content_Length="1000000"))
        status, body, _ = answer(connection)
    assert (status, body["error"]["code"]) == (413, "too_large")


def test_a_file_over_its_limit_is_reported_and_the_others_are_taken(running: Running) -> None:
    form = part(b"large.md", b"Word. " * 100_000) + part(b"small.md", b"Small tides.") + END
    status, body = send_form(running, form)
    large, small = body["data"]
    assert (status, large["status"], small["status"]) == (200, "failed", "created")
    assert large["error"] == "large.md: has 0.6 MiB, the limit is 0.1 MiB: split it"
    assert running.is_unharmed()


@pytest.mark.slow
def test_the_memory_does_not_grow_with_an_upload(tmp_path: Path) -> None:
    size, num_files = 20 * 2**20, 15

    def form() -> Iterator[bytes]:
        for n in range(num_files):
            # Of a kind that is not read, so that only the way to the disk counts.
            yield b"--cut\r\n" + f'Content-Disposition: form-data; name="files"; filename="{n}.bin"'.encode()
            yield b"\r\n\r\n"
            for _ in range(size // 2**16):
                yield bytes(2**16)
            yield b"\r\n"
        yield END

    with service(tmp_path) as (process, client):
        client.post("/v1/documents", files={"files": ("a.md", b"Tides.")})
        before = peak_bytes(process.pid)
        response = client.post("/v1/documents", content=form(), headers={"content-type": FORM})
        results = response.json()["data"]
        growth = peak_bytes(process.pid) - before
    assert [one["error"].partition(":")[2][:21] for one in results] == [" unknown kind of file"] * num_files
    assert growth < num_files * size / 3


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


# --- Wrong -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        b"",
        b"cut",
        b"--cut\r\nbroken",
        b"--cut\r\n\r\n\r\n" + END,
        b"--cut\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + END,
        b"--cut\r\nContent-Disposition: form-data; filename=a.md\r\n\r\nx\r\n" + END,
        b"--cut\r\n" + b"X-Header: y\r\n" * 100 + b"\r\nx\r\n" + END,
        b"--cut\r\nX-Header: " + b"y" * 100_000 + b"\r\n\r\nx\r\n" + END,
        b"--other\r\n" + part(b"a.md", b"Text."),
        part(b"a.md", b"Text."),
        part(b"a.md", b"Text.") + b"--cut",
        END,
    ],
)
@pytest.mark.parametrize("route", ["/v1/documents", "/v1/documents?background=true"])
def test_a_form_that_is_none_is_refused_and_leaves_nothing(running: Running, form: bytes, route: str) -> None:
    status, body = send_form(running, form, route)
    assert status == 400, body
    assert body["error"]["type"] == "invalid_request_error"
    assert running.is_unharmed()


@pytest.mark.parametrize(
    "name", ["../../../tmp/cleave-passwd.md", "/etc/cleave.md", "..", "a/../../b.md", "nul\x00.md"]
)
def test_the_name_of_a_file_leads_nowhere(running: Running, name: str) -> None:
    before = {path for path in running.data_dir.rglob("*") if path.is_file()}
    status, body = send_form(running, part(name.encode(), b"Text of tides.") + END)
    assert status == 200
    [one] = body["data"]
    assert one["file"] == name
    if name != "..":
        assert (one["status"], one["document_id"]) == ("created", name.replace("\x00", ""))
    assert {path for path in running.data_dir.rglob("*") if path.is_file()} == before
    assert not Path("/tmp/cleave-passwd.md").exists()
    assert not Path("/etc/cleave.md").exists()


def test_a_name_that_cannot_be_an_id_fails_and_the_others_are_taken(running: Running) -> None:
    names = {b"caf\xe9.md": "not valid UTF-8", b"\xed\xa0\x80.md": "not valid UTF-8", b"n" * 600 + b".md": "characters"}
    form = b"".join(part(name, b"Text.") for name in names) + part("caf\u00e9.md".encode(), b"Text.") + END
    status, body = send_form(running, form)
    *failed, good = body["data"]
    assert (status, good["status"], good["document_id"]) == (200, "created", "caf\u00e9.md")
    for one, reason in zip(failed, names.values(), strict=True):
        assert one["status"] == "failed"
        assert reason in one["error"]


@pytest.mark.parametrize("opening", [b"[", b'{"documents": ', b'{"documents": [{"text": "t", "metadata": {"a": '])
def test_deep_json_is_refused(running: Running, opening: bytes) -> None:
    body = opening + b"[" * 90_000 + b"]" * 90_000
    for route in ("/v1/documents", "/v1/documents?background=true", "/v1/search", "/v1/chat/completions"):
        with running.connect() as connection:
            connection.sendall(head(route, "application/json", Content_Length=str(len(body))) + body)
            assert answer(connection)[0] in (400, 413)
    with httpx.Client(base_url=running.url, trust_env=False, timeout=PATIENCE_S) as client:
        for filters in ("[" * 5_000, '{"a":' * 2_000, '{"a": "\\ud800"}', "[]", "1", '{"a": null}', '{"a": {"b": 1}}'):
            response = client.get("/v1/documents", params={"filters": filters})
            assert (response.status_code, response.json()["error"]["param"]) == (400, "filters")
    assert running.is_unharmed()


# --- A form, by whichever pieces it comes ----------------------------------------------------------------------------

FILE_NAMES = st.text(st.characters(exclude_characters='"\\\r\n', exclude_categories=["Cs"]), max_size=20)
NEARLY_CUT = st.lists(st.sampled_from([b"\r", b"\n", b"--", b"c", b"cut", b"\r\n--cu", b"\r\n--", b"x"])).map(b"".join)
CONTENTS = (st.binary() | NEARLY_CUT).filter(lambda content: b"\r\n--cut" not in b"\r\n" + content)


@given(st.lists(st.tuples(FILE_NAMES, CONTENTS), max_size=4), st.integers(1, 50))
def test_files_are_written_as_they_were_sent(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[str, bytes]], size: int
) -> None:
    folder = tmp_path_factory.mktemp("form")
    field = b'--cut\r\nContent-Disposition: form-data; name="metadata"\r\n\r\n{"a": 1}\r\n'
    form = b"".join(part(name.encode(), content) for name, content in files) + field + END

    async def pieces() -> Any:
        for start in range(0, len(form), size):
            yield form[start : start + size]

    async def receive() -> dict[str, str]:
        return await receive_form(FORM, pieces(), writer)

    writer = UploadWriter(folder, APISettings(min_free_bytes=0))
    writer.open()
    assert asyncio.run(receive()) == {"metadata": '{"a": 1}'}
    writer.finish({})
    written = [(writer.folder / "files" / str(number)).read_bytes() for number in range(writer.num_files)]
    assert written == [content for _, content in files]
    names = [one["name"] for one in json.loads((writer.folder / "upload.json").read_bytes())["files"]]
    assert names == [name or "unnamed" for name, _ in files]
    writer.close()
    assert not list(folder.iterdir())


FIELD = b'--cut\r\nContent-Disposition: form-data; name="a"\r\n\r\n'


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (FIELD + b"x" * (MAX_FIELD_BYTES + 1), "a: is over"),
        ((FIELD + b"\r\n") * 101 + END, "more than 100 fields"),
        (part(b"a.md", b"") * 10_001 + END, "more than 10000 files"),
    ],
)
def test_a_form_of_too_many_parts_is_refused(tmp_path: Path, form: bytes, message: str) -> None:
    async def pieces() -> Any:
        yield form

    writer = UploadWriter(tmp_path, APISettings(min_free_bytes=0))
    writer.open()
    with pytest.raises(TooLarge, match=message):
        asyncio.run(receive_form(FORM, pieces(), writer))
    writer.close()
    assert not list(tmp_path.iterdir())


# --- The disk --------------------------------------------------------------------------------------------------------


def test_an_upload_that_would_fill_the_disk_is_refused_before_it_comes(tmp_path: Path) -> None:
    writer = UploadWriter(tmp_path / "uploads", APISettings(min_free_bytes=2**60))
    with pytest.raises(StorageFull, match="would leave less than"):
        writer.open()
    writer.close()
    writer = UploadWriter(tmp_path / "uploads", APISettings(min_free_bytes=0))
    with pytest.raises(StorageFull, match="free some space"):
        writer.open(num_expected_bytes=2**60)
    writer.close()
    assert not list((tmp_path / "uploads").iterdir())


def test_a_disk_that_fills_up_in_the_middle_is_told_and_given_back(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", size="2m") as mounted:
        writer = UploadWriter(mounted, APISettings(min_free_bytes=0))
        writer.open()
        writer.begin_file("large.md")
        with pytest.raises(StorageFull):
            writer.write(bytes(5 * 2**20))
        writer.close()
        assert not list(mounted.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "uploads").write_text("a file")
    writer = UploadWriter(tmp_path / "uploads", APISettings())
    with pytest.raises(ConfigurationError, match="make it writable, or move data_dir"):
        writer.open()
    writer.close()


def test_a_full_disk_is_told_from_other_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """A file on a disk without room, such as /dev/full."""

        def write(self, content: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            """Nothing is held."""

    writer = UploadWriter(tmp_path, APISettings(min_free_bytes=0))
    writer.open()
    writer.begin_file("a.md")
    writer._open = Full()  # type: ignore[assignment]
    with pytest.raises(StorageFull, match="is full"):
        writer.write(b"x")
    writer.close()


# --- Reading ---------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_in_the_order_sent_from_any_file_on(tmp_path: Path) -> None:
    writer = UploadWriter(tmp_path, APISettings(min_free_bytes=0))
    writer.open()
    for name, content in {"a.md": b"A.", "b.jsonl": b'{"id": 1, "text": "B."}\n\nbroken\n', "c.txt": b""}.items():
        writer.begin_file(name)
        writer.write(content)
        writer.end_file()
    documents = [Document("d", "D", "D's text."), Document("e", "E", "E\u2028 text.", metadata={"n": 1.5, "on": True})]
    writer.add_documents(Loaded(0, one.id, one) for one in documents)
    writer.finish({"set": "x"})
    loaded = list(load(writer.folder, max_bytes=1000))
    assert [(one.file, one.name) for one in loaded] == [
        (0, "a.md"),
        (1, "b.jsonl"),
        (1, "b.jsonl"),
        (2, "c.txt"),
        (3, "d"),
        (3, "e"),
    ]
    assert [one.outcome for one in loaded[-2:]] == documents
    first = loaded[0].outcome
    assert isinstance(first, Document)
    assert first.metadata == {"set": "x"}
    assert count_documents(writer.folder) == len(loaded)
    rest = list(load(writer.folder, max_bytes=1000, first_file=1))
    assert [(one.file, one.name) for one in rest] == [(one.file, one.name) for one in loaded[1:]]
    writer.close()
