"""The terminal: every verb of `cleave`.

Verbs talk to a running service over HTTP, like any other client. Results go to standard output, all else to standard
error. Exit codes: 0 done, 1 something failed, 2 wrong use or configuration, 3 no service answers, 130 Ctrl-C.
"""

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from app.errors import CleaveError, ConfigurationError, InvalidRequest, Unavailable

if TYPE_CHECKING:
    # httpx and what it brings would double the time of `cleave --help`.
    from app.client import Client, FoundFiles, Record

FAILED, WRONG_USE, UNREACHABLE = 1, 2, 3
PIPED_WIDTH = 200
"""Columns of a table that goes to a file or another program."""
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

T = TypeVar("T")


class Commands(TyperGroup):
    """Turns every error into one line and an exit code."""

    def invoke(self, context: Any) -> Any:
        """Run the verb."""
        try:
            return super().invoke(context)
        except CleaveError as error:
            _complain(error.message)
            raise typer.Exit(_exit_code(error)) from None
        except ...


