"""Files that clients send for batches and fetch from them: a folder each, there whole or not at all.

files/file-.../     made beside and renamed, so whoever sees it sees all of it
    file.json       what it is
    files/0         its content
"""

import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from app.durable import Hold, sync_folder, write_whole
from app.errors import InvalidRequest, StoredFileNotFound, TooLarge
from app.identifiers import new_id, pattern
from app.settings import APISettings, BatchSettings
from app.uploads import FILES, UploadWriter, explained, remove_abandoned

Purpose: TypeAlias = Literal["batch", "batch_output"]

DESCRIPTION, CONTENT = "file.json", f"{FILES}/0"
ID = pattern("file-")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """What is known of a file. `key_id` names the key of whoever it belongs to; `created_at` is in epoch seconds."""

    id: str
    name: str
    purpose: Purpose
    num_bytes: int
    created_at: float
    key_id: str | None


class FileStore:
    """The files below one folder, which all processes of a service share. All of it blocks."""

    def __init__(self, folder: Path, api: APISettings, batch: BatchSettings) -> None:
        self._folder = folder / "files"
        self._uploads = folder / "uploads"
        self._limits = api.model_copy(update={"max_file_bytes": batch.max_file_bytes})

    def new_upload(self) -> UploadWriter:
        """Give what writes a file where it can be taken over."""
        return UploadWriter(self._uploads, self._limits)

    def clean_up(self) -> None:
        """Remove what processes have left that were killed in the middle of a file."""
        remove_abandoned(self._uploads)

    def take_over(self, upload: UploadWriter, *, key_id: str | None) -> StoredFile:
        """Keep the one file of an upload. Raises `InvalidRequest` when there is not one, and as the upload does."""
        if upload.num_files != 1:
            raise InvalidRequest(f"Send one file, in the form field 'file': {upload.num_files} came.", param="file")
        received = upload.files[0]
        if received.error is not None:
            raise TooLarge(f"{received.error}.", param="file")
        found = StoredFile(new_id("file-"), received.name, "batch", received.num_bytes, time.time(), key_id)
        with explained(self._folder):
            _describe(upload.folder, found)
        upload.hand_over(self._folder / found.id)
        return found

    def write(self, file_id: str, name: str, lines: Iterable[bytes], *, key_id: str | None) -> StoredFile:
        """Make a file of lines, under an id that the caller chose; one that is there already stays as it is.

        Raises `StorageFull` and `ConfigurationError`.
        """
        target = self._folder / file_id
        with explained(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            # Among the uploads, where what a kill leaves is removed.
            self._uploads.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(dir=self._uploads))
            hold = Hold.take(draft)
            try:
                (draft / FILES).mkdir()
                with (draft / CONTENT).open("wb") as file:
                    file.writelines(lines)
                    file.flush()
                    os.fsync(file.fileno())
                    num_bytes = file.tell()
                written = StoredFile(file_id, name, "batch_output", num_bytes, time.time(), key_id)
                _describe(draft, written)
                if not target.exists():
                    draft.rename(target)
                    sync_folder(self._folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
                if hold is not None:
                    hold.release()
        return self.read(file_id)

    def read(self, file_id: str) -> StoredFile:
        """Say what a file is. Raises `StoredFileNotFound`."""
        found = _read(self._folder / file_id) if ID.fullmatch(file_id) else None
        if found is None:
            raise no_file(file_id)
        return found

    def content(self, file_id: str) -> Path:
        """Say where its content is. Raises `StoredFileNotFound`."""
        return self._folder / self.read(file_id).id / CONTENT

    def recent(self, *, after: str | None) -> Iterator[StoredFile]:
        """List files, the newest first, starting behind the id `after`."""
        for file_id in sorted((path.name for path in self._folder.glob("file-*/")), reverse=True):
            if (after is None or file_id < after) and (found := _read(self._folder / file_id)):
                yield found

    def delete(self, file_id: str) -> None:
        """Remove a file. Raises `StoredFileNotFound`."""
        folder = self._folder / self.read(file_id).id
        # A kill from here on leaves it among the uploads, where it is removed.
        gone = self._uploads / f"{folder.name}.{uuid.uuid4().hex}"
        try:
            self._uploads.mkdir(parents=True, exist_ok=True)
            folder.rename(gone)
        except FileNotFoundError:
            raise no_file(file_id) from None
        shutil.rmtree(gone, ignore_errors=True)


def no_file(file_id: str) -> StoredFileNotFound:
    """Say that there is none by this id, or none that may be seen."""
    return StoredFileNotFound(f"There is no file {file_id!r} here: it was deleted, or never sent.", param="file_id")


def _describe(folder: Path, file: StoredFile) -> None:
    write_whole(folder / DESCRIPTION, json.dumps(asdict(file), ensure_ascii=False).encode())


def _read(folder: Path) -> StoredFile | None:
    try:
        content: dict[str, Any] = json.loads((folder / DESCRIPTION).read_bytes())
        return StoredFile(**content)
    except (FileNotFoundError, ValueError, TypeError):
        return None
