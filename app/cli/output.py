"""What every verb prints with: consoles, tables, JSON, and the one line of an error."""

import json
import re
from datetime import datetime
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from app.durable import write_whole
from app.errors import AccessDenied, CleaveError, CollectionMismatch, ConfigurationError, InvalidRequest, Unavailable
from app.self_query import describe

if TYPE_CHECKING:
    from app.client import Record

FAILED, WRONG_USE, UNREACHABLE = 1, 2, 3
"""Exit codes beside 0."""
PIPED_WIDTH = 200
"""Columns of a table that goes to a file or another program."""
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def open_console(*, stderr: bool = False) -> Console:
    """Open a console. Text from documents is no markup, and what is piped is not wrapped to a narrow window."""
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    return console


def open_table(*columns: str) -> Table:
    """Make a table without lines; its cells may hold anything."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def open_progress(*columns: TextColumn) -> Progress:
    """Open a bar on standard error, with further columns in front of the time that is left; silent when piped."""
    console = open_console(stderr=True)
    shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *columns)
    return Progress(*shown, TimeRemainingColumn(compact=True), console=console, disable=not console.is_terminal)


def printable(text: str) -> str:
    """Leave out what would steer the reader's terminal."""
    return CONTROL_CHARACTERS.sub("", text)


def format_moment(seconds: float, form: str = "%Y-%m-%d %H:%M") -> str:
    """Write seconds since 1970 as local time."""
    return datetime.fromtimestamp(seconds).strftime(form)


def print_recognised(found: "Record") -> None:
    """Say what the question was taken to ask for, since that narrows what is found."""
    if recognised := found.get("recognised_filters"):
        said = f"Only documents with {describe(recognised)}, named in the question."
        open_console().print(Text(printable(said), "dim"))


def print_json(value: object) -> None:
    """Print for scripts: whole, without colours."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


def write_json(path: Path, value: object) -> None:
    """Write a file whole or not at all."""
    content = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
    try:
        write_whole(path, content.encode())
    except OSError as error:
        raise InvalidRequest(f"--json: {path} cannot be written ({error.strerror}).") from None


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written later."""
    if path.exists() and not path.is_file():
        raise InvalidRequest(f"--json: {path} is not a file. Name another.")
    try:
        with NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InvalidRequest(f"--json: {path} cannot be written ({error.strerror}). Name another.") from None


def print_error(message: str) -> None:
    """Say on standard error what went wrong."""
    open_console(stderr=True).print(Text("cleave: ", "red") + Text(printable(message)), soft_wrap=True)


def exit_code(error: CleaveError) -> int:
    """Choose the exit code of an error."""
    if isinstance(error, InvalidRequest | AccessDenied | ConfigurationError | CollectionMismatch):
        return WRONG_USE
    return UNREACHABLE if isinstance(error, Unavailable) else FAILED


def fail(message: str, code: int) -> NoReturn:
    """End the verb with a message."""
    print_error(message)
    raise typer.Exit(code)
