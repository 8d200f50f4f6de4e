"""Ingestions that go on by themselves: an upload in a folder, worked off by one process at a time, oldest first.

All there is to know of one is in its folder, so every process that has the folder can tell how far it is, and any of
them goes on with it when the one that worked on it has ended:

    ingestions/ing_.../     the process that holds it (`Hold`) works on it
        upload.json, files/ what was sent; the files go when it ends
        state.json          what it is and how far, always whole
        results.jsonl       one line a document, only ever added to: what is written there is done
        cancel              somebody wants it to end

After a kill the lines of `results.jsonl` say where to go on. Documents that were ingested and not yet written down
are met again, as `unchanged`.
"""

import asyncio
import json
import os
import shutil
import time
import uuid
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

from app.domain import Document, IngestReceipt
from app.durable import FULL, Hold, finish_in_thread, write_whole
from app.errors import CleaveError, CollectionMismatch, IngestionNotFound, InvalidRequest, Overloaded, Unavailable
from app.identifiers import new_id, pattern
from app.retrieval import Retriever
from app.settings import APISettings
from app.telemetry import logger
from app.uploads import (
    FILES,
    Group,
    UploadWriter,
    count_documents,
    documents_of,
    explained,
    in_groups,
    load,
    remove_abandoned,
    results_of,
)

T = TypeVar("T")
Status: TypeAlias = Literal["queued", "running", "completed", "failed", "cancelled"]

POLL_S = 2.0
"""How soon a process sees that the one that worked has ended."""
WATCH_S = 0.5
"""How soon work stops when somebody wants it to."""
MIN_RETRY_S, MAX_RETRY_S = 1.0, 30.0
MAX_STARTS = 3
"""Of an ingestion that gets nowhere: a file that ends the process must not end it for ever."""
TIDIED_EVERY_S = 60.0
KEPT_S = 24 * 3600
MAX_KEPT = 1_000
"""Of finished ingestions, the newest; their files go at once."""
MAX_WAITING = 1_000

STATE, RESULTS, CANCEL = "state.json", "results.jsonl", "cancel"
ID = pattern("ing_")


@dataclass(frozen=True, slots=True)
class Ingestion:
    """One ingestion and how far it is. Times are seconds since the epoch."""

    id: str
    status: Status
    collection: str | None
    num_files: int
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    num_documents: int | None = None
    """To do in all; None until they are counted."""
    num_documents_done: int = 0
    num_files_done: int = 0
    num_chunks: int = 0
    num_failed: int = 0
    notice: str | None = None
    """What it waits for."""
    error: str | None = None
    """Why it failed as a whole; of single documents their results say it."""
    num_starts: int = 0
    """By how many processes, since the last result."""
    worker: str | None = None
    """Names the process that works on it, or did."""

    @property
    def is_finished(self) -> bool:
        """Nothing more will come."""
        return self.status in ("completed", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one document; `cursor` is where the next one stands in the log."""

    cursor: int
    content: dict[str, Any]


FIELDS = frozenset(field.name for field in fields(Ingestion))


class Ingestions(Protocol):
    """Takes uploads in and says how far they are."""

    def new_upload(self) -> UploadWriter:
        """Give what writes an upload where it can be taken over."""
        ...

    async def check_room(self) -> None:
        """Raise `Overloaded` when too many wait."""
        ...

    async def submit(self, upload: UploadWriter, *, collection: str | None) -> Ingestion:
        """Take over a finished upload; from here on it survives this process."""
        ...

    async def read(self, ingestion_id: str) -> Ingestion:
        """Say how far one is. Raises `IngestionNotFound`."""
        ...

    async def results(self, ingestion_id: str, *, after: int, limit: int) -> list[Result]:
        """Give results in the order of the documents, those behind the cursor `after`; 0 is the beginning.

        Raises `IngestionNotFound`, and `InvalidRequest` when the cursor is none.
        """
        ...

    async def recent(self, *, after: str | None, limit: int, collection: str | None = None) -> list[Ingestion]:
        """List ingestions, the newest first, starting behind the id `after`; only one collection's if it is named."""
        ...

    async def cancel(self, ingestion_id: str) -> Ingestion:
        """Have one end; what is ingested stays. One that is worked on ends within a second. Raises as `read`."""
        ...

    async def close(self) -> None:
        """Stop working; another process, or this one after its next start, goes on."""
        ...


class _Cancelled(Exception):
    """Somebody wants it to end."""


class IngestionJobs:
    """The ingestions below one folder, which other processes may share; `start` begins to work on them."""

    def __init__(self, folder: Path, retriever: Retriever, limits: APISettings) -> None:
        self._folder = folder / "ingestions"
        self._uploads = folder / "uploads"
        self._retriever = retriever
        self._limits = limits
        self._name = uuid.uuid4().hex
        self._finished: set[str] = set()
        self._added = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Work on what there is, and on what comes."""
        self._worker = asyncio.create_task(self._work(), name="ingestions")

    async def close(self) -> None:
        """Stop working; another process, or this one after its next start, goes on."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
            self._worker = None

    def new_upload(self) -> UploadWriter:
        """Give what writes an upload where it can be taken over."""
        return UploadWriter(self._uploads, self._limits)

    async def check_room(self) -> None:
        """Raise `Overloaded` when too many wait."""
        if len(await asyncio.to_thread(self._ids)) >= MAX_KEPT + MAX_WAITING:
            raise Overloaded("Too many ingestions are waiting. Try again later.", retry_after_s=int(TIDIED_EVERY_S))

    async def submit(self, upload: UploadWriter, *, collection: str | None) -> Ingestion:
        """Take over a finished upload; from here on it survives this process."""
        # Ids sort by time, and the order of ids is the order of work.
        ingestion = Ingestion(
            id=new_id("ing_"),
            status="queued",
            collection=collection,
            num_files=upload.num_files,
            created_at=time.time(),
        )
        await finish_in_thread(self._take_over, upload, ingestion)
        self._added.set()
        return ingestion

    async def read(self, ingestion_id: str) -> Ingestion:
        """Say how far one is. Raises `IngestionNotFound`."""
        return await asyncio.to_thread(self._read, ingestion_id)

    async def results(self, ingestion_id: str, *, after: int, limit: int) -> list[Result]:
        """Give results in the order of the documents, those behind the cursor `after`; 0 is the beginning.

        Raises `IngestionNotFound`, and `InvalidRequest` when the cursor is none.
        """
        return await asyncio.to_thread(self._results, ingestion_id, after, limit)

    async def recent(self, *, after: str | None, limit: int, collection: str | None = None) -> list[Ingestion]:
        """List ingestions, the newest first, starting behind the id `after`; only one collection's if it is named."""
        return await asyncio.to_thread(self._recent, after, limit, collection)

    async def cancel(self, ingestion_id: str) -> Ingestion:
        """Have one end; what is ingested stays. One that is worked on ends within a second. Raises as `read`."""
        return await asyncio.to_thread(self._cancel, ingestion_id)

    # --- What is in the folder ---------------------------------------------------------------------------------------

    def _take_over(self, upload: UploadWriter, ingestion: Ingestion) -> None:
        with explained(self._uploads):
            _write_state(upload.folder, ingestion)
        upload.hand_over(self._path(ingestion.id))

    def _path(self, ingestion_id: str) -> Path:
        return self._folder / ingestion_id

    def _read(self, ingestion_id: str) -> Ingestion:
        if ID.fullmatch(ingestion_id) and (found := _read_state(self._path(ingestion_id))):
            return found
        raise no_ingestion(ingestion_id)

    def _results(self, ingestion_id: str, after: int, limit: int) -> list[Result]:
        self._read(ingestion_id)
        found: list[Result] = []
        try:
            log = (self._path(ingestion_id) / RESULTS).open("rb")
        except FileNotFoundError:
            return found
        with log:
            log.seek(max(after - 1, 0))
            if after > 0 and log.read(1) != b"\n":
                raise InvalidRequest("after: is no cursor that an answer of this ingestion named.", param="after")
            for line in log:
                # A line without its end is still being written.
                if len(found) == limit or not line.endswith(b"\n"):
                    break
                after += len(line)
                content = json.loads(line)
                del content["file_number"]
                found.append(Result(after, content))
        return found

    def _ids(self) -> list[str]:
        return sorted(path.name for path in self._folder.glob("ing_*/"))

    def _recent(self, after: str | None, limit: int, collection: str | None) -> list[Ingestion]:
        found: list[Ingestion] = []
        for ingestion_id in reversed(self._ids()):
            if after is not None and ingestion_id >= after:
                continue
            one = _read_state(self._path(ingestion_id))
            if one is not None and (collection is None or one.collection == collection):
                found.append(one)
            if len(found) == limit:
                break
        return found

    def _cancel(self, ingestion_id: str) -> Ingestion:
        found = self._read(ingestion_id)
        if found.is_finished:
            return found
        folder = self._path(ingestion_id)
        (folder / CANCEL).touch()
        if hold := Hold.take(folder):
            with hold:
                # Nobody works on it, and nobody will.
                found = self._read(ingestion_id)
                return found if found.is_finished else _finish(folder, found, "cancelled")
        return found

    def _take_next(self) -> tuple[Ingestion, Hold] | None:
        """Hold the oldest that is not finished. While another process works, there is nothing to do for this one."""
        for ingestion_id in self._ids():
            if ingestion_id in self._finished:
                continue
            folder = self._path(ingestion_id)
            hold = Hold.take(folder)
            if hold is None:
                return None
            found = _read_state(folder)
            if found is not None and not found.is_finished:
                return found, hold
            hold.release()
            self._finished.add(ingestion_id)
        return None

    def _forget(self) -> None:
        """Remove old records, and files that a kill has left behind."""
        remove_abandoned(self._uploads)
        self._finished &= set(self._ids())
        finished = [one for one in map(_read_state, map(self._path, self._ids())) if one and one.is_finished]
        for age, one in enumerate(reversed(finished)):
            folder = self._path(one.id)
            if age >= MAX_KEPT or time.time() - (one.finished_at or 0) > KEPT_S:
                shutil.rmtree(folder, ignore_errors=True)
            elif (folder / FILES).exists():
                shutil.rmtree(folder / FILES, ignore_errors=True)

    # --- The work ----------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        forget_at = 0.0
        while True:
            self._added.clear()
            try:
                if time.monotonic() >= forget_at:
                    await finish_in_thread(self._forget)
                    forget_at = time.monotonic() + TIDIED_EVERY_S
                while (taken := await finish_in_thread(self._take_next)) is not None:
                    ingestion, hold = taken
                    with hold:
                        await self._run(ingestion)
            except Exception:
                # Above all a disk that is full: the work waits in its folder.
                logger.exception("ingestions cannot go on for now")
                await asyncio.sleep(MAX_RETRY_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._added.wait()

    async def _run(self, ingestion: Ingestion) -> None:
        job = _Job(self._path(ingestion.id), ingestion, self._name)
        try:
            await finish_in_thread(job.begin)
            await self._ingest_all(job)
            await finish_in_thread(job.finish, "completed")
        except _Cancelled:
            await finish_in_thread(job.finish, "cancelled")
        except CleaveError as error:
            await finish_in_thread(job.finish, "failed", error.message)
        except asyncio.CancelledError:
            await finish_in_thread(job.interrupt)
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            logger.exception("the ingestion failed", extra={"ingestion_id": ingestion.id})
            await finish_in_thread(job.finish, "failed", "Internal error; the service's log says more.")
        logger.info("ingestion ended", extra={"ingestion_id": ingestion.id, "status": job.ingestion.status})

    async def _ingest_all(self, job: "_Job") -> None:
        loaded = load(job.folder, max_bytes=self._limits.max_file_bytes, first_file=job.first_file)
        async with aclosing(in_groups(loaded, num_skipped=job.num_skipped)) as groups:
            async for group in groups:
                receipts = await self._watched(job, self._ingest(job, documents_of(group)))
                await finish_in_thread(job.report, group, receipts)

    async def _ingest(self, job: "_Job", documents: Sequence[Document]) -> list[IngestReceipt]:
        """Write documents, after a while if the retriever is down or busy."""
        while documents:
            try:
                return await self._retriever.ingest(documents, collection=job.ingestion.collection)
            except CollectionMismatch:
                raise  # Nobody knows for how long, and others wait.
            except Unavailable as error:
                await finish_in_thread(job.wait_for, error.message)
                await asyncio.sleep(min(max(error.retry_after_s or 0, MIN_RETRY_S), MAX_RETRY_S))
        return []

    async def _watched(self, job: "_Job", work: Coroutine[Any, Any, T]) -> T:
        """Do it unless somebody wants the ingestion to end. Raises `_Cancelled`."""
        task = asyncio.create_task(work)
        try:
            while True:
                await asyncio.to_thread(job.check_wanted)
                if (await asyncio.wait({task}, timeout=WATCH_S))[0]:
                    return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class _Job:
    """An ingestion that this process holds and works on."""

    def __init__(self, folder: Path, ingestion: Ingestion, worker: str) -> None:
        self._worker = worker
        self.folder = folder
        self.ingestion = ingestion
        self.first_file = 0
        """Files before it are done, and `num_skipped` documents of this one."""
        self.num_skipped = 0

    def begin(self) -> None:
        """Find out where to go on. Raises `InvalidRequest` when it never gets on from here."""
        self.check_wanted()
        self._read_log()
        is_new_here = self.ingestion.worker != self._worker
        if is_new_here and self.ingestion.num_starts == MAX_STARTS:
            raise InvalidRequest(
                f"The service ended {MAX_STARTS} times at this place, after {self.ingestion.num_documents_done} "
                "documents: send those that follow one by one to find the one at fault."
            )
        self._write(
            status="running",
            started_at=self.ingestion.started_at or time.time(),
            num_documents=count_documents(self.folder),
            num_starts=self.ingestion.num_starts + is_new_here,
            worker=self._worker,
        )

    def report(self, group: Group, receipts: Sequence[IngestReceipt]) -> None:
        """Write down what became of some documents."""
        results = list(results_of(group, receipts))
        lines = [json.dumps({"file": one.name, **asdict(receipt), "file_number": one.file}) for one, receipt in results]
        with (self.folder / RESULTS).open("ab") as log:
            log.write("".join(f"{line}\n" for line in lines).encode())
        before = self.ingestion
        self._write(
            num_documents_done=before.num_documents_done + len(results),
            num_files_done=group[-1].file,
            num_chunks=before.num_chunks + sum(receipt.num_chunks for _, receipt in results),
            num_failed=before.num_failed + sum(receipt.status == "failed" for _, receipt in results),
            num_starts=1,
            notice=None,
        )

    def wait_for(self, notice: str) -> None:
        """Say what holds it up."""
        self._write(notice=notice)

    def check_wanted(self) -> None:
        """Raise `_Cancelled` when somebody wants it to end."""
        if (self.folder / CANCEL).exists():
            raise _Cancelled

    def interrupt(self) -> None:
        """Take back that it was started: this process ends on purpose."""
        self._write(num_starts=max(0, self.ingestion.num_starts - 1))

    def finish(self, status: Status, error: str | None = None) -> None:
        """End it."""
        if status == "completed":
            done = self.ingestion
            self.ingestion = replace(done, num_documents=done.num_documents_done, num_files_done=done.num_files)
        self.ingestion = _finish(self.folder, self.ingestion, status, error)

    def _write(self, **changes: Any) -> None:
        self.ingestion = replace(self.ingestion, **changes)
        _write_state(self.folder, self.ingestion)

    def _read_log(self) -> None:
        """Count what is done, and cut off the line that a kill has cut short."""
        num_chunks = num_failed = num_done = num_bytes = 0
        for line in self._log_lines():
            result = json.loads(line)
            self.num_skipped = self.num_skipped + 1 if result["file_number"] == self.first_file else 1
            self.first_file = result["file_number"]
            num_done += 1
            num_chunks += result["num_chunks"]
            num_failed += result["status"] == "failed"
            num_bytes += len(line)
        with suppress(FileNotFoundError):
            os.truncate(self.folder / RESULTS, num_bytes)
        has_advanced = num_done > self.ingestion.num_documents_done
        self.ingestion = replace(
            self.ingestion,
            num_documents_done=num_done,
            num_files_done=self.first_file,
            num_chunks=num_chunks,
            num_failed=num_failed,
            num_starts=0 if has_advanced else self.ingestion.num_starts,
        )

    def _log_lines(self) -> Iterator[bytes]:
        path = self.folder / RESULTS
        if path.exists():
            with path.open("rb") as log:
                yield from (line for line in log if line.endswith(b"\n"))


def _finish(folder: Path, ingestion: Ingestion, status: Status, error: str | None = None) -> Ingestion:
    finished = replace(ingestion, status=status, finished_at=time.time(), error=error, notice=None, num_starts=0)
    _write_state(folder, finished)
    shutil.rmtree(folder / FILES, ignore_errors=True)
    return finished


def _read_state(folder: Path) -> Ingestion | None:
    """Read what an ingestion is; None where there is none, or none that this version of Cleave can read."""
    try:
        content = json.loads((folder / STATE).read_bytes())
        return Ingestion(**{name: content[name] for name in FIELDS & set(content)})
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _write_state(folder: Path, ingestion: Ingestion) -> None:
    write_whole(folder / STATE, json.dumps(asdict(ingestion), ensure_ascii=False).encode())


def no_ingestion(ingestion_id: str) -> IngestionNotFound:
    """Say that there is none by this id, or none that may be seen."""
    return IngestionNotFound(
        f"There is no ingestion {ingestion_id!r} here: it ended more than a day ago, or it is on another machine, "
        "with which this one shares no data_dir.",
        param="id",
    )
