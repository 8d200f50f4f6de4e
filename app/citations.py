"""Citations: the `[n]` markers of an answer, checked against the sources that the model was shown."""

import re
from dataclasses import dataclass

MARKER = re.compile(r"\[(\d+(?:\s*,\s*\d+)*)\]")
_UNFINISHED = re.compile(r"\s*\[[\d\s,]{0,15}$")


@dataclass(frozen=True, slots=True)
class Citation:
    """A marker in the answer: source `n`, named by `text[start:end]`."""

    n: int
    start: int
    end: int


class MarkerFilter:
    """Removes markers that name no presented source from a stream of text, and counts them.

    `[1, 9]` with one source becomes `[1]`. Text that may still become a marker is held back until it is decided.
    """

    def __init__(self, num_presented: int) -> None:
        self._num_presented = num_presented
        self._held = ""
        self.num_removed = 0

    def feed(self, text: str) -> str:
        """Take the next piece, give back what is decided."""
        text = self._held + text
        unfinished = _UNFINISHED.search(text)
        decided = text[: unfinished.start()] if unfinished else text
        self._held = text[len(decided) :]
        return self._checked(decided)

    def flush(self) -> str:
        """Give back what was held when the stream ended."""
        held, self._held = self._held, ""
        return self._checked(held)

    def _checked(self, text: str) -> str:
        return re.sub(rf"(\s*){MARKER.pattern}", self._replacement, text)

    def _replacement(self, match: re.Match[str]) -> str:
        numbers = [int(number) for number in match[2].split(",")]
        valid = [number for number in numbers if 1 <= number <= self._num_presented]
        self.num_removed += len(numbers) - len(valid)
        return match[1] + "".join(f"[{number}]" for number in valid) if valid else ""


def find_citations(text: str) -> list[Citation]:
    """List the markers of a checked text in order."""
    return [
        Citation(int(number), match.start(), match.end())
        for match in MARKER.finditer(text)
        for number in match[1].split(",")
    ]


def without_markers(text: str) -> str:
    """Strip all markers and the space before them, also those that another one hides, such as `[[1]2]`."""
    while (stripped := re.sub(rf"\s*{MARKER.pattern}", "", text)) != text:
        text = stripped
    return text
