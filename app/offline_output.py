"""The output of an offline batch: whole lines in the order of the input, from which a later run goes on.

OUT.part    the results so far, only ever added to; held by the process that writes it
OUT.run     what they are results of: the input and the settings
OUT         all results, as soon as there are all
"""

import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app.batch_lines import is_success
from app.durable import FULL, sync_folder, write_whole
from app.errors import InvalidRequest, StorageFull

SYNC_EVERY_S = 1.0
"""What a power cut may take: a killed process loses nothing that was written."""


class Output:
    """Results that this process writes, and nobody else meanwhile. A context manager; all of it blocks."""

    def __init__(self, path: Path, descriptor: int, *, overwrites: bool) -> None:
        self._path = path
        self._overwrites = overwrites
        self._part, self._run = part_path(path), _beside(path, ".run")
        self._descriptor = descriptor
        self._synced_at = time.monotonic()
        self._size = 0
        self.is_continued = False
        self.num_done = 0
        self.num_failed = 0

    @classmethod
    def open(cls, path: Path, run: Mapping[str, Any], *, overwrite: bool = False) -> "Output":
        """Begin with the results of a run, or go on with those that are there of the same one.

        Raises:
            InvalidRequest: `path` is there and may not be overwritten, is no place for a file, or is being written by
                another process; or the results there are of another run, and may not be discarded.
            StorageFull: there is no room.
        """
        check_output(path, overwrite=overwrite)
        with _explained(path):
            is_continued = part_path(path).exists()
            descriptor = os.open(part_path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            output = cls(path, descriptor, overwrites=overwrite)
            output.is_continued = is_continued
            try:
                output._hold()
                output._go_on(run, overwrite=overwrite)
            except BaseException:
                output.close()
                raise
        return output

    def append(self, results: Iterable[bytes], *, num_failed: int) -> None:
        """Write the next results, a line each, all or none of them. Raises `StorageFull`."""
        lines = [one + b"\n" for one in results]
        content = memoryview(b"".join(lines))
        with _explained(self._path):
            try:
                num_written = 0
                while num_written < len(content):
                    num_written += os.write(self._descriptor, content[num_written:])
            except BaseException:
                self._cut()
                raise
            self._size += len(content)
            self.num_done += len(lines)
            self.num_failed += num_failed
            if time.monotonic() - self._synced_at > SYNC_EVERY_S:
                os.fsync(self._descriptor)
                self._synced_at = time.monotonic()

    def finish(self) -> None:
        """Give the results their name: there are all. Raises `InvalidRequest` when it was taken meanwhile."""
        check_output(self._path, overwrite=self._overwrites)
        with _explained(self._path):
            os.fsync(self._descriptor)
            self._part.rename(self._path)
            sync_folder(self._path.parent)
            self._run.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "Output":
        """It is held already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of it."""
        self.close()

    def _hold(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # Until it is closed, or the process ends.
        except BlockingIOError:
            raise InvalidRequest(f"Another `cleave batch` writes {self._path}. Wait for its end.") from None
        # Whoever held it may have finished in between, and given this very file its name.
        if not self._part.exists() or not os.path.samestat(os.fstat(self._descriptor), self._part.stat()):
            raise InvalidRequest(f"Another `cleave batch` has just written {self._path}.")

    def _go_on(self, run: Mapping[str, Any], *, overwrite: bool) -> None:
        """Take over the results that are there; cut off one that a kill or a power cut has left incomplete."""
        differences = _differences(_read_run(self._run), run) if os.fstat(self._descriptor).st_size else []
        if differences and not overwrite:
            raise InvalidRequest(
                f"{self._part} was begun with another {', '.join(differences)}. Use the earlier one to go on, or "
                "--overwrite to begin anew."
            )
        if not differences:
            for num_bytes, is_answer in _whole_results(self._part):
                self._size += num_bytes
                self.num_done += 1
                self.num_failed += not is_answer
        self._cut()
        write_whole(self._run, json.dumps(run, indent=1).encode())

    def _cut(self) -> None:
        """Remove what stands behind the results that count."""
        os.ftruncate(self._descriptor, self._size)
        os.lseek(self._descriptor, self._size, os.SEEK_SET)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse a place for results where something is, or where nothing can be. Raises `InvalidRequest`."""
    if path.is_dir() or not path.parent.is_dir():
        raise InvalidRequest(f"{path} cannot be a file. Name one in a folder that is there.")
    if path.exists() and not overwrite:
        raise InvalidRequest(f"{path} is there already. Name another file, or --overwrite it.")


def part_path(path: Path) -> Path:
    """Tell where results stand until there are all."""
    return _beside(path, ".part")


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _whole_results(path: Path) -> Iterator[tuple[int, bool]]:
    """Go through the results that are whole: how long each is, and whether it is an answer."""
    with path.open("rb") as file:
        for line in file:
            try:
                is_answer = is_success(json.loads(line))
            except (ValueError, KeyError, TypeError):
                return
            if not line.endswith(b"\n"):
                return
            yield len(line), is_answer


def _read_run(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Name what is not the same in two runs."""
    if isinstance(before, dict) and isinstance(now, dict):
        prefix = f"{name}." if name else ""
        keys = sorted({*before, *now})
        return [one for key in keys for one in _differences(before.get(key), now.get(key), f"{prefix}{key}")]
    return [] if before == now else [name or "file of requests"]


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageFull(
                f"The disk of {path} is full. Nothing is lost: free some space and run the same again."
            ) from None
        raise InvalidRequest(f"{path} cannot be written ({error.strerror}). Name another file.") from None
