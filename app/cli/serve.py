"""`cleave serve`: the service in the foreground."""

from pathlib import Path
from typing import Annotated

import typer

from app.cli.options import DEFAULT_CONFIG


def serve(config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The Serve config.")] = DEFAULT_CONFIG) -> None:
    """Serve in the foreground until Ctrl-C."""
    from app.launcher import serve as launch

    raise typer.Exit(launch(config))
