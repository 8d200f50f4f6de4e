"""`cleave batch`: a file of questions answered as a whole, without a service, by a program that it runs and watches."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress, TextColumn

from app.cli.options import DEFAULT_CONFIG, AsJSON
from app.cli.output import FAILED, fail, open_console, open_progress, open_table, print_json

PROGRAM = "deployments.offline"
INTERRUPTED = 130
STOP_TIMEOUT_S = 60
Event = Mapping[str, Any]


def batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Requests: OpenAI's batch lines, or questions.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Where the results go, in the same order.")],
    config: Annotated[Path, typer.Option("--config", help="The Serve config whose settings are used.")] = (
        DEFAULT_CONFIG
    ),
    address: Annotated[
        str | None, typer.Option("--address", help="A Ray cluster to run on. Default: one of its own, on this machine.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT.jsonl, and results so far that are of something else.")
    ] = False,
    as_json: AsJSON = False,
) -> None:
    """Answer a file of questions, on Ray Data: no service is needed, and the embedded store must be held by none.

    A line is a request in OpenAI's batch format, or {"question": "..."}. What a kill or Ctrl-C interrupts goes on when
    it is run again. Exit code 1: some lines could not be answered; the output says why.
    """
    from app.config import load_config
    from app.offline_output import check_output

    settings = load_config(config).settings
    check_output(target, overwrite=overwrite)
    log = settings.data_dir / "logs" / f"batch-{target.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments = [str(source), str(target), "--config", str(config)]
    arguments += ["--address", address] if address else []
    arguments += ["--overwrite"] if overwrite else []
    with _running(arguments, log) as process, open_progress(TextColumn("{task.fields[said]}")) as progress:
        last = _follow(process, progress)
        code = process.wait()
    if code in (-signal.SIGINT, -signal.SIGTERM):  # Before it could attend to them.
        code = INTERRUPTED
    if code == INTERRUPTED:
        done = f" after {last['done']} of {last['total']}" if last.get("phase") == "answering" else ""
        open_console(stderr=True).print(f"Stopped{done}. Run the same again to go on.")
    elif last.get("phase") == "failed":
        fail(last["message"], code)
    elif last.get("phase") != "done":
        fail(f"the run has ended early; {log} says why. Run the same again to go on.", FAILED)
    else:
        if not last["summary"]["requests"]:
            open_console(stderr=True).print(f"{source} holds no request, so {target} holds no result.")
        _print_summary(last["summary"], as_json)
    raise typer.Exit(code)


@contextmanager
def _running(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the program, which ends with this one; Ctrl-C reaches it once, and it then stops in order."""
    from app.launcher import QUIET_ENVIRONMENT

    def interrupt(*_: object) -> None:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)

    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", PROGRAM, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env={**os.environ, **QUIET_ENVIRONMENT},
            start_new_session=True,
        )
    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield process
    finally:
        if process.poll() is None:
            interrupt()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):  # Nothing is left: the normal case.
            os.killpg(process.pid, signal.SIGKILL)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _follow(process: subprocess.Popen[bytes], progress: Progress) -> Event:
    """Show how far the program is, until it ends; give the last that it told."""
    assert process.stdout is not None
    task = progress.add_task("Starting", total=None, said="")
    last: Event = {}
    began, num_before = 0.0, 0
    for last in map(json.loads, process.stdout):
        if last["phase"] == "reading":
            progress.update(task, description="Reading", said=f"{last['done'] / 2**20:.0f} MiB")
        elif last["phase"] == "answering" and not began:
            # What an earlier run has done is no sign of how fast this one is.
            began, num_before = time.monotonic(), last["done"]
            progress.reset(task, description="Answering", total=last["total"], completed=num_before, said="")
        elif last["phase"] == "answering":
            rate = (last["done"] - num_before) / (time.monotonic() - began)
            said = f"{rate:.1f}/s, {last['failed']} failed, left"
            progress.update(task, completed=last["done"], said=said)
    return last


def _print_summary(summary: Event, as_json: bool) -> None:
    if as_json:
        print_json(summary)
        return
    console = open_console()
    engine = summary["engine"]
    table = open_table("requests", "completed", "failed", "seconds", "requests/s", "engine busy", "engine full")
    shown = [str(summary[key]) for key in ("requests", "completed", "failed", "seconds", "requests_per_second")]
    table.add_row(*shown, f"{engine['busy']:.0%}", f"{engine['full']:.0%}")
    console.print(table)
