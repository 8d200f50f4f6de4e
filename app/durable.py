"""What outlives its process: files that are there whole or not at all, and what one process has at a time.

A hold is the operating system's own lock on a file in the folder: it ends with the process, however that ends, and
needs neither a clock nor a heartbeat. It counts between processes of one machine, and where the file system carries it
(NFS from version 4 on) between machines.
"""

import asyncio
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ParamSpec, Self, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

HOLD = ".hold"
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What the file system says when there is no room, or none that this user may fill."""


def write_whole(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Write beside the old file and rename, so that there is always a whole one, also after a power cut.

    No two may write the same file at once. It gets this mode, less the umask.
    """
    draft = path.with_name(f".{path.name}.draft")
    draft.unlink(missing_ok=True)  # One that a kill has left may have another mode.
    try:
        draft.touch(mode=mode, exist_ok=False)
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


async def finish_in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run it in a thread. Who is cancelled meanwhile waits for its end, so that what follows meets no half of it."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            with suppress(asyncio.CancelledError):  # Cancelled once more.
                await asyncio.gather(asyncio.shield(work), return_exceptions=True)
        raise


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Wait until no other process is in such a block of the same file, which is made if it is not there. Blocks."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # Until it is closed.
        yield


class Hold:
    """A folder that this process holds; it may be renamed meanwhile. A context manager."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def take(cls, folder: Path) -> Self | None:
        """Hold a folder; None when another holds it, in whichever process, or when it is gone."""
        try:
            # A file that is open for writing: over NFS, others learn of no lock on the folder itself.
            descriptor = os.open(folder / HOLD, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def release(self) -> None:
        """Let go of it; done twice, it does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        """Let go of it when whoever asked for it was cancelled meanwhile."""
        self.release()

    def __enter__(self) -> Self:
        """It is held already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of it."""
        self.release()


def sync_folder(folder: Path) -> None:
    """Make a rename in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
