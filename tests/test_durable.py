"""Files that are whole or not there, and what one process has at a time."""

import asyncio
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from app.durable import Hold, finish_in_thread, in_turn, write_whole
from tests.conftest import ROOT

HOLDER = """
import sys, time
from pathlib import Path
from app.durable import Hold
hold = Hold.take(Path(sys.argv[1]))
print(hold is not None, flush=True)
time.sleep(600)
"""


def test_a_folder_is_held_once_until_it_is_let_go(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    hold = Hold.take(folder)
    assert hold is not None
    assert Hold.take(folder) is None
    folder.rename(tmp_path / "two")
    assert Hold.take(folder) is None, "it is gone"
    assert Hold.take(tmp_path / "two") is None, "it is still the same"
    hold.release()
    hold.release()
    with Hold.take(tmp_path / "two") or pytest.fail("it is free"):
        assert Hold.take(tmp_path / "two") is None
    again = Hold.take(tmp_path / "two")
    assert again is not None
    del again
    assert Hold.take(tmp_path / "two") is not None


def test_a_process_that_is_killed_lets_go(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        assert Hold.take(tmp_path) is None
        process.kill()
        process.wait()
    assert Hold.take(tmp_path) is not None


def test_a_file_that_cannot_be_written_keeps_its_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_whole(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError("The power is gone.")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="power"):
        write_whole(path, b"new")
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("state.json", b"old")]
    monkeypatch.undo()
    write_whole(path, b"newer")
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("state.json", b"newer")]


def test_a_secret_is_for_its_owner_from_the_first_byte_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "keys.json", []
    draft = tmp_path / ".keys.json.draft"
    draft.touch(mode=0o644)  # As a kill has left it.
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode)))
    write_whole(path, b"secret", mode=0o600)
    assert seen[0] == 0o600
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_one_waits_until_another_is_through(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    order: list[str] = []
    waits = threading.Event()

    def second() -> None:
        waits.set()
        with in_turn(lock):
            order.append("second")

    with in_turn(lock):
        thread = threading.Thread(target=second)
        thread.start()
        waits.wait()
        # It stands before the lock for as long as we hold it.
        thread.join(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


async def test_who_is_cancelled_waits_for_the_end_of_what_was_begun() -> None:
    has_begun, may_end = threading.Event(), threading.Event()
    steps: list[str] = []

    def work() -> None:
        has_begun.set()
        may_end.wait()
        steps.append("worked")

    task = asyncio.create_task(finish_in_thread(work))
    await asyncio.to_thread(has_begun.wait)
    for _ in range(3):  # As whoever leaves does, and then the service that stops.
        task.cancel()
        await asyncio.sleep(0)
    asyncio.get_running_loop().call_later(0.05, may_end.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps == ["worked"]
