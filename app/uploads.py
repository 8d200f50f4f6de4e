"""Uploads: files written to a folder as they come, and read back from there as documents.

What a client calls a file is never part of a path: files are stored under numbers, and `upload.json` says how they
were called. So the memory does not grow with an upload, and no name leads out of its folder.
"""

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import BinaryIO, TypeAlias

from app.domain import Document, IngestReceipt, Metadata
from app.durable import FULL, Hold, write_whole
from app.errors import CleaveError, ConfigurationError, StorageFull, TooLarge, UnreadableFile
from app.loaders import JSONL, load_file, too_large
from app.settings import APISettings

MAX_NAME_CHARACTERS = 512
"""As of a document's id, which a file's name becomes."""
MAX_DOCUMENTS_AT_ONCE = 128
MAX_CHARACTERS_AT_ONCE = 2**18
"""Read, then ingested, before the next are read: a few small files may unpack to more than the memory holds. About as
many chunks as the ingestor encodes together."""
ABANDONED_AFTER_S = 60.0
"""A folder that nobody holds may just have been made; after this it is a killed process's."""
FILES, UPLOAD, DOCUMENTS = "files", "upload.json", "documents.jsonl"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A document or why there is none; `name` is that of its file, or the id that was sent, and `file` its number."""

    file: int
    name: str
    outcome: Document | UnreadableFile


@dataclass(frozen=True, slots=True)
class ReceivedFile:
    """A file of an upload. With an error, there is nothing of it to read."""

    name: str
    num_bytes: int
    error: str | None = None


Group: TypeAlias = list[Loaded]


# --- Writing ---------------------------------------------------------------------------------------------------------


class UploadWriter:
    """An upload on its way to disk, in a new folder below `parent` that goes when this is closed. All of it blocks.

    Raises `StorageFull` when too little of the disk would be left, and `ConfigurationError` when it cannot be written.
    """

    def __init__(self, parent: Path, limits: APISettings) -> None:
        self._limits = limits
        self._parent = parent
        self._folder: Path | None = None
        self._hold: Hold | None = None
        self._files: list[ReceivedFile] = []
        self._open: BinaryIO | None = None

    @property
    def folder(self) -> Path:
        """Where it is, once it is open."""
        assert self._folder is not None
        return self._folder

    @property
    def files(self) -> Sequence[ReceivedFile]:
        """Those that have come."""
        return self._files

    @property
    def num_files(self) -> int:
        """How many have come."""
        return len(self._files)

    def open(self, *, num_expected_bytes: int = 0) -> None:
        """Make the folder, if there will be room."""
        with explained(self._parent):
            self._parent.mkdir(parents=True, exist_ok=True)
            self._require_space(num_expected_bytes)
            self._folder = Path(tempfile.mkdtemp(dir=self._parent))
            self._hold = Hold.take(self._folder)
            (self._folder / FILES).mkdir()

    def begin_file(self, name: str, *, error: str | None = None) -> None:
        """Begin the next file; with an error, one line that names it, what comes of it is dropped."""
        if error is None and len(name) > MAX_NAME_CHARACTERS:
            error = f"{name[:40]}...: the name has more than {MAX_NAME_CHARACTERS} characters: shorten it"
        with explained(self._parent):
            if error is None:
                self._open = (self.folder / FILES / str(len(self._files))).open("wb")
        self._files.append(ReceivedFile(name[:MAX_NAME_CHARACTERS], 0, error))

    def write(self, content: bytes) -> None:
        """Add to the file that was begun; what is over its limit is counted and dropped."""
        file = self._files[-1]
        room = self._limits.max_file_bytes - file.num_bytes
        self._files[-1] = ReceivedFile(file.name, file.num_bytes + len(content), file.error)
        if self._open is not None and room > 0:
            with explained(self._parent):
                self._require_space(len(content))
                self._open.write(content[:room])

    def end_file(self) -> None:
        """Close the file that was begun."""
        file = self._files[-1]
        if self._open is not None:
            with explained(self._parent):
                self._open.close()
            self._open = None
        if file.num_bytes > self._limits.max_file_bytes:
            error = too_large(file.name, file.num_bytes, self._limits.max_file_bytes).message
            self._files[-1] = ReceivedFile(file.name, file.num_bytes, error)

    def add_documents(self, documents: Iterable[Loaded]) -> None:
        """Write documents that came as such."""
        with explained(self._parent), (self.folder / FILES / DOCUMENTS).open("w", encoding="utf-8") as file:
            for one in documents:
                outcome = asdict(one.outcome) if isinstance(one.outcome, Document) else one.outcome.message
                line = json.dumps({"name": one.name, "outcome": outcome}, ensure_ascii=False) + "\n"
                self._require_space(len(line))
                file.write(line)

    def finish(self, metadata: Metadata) -> None:
        """Write down what has come, so that it can be read."""
        content = {"metadata": dict(metadata), "files": [asdict(file) for file in self._files]}
        with explained(self._parent):
            write_whole(self.folder / UPLOAD, json.dumps(content, ensure_ascii=False).encode())

    def hand_over(self, folder: Path) -> None:
        """Move it to where another takes care of it, and let go of it."""
        with explained(self._parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.rename(folder)
        self._folder = None
        self.close()

    def close(self) -> None:
        """Remove what was not handed over."""
        if self._open is not None:
            with suppress(OSError):  # What is still in its buffer may not fit the disk.
                self._open.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._hold is not None:
            self._hold.release()

    def _require_space(self, num_bytes: int) -> None:
        free = shutil.disk_usage(self._parent).free
        if free - num_bytes < self._limits.min_free_bytes:
            raise StorageFull(
                f"The disk of the service has {free // 2**20} MiB free, and this upload would leave less than "
                f"{self._limits.min_free_bytes // 2**20} MiB: free some space, or move data_dir."
            )


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn what the file system says of a folder of the service into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageFull(f"The disk of {folder} is full: free some space, or move data_dir.") from error
        raise ConfigurationError(
            f"Nothing can be written to {folder} ({error.strerror}): make it writable, or move data_dir."
        ) from error


def remove_abandoned(parent: Path) -> None:
    """Remove the uploads of processes that were killed meanwhile; others may be at work on theirs. Blocks."""
    for folder in parent.glob("*/"):
        try:
            is_young = time.time() - folder.stat().st_mtime < ABANDONED_AFTER_S
        except FileNotFoundError:
            continue
        hold = None if is_young else Hold.take(folder)
        if hold is not None:
            shutil.rmtree(folder, ignore_errors=True)
            hold.release()


# --- Reading ---------------------------------------------------------------------------------------------------------


def load(folder: Path, *, max_bytes: int, first_file: int = 0, max_documents: int | None = None) -> Iterator[Loaded]:
    """Read the documents of an upload in the order sent, one file at a time; what is over `max_documents` fails."""
    content = json.loads((folder / UPLOAD).read_bytes())
    num_loaded = 0
    for number, file in enumerate(content["files"]):
        name = file["name"]
        if number < first_file:
            continue
        try:
            if file["error"] is not None:
                raise UnreadableFile(file["error"])
            path = folder / FILES / str(number)
            for one in load_file(name, path.read_bytes(), metadata=content["metadata"], max_bytes=max_bytes):
                if num_loaded == max_documents:
                    raise TooLarge(
                        f"{name}: from here on the request is over the limit of {max_documents} documents: send the "
                        "rest in another, or all of it with background=true"
                    )
                num_loaded += 1
                yield Loaded(number, name, one)
        except CleaveError as error:
            yield Loaded(number, name, UnreadableFile(error.message))
    documents = folder / FILES / DOCUMENTS
    if documents.exists():
        yield from _load_documents(documents, len(content["files"]))


def count_documents(folder: Path) -> int:
    """Count what `load` will give: a line of a file that holds a document a line, any other file as a whole."""
    content = json.loads((folder / UPLOAD).read_bytes())
    num_documents = 0
    for number, file in enumerate(content["files"]):
        is_lined = PurePath(file["name"]).suffix.lower() == JSONL and file["error"] is None
        num_documents += _count_lines(folder / FILES / str(number)) if is_lined else 1
    documents = folder / FILES / DOCUMENTS
    return num_documents + (_count_lines(documents) if documents.exists() else 0)


async def in_groups(loaded: Iterator[Loaded], *, num_skipped: int = 0) -> AsyncGenerator[Group, None]:
    """Read in a thread, and gather what is ingested together; leave out the first `num_skipped`."""
    group: Group = []
    num_characters = 0
    while (one := await asyncio.to_thread(next, loaded, None)) is not None:
        if num_skipped:
            num_skipped -= 1
            continue
        group.append(one)
        num_characters += len(one.outcome.text) if isinstance(one.outcome, Document) else 0
        if len(group) == MAX_DOCUMENTS_AT_ONCE or num_characters >= MAX_CHARACTERS_AT_ONCE:
            yield group
            group, num_characters = [], 0
    if group:
        yield group


def documents_of(group: Group) -> list[Document]:
    """Give those that can be ingested."""
    return [one.outcome for one in group if isinstance(one.outcome, Document)]


def results_of(group: Group, receipts: Iterable[IngestReceipt]) -> Iterator[tuple[Loaded, IngestReceipt]]:
    """Merge what was ingested with what could not be read, in the order sent."""
    remaining = iter(receipts)
    for one in group:
        if isinstance(one.outcome, Document):
            yield one, next(remaining)
        else:
            yield one, IngestReceipt(one.name, "failed", error=one.outcome.message)


def _load_documents(path: Path, number: int) -> Iterator[Loaded]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            outcome = record["outcome"]
            is_error = isinstance(outcome, str)
            yield Loaded(number, record["name"], UnreadableFile(outcome) if is_error else Document(**outcome))


def _count_lines(path: Path) -> int:
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())
