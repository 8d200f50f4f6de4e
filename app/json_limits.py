"""JSON of too many values, refused before it is parsed.

A value takes a hundred times its bytes, and each that is wrong an error of its own: two megabytes of brackets would
hold up everybody else for many seconds.
"""

import re
from itertools import islice

from app.errors import TooLarge

MAX_VALUES = 20_000
"""Of a question; a thousand messages have a third of it."""
PIECE = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[,\[{]', re.DOTALL)
"""A text, or what stands before a further value."""


def check_num_values(body: bytes, *, most: int) -> None:
    """Raise `TooLarge` for a body of more texts and values than that."""
    if next(islice(PIECE.finditer(body), most, None), None):
        raise TooLarge(f"The body holds more than {most} texts and values. Send less at once.")
