"""The input of an offline batch: what one pass over the file finds, so that it can be read in pieces of any size."""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.batch_lines import Line, LineRefused, SeenIds, parse_question, read_lines
from app.errors import InvalidRequest

MIN_RANGE_LINES, MAX_RANGE_LINES = 16, 256
"""A range is what an actor takes at once: a small one is done soon, and of large ones a large file needs fewer."""
LINES_PER_RANGE_LINE = 1_000
MAX_RANGE_BYTES = 2**20
TOLD_EVERY = 10_000
"""Lines after which the caller learns how far the pass is."""


@dataclass(frozen=True, slots=True)
class Range:
    """A run of requests that are read together, from the line with this number on. `repeated`: see `Index`."""

    offset: int
    number: int
    num_requests: int
    repeated: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Index:
    """What stands in a file. `ranges` hold the requests that are not done, in order.

    `repeated` are the lines in them whose custom_id stands in an earlier line, too.
    """

    num_requests: int
    ranges: tuple[Range, ...]


def fingerprint(path: Path) -> dict[str, str | int]:
    """Tell a file from any other. Raises `InvalidRequest` when it cannot be read."""
    with _explained(path), path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "num_bytes": file.tell()}


def read_index(path: Path, *, num_done: int = 0, tell: Callable[[int], None] = lambda num_bytes: None) -> Index:
    """Go through a file once; its first requests are done. `tell` learns how many bytes have been read, now and then.

    Memory does not grow with it but for some bytes a range. Raises `InvalidRequest` when it cannot be read.
    """
    ranges: list[Range] = []
    current: list[Line] = []
    repeated: list[int] = []
    num_requests = num_bytes = 0

    def close_range() -> None:
        nonlocal num_bytes
        if current:
            ranges.append(Range(current[0].offset, current[0].number, len(current), tuple(repeated)))
        current.clear()
        repeated.clear()
        num_bytes = 0

    with _explained(path), SeenIds() as seen:
        for line in read_lines(path):
            num_requests += 1
            is_repeated = _is_repeated(line, seen)
            if num_requests % TOLD_EVERY == 0:
                tell(line.offset)
            if num_requests <= num_done:
                continue
            num_lines = min(max(num_requests // LINES_PER_RANGE_LINE, MIN_RANGE_LINES), MAX_RANGE_LINES)
            if len(current) >= num_lines or num_bytes + len(line.content) > MAX_RANGE_BYTES:
                close_range()
            current.append(Line(line.number, line.offset, b""))
            num_bytes += len(line.content)
            if is_repeated:
                repeated.append(line.number)
    close_range()
    return Index(num_requests, tuple(ranges))


def read_range(path: Path, range: Range) -> list[Line]:
    """Read the lines of a range."""
    return list(itertools.islice(read_lines(path, range.offset, range.number), range.num_requests))


def _is_repeated(line: Line, seen: SeenIds) -> bool:
    """Tell whether the id of a request was there before. A line that is no request has none."""
    try:
        return seen.add(parse_question(line.content, line.number).custom_id)
    except LineRefused:
        return False


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read ({error.strerror}). Name a file of requests.") from None
