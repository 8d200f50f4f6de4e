"""Batches: files of requests that are answered when there is time, by any number of processes that share a folder.

All there is to know of a batch is in its folder. So every process can tell how far it is, work on a part of it, and go
on where one that has ended left off:

    batches/batch_.../
        state.json          what it is, always whole; written by who holds the folder (`Hold`)
        parts.json          where in the input file each part begins: from here on it is in progress
        parts/00000/        a run of requests; the process that holds it answers them
            results.jsonl   one line a request, only ever added to: what is written there is answered
            done            all of it is answered
        cancel              somebody wants it to end
        webhook.json        somebody is to be told of its end
"""

import errno
import itertools
import json
import math
import os
import shutil
import threading
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from app.batch_lines import Line, LineRefused, SeenIds, is_success, parse_request, read_lines, unanswered
from app.durable import Hold, write_whole
from app.errors import BatchNotFound, StoredFileNotFound
from app.files import FileStore
from app.identifiers import new_id, pattern
from app.uploads import explained

Status: TypeAlias = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]

Ending: TypeAlias = Literal["completed", "expired", "cancelled"]

STATE, PARTS, RESULTS, DONE, CANCEL, WEBHOOK = (
    "state.json",
    "parts.json",
    "results.jsonl",
    "done",
    "cancel",
    "webhook.json",
)
ID = pattern("batch_")
MAX_PARTS = 1_000
MIN_PART_LINES = 20
"""A part is what one process works on, and what the others leave alone meanwhile."""
MAX_SHOWN_ERRORS = 100
EXPIRED = "This request was not answered before the batch's completion window ended."


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch and how far it is. Times are seconds since the epoch."""

    id: str
    status: Status
    input_file_id: str
    endpoint: str
    completion_window: str
    created_at: float
    expires_at: float
    key_id: str | None = None
    """Whose it is, and with whose rights it is answered."""
    base_url: str = ""
    """Where documents without an address of their own are found."""
    metadata: Mapping[str, str] | None = None
    ending: Ending | None = None
    """What it will be once its files are written."""
    errors: tuple[Mapping[str, Any], ...] = ()
    """Why it failed: lines that are no requests."""
    num_requests: int = 0
    num_completed: int = 0
    num_failed: int = 0
    in_progress_at: float | None = None
    finalizing_at: float | None = None
    completed_at: float | None = None
    failed_at: float | None = None
    expired_at: float | None = None
    cancelling_at: float | None = None
    cancelled_at: float | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None

    @property
    def is_finished(self) -> bool:
        """Nothing more will come."""
        return self.ended_at is not None

    @property
    def ended_at(self) -> float | None:
        """When it was finished."""
        return self.completed_at or self.failed_at or self.expired_at or self.cancelled_at


FIELDS = frozenset(field.name for field in fields(Batch))


class Part:
    """A run of a batch's requests that this process holds. A context manager; all of it blocks."""

    def __init__(self, folder: Path, hold: Hold, lines: Sequence[Line]) -> None:
        self._folder = folder
        self._hold = hold
        self._lines = lines
        self._turn = threading.Lock()

    def __enter__(self) -> "Part":
        """It is held already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of it."""
        self._hold.release()

    def remaining(self) -> list[Line]:
        """Give the requests that are not answered yet, and cut off a result that a kill has cut short."""
        answered, num_bytes = set(), 0
        for line in _whole_lines(self._folder / RESULTS):
            answered.add(json.loads(line)["line"])
            num_bytes += len(line)
        if (results := self._folder / RESULTS).exists():
            with results.open("r+b") as file:
                file.truncate(num_bytes)
        return [line for line in self._lines if line.number not in answered]

    def write(self, line: Line, result: Mapping[str, Any]) -> None:
        """Write down what a request was answered with. Raises `StorageFull`."""
        text = json.dumps({"line": line.number, "result": result}, ensure_ascii=False)
        content = f"{text}\n".encode(errors="replace")
        with self._turn, explained(self._folder), (self._folder / RESULTS).open("ab", buffering=0) as file:
            num_bytes = file.seek(0, os.SEEK_END)
            # A disk that fills up takes the beginning, and says so only of the next: that would join the two.
            if file.write(content) < len(content):
                file.truncate(num_bytes)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def finish(self) -> None:
        """Say that all of it is answered."""
        with explained(self._folder):
            with (self._folder / RESULTS).open("rb") as results:
                os.fsync(results.fileno())  # Before what relies on it.
            write_whole(self._folder / DONE, json.dumps(_count(self._folder)).encode())


class BatchStore:
    """The batches below one folder, which all processes of a service share. All of it blocks."""

    def __init__(self, folder: Path, files: FileStore) -> None:
        self._folder = folder / "batches"
        self._files = files

    def create(
        self,
        input_file_id: str,
        *,
        endpoint: str,
        completion_window: str,
        window_s: float,
        key_id: str | None,
        base_url: str,
        metadata: Mapping[str, str] | None,
        has_webhook: bool = False,
    ) -> Batch:
        """Begin a batch. Raises `StorageFull` and `ConfigurationError`."""
        now = time.time()
        batch = Batch(
            id=new_id("batch_"),
            status="validating",
            input_file_id=input_file_id,
            endpoint=endpoint,
            completion_window=completion_window,
            created_at=now,
            expires_at=now + window_s,
            key_id=key_id,
            base_url=base_url,
            metadata=metadata,
        )
        folder = self._path(batch.id)
        with explained(self._folder):
            folder.mkdir(parents=True)
            if has_webhook:
                write_whole(folder / WEBHOOK, json.dumps({"num_attempts": 0, "next_at": now}).encode())
            _write_state(folder, batch)
        return batch

    def read(self, batch_id: str) -> Batch:
        """Say how far one is. Raises `BatchNotFound`."""
        found = _read_state(self._path(batch_id)) if ID.fullmatch(batch_id) else None
        if found is None:
            raise no_batch(batch_id)
        return self._shown(self._path(batch_id), found)

    def recent(self, *, after: str | None) -> Iterator[Batch]:
        """List batches, the newest first, starting behind the id `after`."""
        for batch_id in reversed(self._ids()):
            if (after is None or batch_id < after) and (found := _read_state(self._path(batch_id))):
                yield self._shown(self._path(batch_id), found)

    def cancel(self, batch_id: str) -> Batch:
        """Have one end; what is answered by then is kept. Raises `BatchNotFound`."""
        found = self.read(batch_id)
        if not found.is_finished:
            folder = self._path(batch_id)
            with explained(folder):
                (folder / CANCEL).touch()
        return self.read(batch_id)

    def is_wanted(self, batch: Batch) -> bool:
        """Tell whether its requests are still to be answered."""
        return time.time() < batch.expires_at and not (self._path(batch.id) / CANCEL).exists()

    # --- Working on them ---------------------------------------------------------------------------------------------

    def unfinished(self) -> Iterator[str]:
        """Give the ids of batches that are not finished, the oldest first."""
        for batch_id in self._ids():
            found = _read_state(self._path(batch_id))
            if found is not None and not found.is_finished:
                yield batch_id

    def awaited(self) -> Iterator[tuple[Batch, Path]]:
        """Give the batches that have ended and whose end nobody was told yet, with what is known of the attempts."""
        for path in sorted(self._folder.glob(f"batch_*/{WEBHOOK}")):
            if (found := _read_state(path.parent)) and found.is_finished:
                yield found, path

    def num_parts(self, batch: Batch) -> int:
        """Count the parts of a batch that is in progress."""
        return len(_layout(self._path(batch.id))["starts"])

    def num_waiting_parts(self) -> int:
        """Count the parts that are not done, of all batches; one that is not cut into parts yet counts as one."""
        num_waiting = 0
        for folder in map(self._path, self.unfinished()):
            num_parts = len(_layout(folder)["starts"]) if (folder / PARTS).exists() else 1
            num_waiting += num_parts - len(list(folder.glob(f"parts/*/{DONE}")))
        return num_waiting

    def prepare(self, batch_id: str) -> Batch:
        """Check a new batch's input and cut it into parts, unless another process does just that."""
        folder = self._path(batch_id)
        if _state(folder).status == "validating" and (hold := Hold.take(folder)):
            with hold, explained(folder):
                # Again, since another may have done it meanwhile.
                found = _state(folder)
                if found.status == "validating":
                    _write_state(folder, self._prepared(folder, found))
        return self.read(batch_id)

    def _prepared(self, folder: Path, batch: Batch) -> Batch:
        if (folder / CANCEL).exists():
            return replace(batch, status="cancelled", cancelling_at=_cancelled_at(folder), cancelled_at=time.time())
        try:
            errors, offsets, numbers = _inspect(self._files.content(batch.input_file_id))
        except StoredFileNotFound as error:
            return _failed(batch, _error("invalid_input_file", error.message))
        if errors:
            return _failed(batch, *errors)
        size = max(MIN_PART_LINES, math.ceil(len(offsets) / MAX_PARTS))
        starts = list(zip(offsets[::size], numbers[::size], strict=True))
        write_whole(folder / PARTS, json.dumps({"size": size, "starts": starts}).encode())
        return replace(batch, status="in_progress", in_progress_at=time.time(), num_requests=len(offsets))

    def is_worked_on(self, batch_id: str) -> bool:
        """Tell whether some process holds a part of it."""
        return _is_worked_on(self._path(batch_id))

    def take_part(self, batch: Batch) -> Part | None:
        """Hold the next part that nobody works on; None where there is none left."""
        folder = self._path(batch.id)
        with suppress(StoredFileNotFound):  # `finish` says that it has failed.
            for number, lines in enumerate(self._parts(batch)):
                part = folder / "parts" / f"{number:05}"
                if (part / DONE).exists():
                    continue
                with explained(folder):
                    part.mkdir(parents=True, exist_ok=True)
                    hold = Hold.take(part)
                if hold is not None:
                    # Again, since it may have been done, or the batch ended, meanwhile.
                    if not (part / DONE).exists() and _state(folder).status == "in_progress":
                        return Part(part, hold, list(lines))
                    hold.release()
        return None

    def finish(self, batch_id: str) -> Batch:
        """Write the output files when all is answered, or is to end; nothing is done while others still work on it.

        Raises `StorageFull`; whoever calls this again goes on.
        """
        folder = self._path(batch_id)
        if hold := Hold.take(folder):
            with hold, explained(folder):
                found = _state(folder)
                try:
                    self._files.read(found.input_file_id)
                except StoredFileNotFound as error:
                    if not found.is_finished:
                        counts: dict[str, Any] = _counts(folder)
                        lost = _error("invalid_input_file", error.message)
                        _write_state(folder, found := _failed(replace(found, **counts), lost))
                if found.status == "in_progress" and (ending := self._ending(folder, found)):
                    finalizing = replace(found, status="finalizing", finalizing_at=time.time(), ending=ending)
                    _write_state(folder, found := finalizing)
                # From here on nobody takes a part; who has one lets go of it soon.
                if found.status == "finalizing" and (found.ending == "completed" or not _is_worked_on(folder)):
                    _write_state(folder, self._finished(folder, found))
                    # Its answers are in its files, which can be deleted.
                    shutil.rmtree(folder / "parts", ignore_errors=True)
        return self.read(batch_id)

    def _ending(self, folder: Path, batch: Batch) -> Ending | None:
        """Say how it ends, if it ends now."""
        num_parts, num_done = len(_layout(folder)["starts"]), len(list(folder.glob(f"parts/*/{DONE}")))
        if num_parts == num_done:
            return "completed"
        if self.is_wanted(batch):
            return None
        return "cancelled" if (folder / CANCEL).exists() else "expired"

    def _finished(self, folder: Path, batch: Batch) -> Batch:
        assert batch.ending is not None
        files: dict[str, str] = {}
        # Their ids follow from the batch's: a second attempt after a kill makes no second file.
        for name, digit in (("output", "0"), ("error", "1")):
            lines = self._result_lines(folder, batch, is_error=name == "error")
            if (first := next(lines, None)) is not None:
                file_id = f"file-{batch.id.removeprefix('batch_')[:-1]}{digit}"
                self._files.write(
                    file_id, f"{batch.id}_{name}.jsonl", itertools.chain([first], lines), key_id=batch.key_id
                )
                files[f"{name}_file_id"] = file_id
        counts = _counts(folder)
        if batch.ending == "expired":
            counts["num_failed"] = batch.num_requests - counts["num_completed"]
        times = {f"{batch.ending}_at": time.time(), "cancelling_at": _cancelled_at(folder)}
        changes: dict[str, Any] = {"status": batch.ending, **counts, **files, **times}
        return replace(batch, **changes)

    def _result_lines(self, folder: Path, batch: Batch, *, is_error: bool) -> Iterator[bytes]:
        """Give the lines of one output file, in the order of the input."""
        for number, lines in enumerate(self._parts(batch)):
            results = folder / "parts" / f"{number:05}" / RESULTS
            answered = {one["line"]: one["result"] for one in map(json.loads, _whole_lines(results))}
            if is_error and batch.ending == "expired":
                for line in lines:
                    if line.number not in answered:
                        custom_id = parse_request(line.content).custom_id
                        answered[line.number] = unanswered(custom_id, "batch_expired", EXPIRED)
            for line_number in sorted(answered):
                found = answered[line_number]
                if is_error != is_success(found):
                    yield f"{json.dumps(found, ensure_ascii=False)}\n".encode()

    def _parts(self, batch: Batch) -> Iterator[Iterator[Line]]:
        """Give the lines of each part; they are read when they are asked for."""
        layout = _layout(self._path(batch.id))
        content = self._files.content(batch.input_file_id)
        for offset, number in layout["starts"]:
            yield itertools.islice(read_lines(content, offset, number), layout["size"])

    def _shown(self, folder: Path, batch: Batch) -> Batch:
        """Add up what is answered so far, and tell of a wish to end it."""
        if batch.is_finished:
            return batch
        counts: dict[str, Any] = {}
        with suppress(FileNotFoundError):
            counts = _counts(folder)
        # Its parts go when it ends, perhaps just now: then what they hold no longer counts.
        if (ended := _state(folder)).is_finished:
            return ended
        found = replace(batch, **counts)
        cancelling_at = _cancelled_at(folder)
        return replace(found, status="cancelling", cancelling_at=cancelling_at) if cancelling_at else found

    def _path(self, batch_id: str) -> Path:
        return self._folder / batch_id

    def _ids(self) -> list[str]:
        return sorted(path.name for path in self._folder.glob("batch_*/"))


def no_batch(batch_id: str) -> BatchNotFound:
    """Say that there is none by this id, or none that may be seen."""
    return BatchNotFound(f"There is no batch {batch_id!r} here.", param="batch_id")


def _inspect(path: Path) -> tuple[list[dict[str, Any]], Sequence[int], Sequence[int]]:
    """Check each line; give what is wrong, and of each request where it begins and its line's number."""
    errors: list[dict[str, Any]] = []
    # Of a million requests 16 MB; as tuples they would take ten times as much.
    offsets, numbers = array("q"), array("q")
    with SeenIds() as seen:
        for line in read_lines(path):
            try:
                custom_id = parse_request(line.content).custom_id
                if seen.add(custom_id):
                    message = f"custom_id {custom_id!r} stands in an earlier line too."
                    raise LineRefused("duplicate_custom_id", message, "custom_id")
            except LineRefused as refused:
                errors.append(_error(refused.code, refused.message, refused.param, line.number))
                if len(errors) == MAX_SHOWN_ERRORS:
                    break
            offsets.append(line.offset)
            numbers.append(line.number)
    if not offsets:
        errors.append(_error("empty_file", "The input file holds no request."))
    return errors, offsets, numbers


def _failed(batch: Batch, *errors: Mapping[str, Any]) -> Batch:
    return replace(batch, status="failed", failed_at=time.time(), errors=errors)


def _error(code: str, message: str, param: str | None = None, line: int | None = None) -> dict[str, Any]:
    return {"code": code, "message": message, "param": param, "line": line}


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Read the lines that have an end; there are none while there is no file."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        yield from (line for line in file if line.endswith(b"\n"))


def _is_worked_on(folder: Path) -> bool:
    for part in folder.glob("parts/*/"):
        hold = Hold.take(part)
        if hold is None:
            return True
        hold.release()
    return False


def _cancelled_at(folder: Path) -> float | None:
    """Say since when somebody wants it to end."""
    try:
        return (folder / CANCEL).stat().st_mtime
    except FileNotFoundError:
        return None


def _counts(folder: Path) -> dict[str, int]:
    """Count what is answered in all parts."""
    counts = {"num_completed": 0, "num_failed": 0}
    for part in folder.glob("parts/*/"):
        try:
            found = json.loads((part / DONE).read_bytes())
        except FileNotFoundError:
            found = _count(part)
        for name in counts:
            counts[name] += found[name]
    return counts


def _count(part: Path) -> dict[str, int]:
    results = [is_success(json.loads(line)["result"]) for line in _whole_lines(part / RESULTS)]
    return {"num_completed": sum(results), "num_failed": len(results) - sum(results)}


def _layout(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / PARTS).read_bytes())
    return found


def _state(folder: Path) -> Batch:
    if found := _read_state(folder):
        return found
    raise no_batch(folder.name)


def _read_state(folder: Path) -> Batch | None:
    try:
        content = json.loads((folder / STATE).read_bytes())
        return Batch(**{name: content[name] for name in FIELDS & set(content)})
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _write_state(folder: Path, batch: Batch) -> None:
    write_whole(folder / STATE, json.dumps(asdict(batch), ensure_ascii=False).encode())
