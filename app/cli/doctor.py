"""`cleave doctor`: what is wrong here, and what to do."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from app.cli.connection import call
from app.cli.options import DEFAULT_CONFIG, AsJSON
from app.cli.output import FAILED, open_console, open_table, print_json, printable

if TYPE_CHECKING:
    from app.doctor import Status

FINDING_STYLES: "Mapping[Status, str]" = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def doctor(
    config: Annotated[Path, typer.Option("--config", help="The Serve config to check.")] = DEFAULT_CONFIG,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="NAME|SIZE", help="Does the model fit this GPU? Default: the one found here."),
    ] = None,
    model_config: Annotated[
        Path | None,
        typer.Option("--model-config", metavar="FILE", help="The model's config.json, if the hub is out of reach."),
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Check installation, config, machine and running service, and say what to fix.

    `--gpu` takes a name (L4, A100-80GB) or a size (24GiB), and asks whether the model of the config fits it.
    """
    from app.doctor import examine
    from app.sizing import parse_gpu

    asked = parse_gpu(gpu) if gpu else None
    with open_console(stderr=True).status("Checking ..."):
        checks = examine(
            config, lambda url: call(url, lambda client: client.readiness()), gpu=asked, model_config=model_config
        )
        findings = list(checks)
    if as_json:
        shown = (asdict(finding) for finding in findings)
        print_json([{key: value for key, value in one.items() if key != "numbers" or value} for one in shown])
    else:
        table = open_table("", "check", "finding")
        for finding in findings:
            text = Text(printable(finding.detail))
            if finding.fix:
                text.append(f"\n{printable(finding.fix)}", "bold")
            table.add_row(Text(finding.status, FINDING_STYLES[finding.status]), finding.name, text)
        open_console().print(table)
        counts = Counter(finding.status for finding in findings)
        open_console().print(", ".join(f"{counts[status]} {status}" for status in FINDING_STYLES))
    if any(finding.status == "failed" for finding in findings):
        raise typer.Exit(FAILED)
