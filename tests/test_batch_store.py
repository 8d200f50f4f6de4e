"""Batches on disk: what is no request, parts that several processes take, and what kills and full disks leave."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from app import batch_lines, batches
from app.batch_lines import ENDPOINT, LineRefused, parse_question, result, unanswered
from app.batches import CANCEL, DONE, MAX_SHOWN_ERRORS, RESULTS, Batch, BatchStore, Part
from app.durable import Hold
from app.errors import BatchNotFound, InvalidRequest, StorageFull, StoredFileNotFound
from app.files import FileStore, StoredFile
from app.settings import APISettings, BatchSettings
from app.uploads import remove_abandoned
from tests.conftest import ROOT
from tests.small_disk import fill, small_disk

BODY = {"model": "cleave", "messages": [{"role": "user", "content": "?"}]}


class Folder:
    """A store of files and batches as one process has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = FileStore(path, APISettings(min_free_bytes=0), BatchSettings())
        self.batches = BatchStore(path, self.files)

    def send(self, content: bytes) -> StoredFile:
        upload = self.files.new_upload()
        upload.open()
        upload.begin_file("requests.jsonl")
        upload.write(content)
        upload.end_file()
        return self.files.take_over(upload, key_id=None)

    def begin(self, content: bytes, *, window_s: float = 3600.0) -> Batch:
        return self.batches.create(
            self.send(content).id,
            endpoint=ENDPOINT,
            completion_window="1h",
            window_s=window_s,
            key_id=None,
            base_url="",
            metadata=None,
        )

    def prepare(self, content: bytes) -> Batch:
        return self.batches.prepare(self.begin(content).id)

    def take(self, batch: Batch) -> Part:
        found = self.batches.take_part(batch)
        assert found is not None
        return found

    def work_off(self, batch: Batch) -> Batch:
        while part := self.batches.take_part(batch):
            with part:
                answer(part)
                part.finish()
        return self.batches.finish(batch.id)

    def read(self, file_id: str | None) -> list[str]:
        if file_id is None:
            return []
        with self.files.content(file_id).open(encoding="utf-8") as file:
            return [json.loads(line)["custom_id"] for line in file]

    def of(self, batch: Batch) -> Path:
        return self.path / "batches" / batch.id


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def request(custom_id: Any, **changes: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": BODY, **changes}


def lines(*contents: Any) -> bytes:
    return b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in contents)


def many(count: int) -> bytes:
    return lines(*(request(f"q{number}") for number in range(count)))


def success(name: str) -> dict[str, Any]:
    return result(name, status=200, body={}, request_id="r")


def failure(name: str) -> dict[str, Any]:
    return result(name, status=404, body={}, request_id="r")


def answer(part: Part, most: int = 10**6, *, failing: frozenset[str] = frozenset()) -> list[int]:
    """Answer what is left of a part; give the numbers of its lines."""
    found = part.remaining()[:most]
    for line in found:
        name = json.loads(line.content)["custom_id"]
        part.write(line, failure(name) if name in failing else success(name))
    return [line.number for line in found]


# --- Lines -----------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[bytes, str, str | None]] = [
    (b"{", "invalid_json_line", None),
    (b"\xff\xfe", "invalid_json_line", None),
    (b"[1]", "invalid_json_line", None),
    (b'"text"', "invalid_json_line", None),
    (b"[" * 10_000, "invalid_json_line", None),
    (b"[" * 100_000, "too_large", None),
    (json.dumps(request("a", body={**BODY, "metadata": {"x": [0] * 30_000}})).encode(), "too_large", None),
    (b"1" * 10_000, "invalid_json_line", None),
    (json.dumps(request(None)).encode(), "missing_required_parameter", "custom_id"),
    (json.dumps(request("")).encode(), "missing_required_parameter", "custom_id"),
    (json.dumps(request(7)).encode(), "missing_required_parameter", "custom_id"),
    (json.dumps(request("x" * 513)).encode(), "invalid_value", "custom_id"),
    (b'{"custom_id": "\\ud800", "body": {}}', "invalid_value", "custom_id"),
    (json.dumps(request("a", method="GET")).encode(), "invalid_method", "method"),
    (json.dumps(request("a", url="/v1/embeddings")).encode(), "invalid_url", "url"),
    (json.dumps(request("a", body=None)).encode(), "missing_required_parameter", "body"),
    (json.dumps(request("a", body=[1])).encode(), "missing_required_parameter", "body"),
    (json.dumps(request("first")).encode(), "duplicate_custom_id", "custom_id"),
]


@pytest.mark.parametrize(("line", "code", "param"), REFUSED, ids=map(str, range(len(REFUSED))))
def test_a_line_that_is_no_request_fails_the_batch_and_is_named(
    folder: Folder, line: bytes, code: str, param: str | None
) -> None:
    batch = folder.prepare(lines(request("first"), b"", line, request("last")))
    assert batch.status == "failed"
    assert batch.ended_at
    (error,) = batch.errors
    assert (error["code"], error["param"], error["line"]) == (code, param, 3)
    assert "\n" not in error["message"]
    assert batch.num_requests == 0


def test_all_wrong_lines_are_told_up_to_a_limit(folder: Folder) -> None:
    batch = folder.prepare(lines(b"{", request("a"), b"{", request("a")))
    assert [(one["line"], one["code"]) for one in batch.errors] == [
        (1, "invalid_json_line"),
        (3, "invalid_json_line"),
        (4, "duplicate_custom_id"),
    ]
    assert len(folder.prepare(b"{\n" * 1000).errors) == MAX_SHOWN_ERRORS


@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\n\t\n"])
def test_a_file_without_requests_fails_its_batch(folder: Folder, content: bytes) -> None:
    batch = folder.prepare(content)
    assert (batch.status, batch.errors[0]["code"]) == ("failed", "empty_file")


def test_blank_lines_foreign_line_ends_and_none_at_the_end_are_taken(folder: Folder) -> None:
    first, second, third = (json.dumps(request(name, body={**BODY, "n": 1})).encode() for name in "abc")
    batch = folder.prepare(b"\xef\xbb\xbf" + first + b"\r\n\r\n  \n" + second + b"\n\n" + third)
    assert (batch.status, batch.num_requests) == ("in_progress", 3)
    with folder.take(batch) as part:
        assert [line.number for line in part.remaining()] == [1, 4, 6]
    assert folder.read(folder.work_off(batch).output_file_id) == ["a", "b", "c"]


def test_a_line_over_the_limit_is_named_also_where_it_begins_with_blanks(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_lines, "MAX_LINE_BYTES", 500)
    long = json.dumps(request("long", body={**BODY, "x": "y" * 5000})).encode()
    batch = folder.prepare(lines(request("a"), long, b" " * 1000 + long, request("b")))
    assert [(one["code"], one["line"]) for one in batch.errors] == [("too_large", 2), ("too_large", 3)]


def test_a_plain_question_is_a_request_too() -> None:
    found = parse_question(b'{"question": "Who?", "rag": {"top_k": 2}}', 7)
    assert found.custom_id == "line-7"
    assert found.body == {"messages": [{"role": "user", "content": "Who?"}], "rag": {"top_k": 2}}
    assert parse_question(b'{"question": "Who?", "id": 5}', 7).custom_id == "5"
    assert parse_question(json.dumps(request("a")).encode(), 7).body == BODY
    with pytest.raises(LineRefused, match="not empty"):
        parse_question(b'{"question": " "}', 7)


# --- Parts -----------------------------------------------------------------------------------------------------------


def test_each_part_is_one_processs_until_it_lets_go(folder: Folder) -> None:
    batch = folder.prepare(many(50))
    assert folder.batches.num_parts(batch) == folder.batches.num_waiting_parts() == 3
    other = Folder(folder.path)
    first, second, third = folder.take(batch), other.take(batch), folder.take(batch)
    assert other.batches.take_part(batch) is None
    taken = [[line.number for line in part.remaining()] for part in (first, second, third)]
    assert [number for part in taken for number in part] == list(range(1, 51))
    with second:
        assert answer(second, 5) == [21, 22, 23, 24, 25]
    again = folder.take(batch)
    assert answer(again) == list(range(26, 41))
    again.finish()
    for part in (first, third, again):
        part.__exit__()
    assert folder.batches.num_waiting_parts() == 2
    done = other.work_off(batch)
    assert (done.status, done.num_completed, done.num_failed) == ("completed", 50, 0)
    assert folder.read(done.output_file_id) == [f"q{number}" for number in range(50)]
    assert done.error_file_id is None


def test_a_batch_is_not_ended_while_a_part_is_left(folder: Folder) -> None:
    batch = folder.prepare(many(30))
    with folder.take(batch) as part:
        answer(part)
        part.finish()
    assert folder.batches.finish(batch.id).status == "in_progress"
    assert folder.work_off(batch).status == "completed"


def test_results_and_errors_are_apart_and_in_order(folder: Folder) -> None:
    batch = folder.prepare(many(45))
    failing = frozenset({"q3", "q22", "q40"})
    parts = [folder.take(batch) for _ in range(3)]
    for part in reversed(parts):
        with part:
            for line in reversed(part.remaining()):
                name = json.loads(line.content)["custom_id"]
                part.write(line, failure(name) if name in failing else success(name))
            part.finish()
    done = folder.batches.finish(batch.id)
    assert folder.read(done.error_file_id) == ["q3", "q22", "q40"]
    assert folder.read(done.output_file_id) == [f"q{n}" for n in range(45) if f"q{n}" not in failing]
    assert (done.num_completed, done.num_failed) == (42, 3)


def test_a_result_that_a_kill_has_cut_short_is_asked_again_and_only_that(folder: Folder) -> None:
    batch = folder.prepare(many(10))
    with folder.take(batch) as part:
        answer(part, 4)
    with (folder.of(batch) / "parts" / "00000" / RESULTS).open("ab") as file:
        file.write('{"line": 5, "result": {"custom_id": "é'.encode()[:-1])
    assert folder.batches.read(batch.id).num_completed == 4
    with folder.take(batch) as part:
        assert answer(part) == [5, 6, 7, 8, 9, 10]
        part.finish()
    assert folder.read(folder.batches.finish(batch.id).output_file_id) == [f"q{n}" for n in range(10)]


def test_to_finish_twice_changes_nothing(folder: Folder) -> None:
    done = folder.work_off(folder.prepare(many(3)))
    assert folder.batches.finish(done.id) == done == folder.batches.prepare(done.id)
    assert len(list((folder.path / "files").iterdir())) == 2


def test_a_kill_between_the_output_file_and_the_state_makes_no_second_file(folder: Folder) -> None:
    batch = folder.prepare(many(3))
    with folder.take(batch) as part:
        answer(part)
        part.finish()
    shutil.copytree(folder.of(batch) / "parts", parts := folder.path / "parts")
    done = folder.batches.finish(batch.id)
    assert not (folder.of(batch) / "parts").exists()
    for state in (
        replace(batch, status="in_progress"),
        replace(batch, status="finalizing", ending="completed", finalizing_at=time.time()),
    ):
        batches._write_state(folder.of(batch), state)
        shutil.copytree(parts, folder.of(batch) / "parts")
        again = folder.batches.finish(batch.id)
        assert (again.status, again.output_file_id) == ("completed", done.output_file_id)
        assert folder.read(again.output_file_id) == ["q0", "q1", "q2"]
    assert not list((folder.path / "uploads").iterdir())


def test_an_input_that_vanishes_later_fails_its_batch_too(folder: Folder) -> None:
    batch = folder.prepare(many(50))
    answer(folder.take(batch))
    folder.files.delete(batch.input_file_id)
    failed = folder.work_off(batch)
    assert (failed.status, failed.errors[0]["code"], failed.num_completed) == ("failed", "invalid_input_file", 20)
    assert not list(folder.batches.unfinished())


def test_a_draft_that_a_kill_leaves_is_removed_with_abandoned_uploads(folder: Folder) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom app.files import FileStore\n"
        "from app.settings import APISettings, BatchSettings\n"
        "def lines():\n    yield b'{}'\n    os.kill(os.getpid(), 9)\n"
        "files = FileStore(Path(sys.argv[1]), APISettings(), BatchSettings())\n"
        "files.write('file-' + '0' * 24, 'x', lines(), key_id=None)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(folder.path)], cwd=ROOT, check=False)
    assert killed.returncode == -9
    (draft,) = (folder.path / "uploads").iterdir()
    os.utime(draft, (0, 0))
    remove_abandoned(folder.path / "uploads")
    assert not draft.exists()
    with pytest.raises(StoredFileNotFound):
        folder.files.read("file-" + "0" * 24)


# --- Ends ------------------------------------------------------------------------------------------------------------


def test_a_batch_that_is_cancelled_keeps_what_was_answered(folder: Folder) -> None:
    batch = folder.prepare(many(30))
    part = folder.take(batch)
    answer(part, 5, failing=frozenset({"q1"}))
    cancelled = folder.batches.cancel(batch.id)
    assert (cancelled.status, cancelled.cancelling_at is not None) == ("cancelling", True)
    assert not folder.batches.is_wanted(batch)
    # Whoever is at work still may write what he has just been answered.
    assert folder.batches.finish(batch.id).status == "cancelling"
    assert folder.batches.take_part(batch) is None
    answer(part, 1)
    part.__exit__()
    done = folder.batches.finish(batch.id)
    assert (done.status, done.num_completed, done.num_failed) == ("cancelled", 5, 1)
    assert folder.read(done.output_file_id) == ["q0", "q2", "q3", "q4", "q5"]
    assert folder.read(done.error_file_id) == ["q1"]
    assert folder.batches.cancel(batch.id) == done


def test_a_batch_in_the_queue_is_cancelled_at_once(folder: Folder) -> None:
    batch = folder.begin(many(3))
    assert folder.batches.cancel(batch.id).status == "cancelling"
    done = folder.batches.prepare(batch.id)
    assert (done.status, done.num_requests, done.output_file_id) == ("cancelled", 0, None)


def test_what_is_not_answered_in_time_stands_among_the_errors(folder: Folder) -> None:
    batch = folder.prepare(many(25))
    with folder.take(batch) as part:
        answer(part, 2, failing=frozenset({"q1"}))
    batches._write_state(folder.of(batch), replace(batch, expires_at=time.time() - 1))
    done = folder.batches.finish(batch.id)
    assert (done.status, done.num_completed, done.num_failed) == ("expired", 1, 24)
    assert done.expired_at
    assert folder.read(done.output_file_id) == ["q0"]
    assert folder.read(done.error_file_id) == [f"q{n}" for n in range(1, 25)]
    last = json.loads(folder.files.content(str(done.error_file_id)).read_text().splitlines()[-1])
    assert (last["error"]["code"], last["response"]) == ("batch_expired", None)


def test_a_batch_that_nobody_has_begun_in_time_expires_whole(folder: Folder) -> None:
    batch = folder.batches.prepare(folder.begin(many(3), window_s=-1).id)
    done = folder.batches.finish(batch.id)
    assert (done.status, done.output_file_id) == ("expired", None)
    assert folder.read(done.error_file_id) == ["q0", "q1", "q2"]


def test_all_is_answered_counts_also_when_the_time_is_over(folder: Folder) -> None:
    batch = folder.prepare(many(3))
    with folder.take(batch) as part:
        answer(part)
        part.finish()
    batches._write_state(folder.of(batch), replace(batch, expires_at=time.time() - 1))
    (folder.of(batch) / CANCEL).touch()
    assert folder.batches.finish(batch.id).status == "completed"


def test_an_input_that_was_deleted_fails_its_batch(folder: Folder) -> None:
    batch = folder.begin(many(3))
    folder.files.delete(batch.input_file_id)
    failed = folder.batches.prepare(batch.id)
    assert (failed.status, failed.errors[0]["code"]) == ("failed", "invalid_input_file")
    assert not list((folder.path / "uploads").iterdir())


def test_names_that_are_no_ids_lead_nowhere(folder: Folder) -> None:
    for name in ("", "..", "batch_", "batch_../../x", "file-" + "0" * 24 + "/..", "batch_" + "0" * 24 + "\n"):
        with pytest.raises(BatchNotFound):
            folder.batches.read(name)
        with pytest.raises(StoredFileNotFound):
            folder.files.read(name)


def test_one_file_is_taken_over(folder: Folder) -> None:
    upload = folder.files.new_upload()
    upload.open()
    with pytest.raises(InvalidRequest, match="0 came"):
        folder.files.take_over(upload, key_id=None)
    upload.close()


# --- Full disks ------------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_is_told_and_the_batch_goes_on_when_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        folder = Folder(disk)
        batch = folder.prepare(many(6))
        with folder.take(batch) as part:
            first, *others = part.remaining()
            part.write(first, success("q0"))
            filler = fill(disk)
            body = {"text": "x" * 6000}  # Of which the beginning still fits.
            for line in others:
                with pytest.raises(StorageFull, match="free some space"):
                    part.write(line, result("q1", status=200, body=body, request_id="r"))
            assert folder.batches.read(batch.id).num_completed == 1
        filler.unlink()
        with folder.take(batch) as part:
            assert answer(part) == [2, 3, 4, 5, 6]
            filler = fill(disk)
            with pytest.raises(StorageFull):
                part.finish()
        with pytest.raises(StorageFull):
            folder.batches.create(
                batch.input_file_id,
                endpoint=ENDPOINT,
                completion_window="1h",
                window_s=1,
                key_id=None,
                base_url="",
                metadata=None,
            )
        filler.unlink()
        with folder.take(batch) as part:
            assert answer(part) == []
            part.finish()
        filler = fill(disk)
        with pytest.raises(StorageFull):
            folder.batches.finish(batch.id)
        assert not folder.batches.read(batch.id).is_finished
        filler.unlink()
        assert folder.read(folder.batches.finish(batch.id).output_file_id) == [f"q{n}" for n in range(6)]


# --- Any order of all that -------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("answer"), st.integers(0, 2), st.integers(0, 25)),
        st.tuples(st.sampled_from(["take", "let go", "tear", "end", "finish"]), st.integers(0, 2), st.just(0)),
    ),
    max_size=60,
)


@given(count=st.integers(1, 65), steps=STEPS)
@hypothesis_settings(max_examples=40, deadline=None)
def test_whatever_processes_do_each_request_is_answered_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, count: int, steps: list[tuple[str, int, int]]
) -> None:
    folder = Folder(tmp_path_factory.mktemp("any"))
    batch = folder.prepare(many(count))
    stores = [Folder(folder.path) for _ in range(3)]
    held: dict[int, Part] = {}
    written: list[int] = []
    for what, who, most in steps:
        part = held.get(who)
        if what == "take" and part is None and (taken := stores[who].batches.take_part(batch)):
            held[who] = taken
        elif what == "answer" and part is not None:
            written += answer(part, most, failing=frozenset({"q7", "q30"}))
        elif what in ("let go", "tear") and part is not None:
            if what == "tear" and (path := part._folder / RESULTS).exists():
                with path.open("ab") as file:
                    file.write(b'{"line": 1, "resu')
            held.pop(who).__exit__()
        elif what == "end" and part is not None and not part.remaining():
            part.finish()
            held.pop(who).__exit__()
        elif what == "finish":
            stores[who].batches.finish(batch.id)
    for part in held.values():
        part.__exit__()
    while part := folder.batches.take_part(batch):
        with part:
            written += answer(part, failing=frozenset({"q7", "q30"}))
            part.finish()
    done = folder.batches.finish(batch.id)
    assert sorted(written) == list(range(1, count + 1))
    failed = [f"q{n}" for n in range(count) if n in (7, 30)]
    assert folder.read(done.error_file_id) == failed
    assert folder.read(done.output_file_id) == [f"q{n}" for n in range(count) if n not in (7, 30)]
    assert (done.status, done.num_completed, done.num_failed) == ("completed", count - len(failed), len(failed))


def test_a_part_is_free_as_soon_as_nobody_asks_for_it(folder: Folder) -> None:
    batch = folder.prepare(many(1))
    hold = Hold.take(folder.of(batch))
    assert hold is not None
    with hold:  # As whoever ends it holds it.
        with folder.take(batch) as part:
            answer(part)
            part.finish()
        assert folder.batches.finish(batch.id).status == "in_progress"
    assert (folder.of(batch) / "parts" / "00000" / DONE).exists()
    assert folder.batches.finish(batch.id).status == "completed"


def test_what_was_never_asked_has_no_response() -> None:
    found = unanswered("a", "batch_expired", "Why.")
    assert (found["custom_id"], found["response"], found["error"]["code"]) == ("a", None, "batch_expired")
    assert not batch_lines.is_success(found)
