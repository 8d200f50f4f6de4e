"""Ids that sort by time: 14 hexadecimal digits of microseconds since the epoch, then 10 random ones."""

import re
import time
import uuid


def new_id(prefix: str) -> str:
    """Make an id. Of two made one after the other, the later sorts behind."""
    return f"{prefix}{int(time.time() * 1e6):014x}{uuid.uuid4().hex[:10]}"


def pattern(prefix: str) -> re.Pattern[str]:
    """Tell what ids with this prefix look like: nothing else becomes a part of a path."""
    return re.compile(rf"{prefix}[0-9a-f]{{24}}")
