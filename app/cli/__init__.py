"""The terminal: the verbs of `cleave`, a file each.

Verbs talk to a running service over HTTP, like any other client. Results go to standard output, everything else to
standard error. What goes wrong is one line; nobody sees a traceback.
"""

import io
import os
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from app.cli import ask, batch, doctor, documents, evaluate, ingest, keys, reindex, search, serve
from app.cli.output import FAILED, exit_code, fail
from app.errors import CleaveError


class Verbs(TyperGroup):
    """The verbs; turns every error of theirs into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb that was typed."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A terminal that knows ASCII only gets question marks, not an error.
            sys.stdout.reconfigure(errors="replace")
        try:
            return super().invoke(ctx)
        except CleaveError as error:
            fail(error.message, exit_code(error))
        except Exception as error:
            # Typer's own, which it prints itself, and a reader that has gone (`cleave documents | head`).
            is_expected = isinstance(error, TyperException | typer.Exit | typer.Abort | BrokenPipeError)
            if is_expected or "CLEAVE_TRACEBACK" in os.environ:
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            fail(f"unexpected error ({reason}). Set CLEAVE_TRACEBACK=1 to see where, and report it.", FAILED)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"cleave {version('cleave')}")
        raise typer.Exit


main = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 something failed, 2 wrong use or configuration, 3 no service answers, 130 Ctrl-C.",
)


@main.callback()
def cleave(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Ask your own writing, with citations: start the service, feed it, ask it."""


main.command(epilog="Example: cleave serve serve_config.yaml")(serve.serve)
main.command(epilog="Example: cleave doctor --config serve_config.yaml")(doctor.doctor)
main.command(epilog="Example: cleave ingest notes/ report.pdf corpus.jsonl")(ingest.ingest)
main.command(epilog="Example: cleave ask 'How long did the Reading Room outage last?' --author 'Noor Hallivant'")(
    ask.ask
)
main.command(epilog="Example: cleave search 'size of the KV cache' --top-k 3 --json")(search.search)
main.command(epilog="Example: cleave batch questions.jsonl answers.jsonl")(batch.batch)
main.command("eval", epilog="Example: cleave eval sets/handbook --json new.json --baseline old.json")(evaluate.evaluate)
main.command(epilog="Example: cleave reindex --config serve_config.yaml")(reindex.reindex)

of_documents = typer.Typer(invoke_without_command=True, epilog="Example: cleave documents --json | jq -r '.[].id'")
of_documents.callback()(documents.list_documents)
of_documents.command(epilog="Example: cleave documents show notes/plan.md")(documents.show)
of_documents.command(epilog="Example: cleave documents delete notes/plan.md --yes")(documents.delete)
main.add_typer(of_documents, name="documents")

of_keys = typer.Typer(
    no_args_is_help=True,
    help="Create, list and revoke the keys that the service takes.",
    epilog="Example: cleave keys create acme --read acme --write acme --requests-per-minute 60",
)
of_keys.command(epilog="Example: cleave keys create acme --read 'acme*' --write acme --requests-per-minute 60")(
    keys.create
)
of_keys.command("list", epilog="Example: cleave keys list --json")(keys.list_keys)
of_keys.command(epilog="Example: cleave keys revoke acme")(keys.revoke)
main.add_typer(of_keys, name="keys")
