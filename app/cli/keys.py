"""`cleave keys`: the keys that a service takes, created, listed and revoked in their file."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.options import DEFAULT_CONFIG, AsJSON
from app.cli.output import open_console, open_table, print_json
from app.domain import Dialect

if TYPE_CHECKING:
    from app.client import Record
    from app.keys import Key

KeyName = Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is.")]
OfConfig = Annotated[Path, typer.Option("--config", help="The Serve config that says where the keys are.")]
OfFile = Annotated[Path | None, typer.Option("--file", help="The file of keys itself, in place of --config.")]
Collections = list[str] | None


def create(
    name: KeyName,
    read: Annotated[
        Collections, typer.Option("--read", metavar="COLLECTION", help="May search it; repeatable; * for any letters.")
    ] = None,
    write: Annotated[
        Collections, typer.Option("--write", metavar="COLLECTION", help="May add and delete there; likewise.")
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="May do all in all collections, and reindex.")] = False,
    default_collection: Annotated[
        str | None,
        typer.Option(
            "--default-collection", metavar="NAME", help="Meant when a request names none. Default: the first named."
        ),
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option("--requests-per-minute", min=1)] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option("--tokens-per-minute", min=1, help="Of the language model, read and written.")
    ] = None,
    dialect: Annotated[
        Dialect | None,
        typer.Option("--dialect", help="How its clients are told the sources, if the request does not say."),
    ] = None,
    expires: Annotated[
        datetime | None, typer.Option("--expires", formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M"], help="In local time.")
    ] = None,
    config: OfConfig = DEFAULT_CONFIG,
    file: OfFile = None,
    as_json: AsJSON = False,
) -> None:
    """Create a key and show it, once: only a hash of it is kept. A running service takes it a second later."""
    from app.keys import create_key

    key, secret = create_key(
        _keys_path(config, file),
        name,
        read=read or (),
        write=write or (),
        default_collection=default_collection,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        dialect=dialect,
        expires_at=expires.astimezone() if expires else None,
        is_admin=admin,
    )
    if as_json:
        print_json({**_key_record(key), "key": secret})
        return
    open_console(stderr=True).print(
        f"The key of {name}. It is shown this once; it goes into the header `Authorization: Bearer KEY`, and for "
        "`cleave` into the environment variable CLEAVE_API_KEY:",
        soft_wrap=True,
    )
    typer.echo(secret)


def list_keys(config: OfConfig = DEFAULT_CONFIG, file: OfFile = None, as_json: AsJSON = False) -> None:
    """List the keys: whose they are and what they may do."""
    from app.keys import read_keys

    found = read_keys(_keys_path(config, file))
    if as_json:
        print_json([_key_record(key) for key in found])
        return
    table = open_table("name", "id", "reads", "writes", "default", "requests/min", "tokens/min", "expires")
    for key in found:
        reads, writes = ("all" if key.is_admin else ", ".join(one) or "-" for one in (key.read, key.write))
        limits = (str(one or "-") for one in (key.requests_per_minute, key.tokens_per_minute))
        expires = f"{key.expires_at.astimezone():%Y-%m-%d %H:%M}{' (over)' * key.is_expired}" if key.expires_at else "-"
        table.add_row(key.name, key.id, reads, writes, key.default_collection or "-", *limits, expires)
    open_console().print(
        table if found else "No keys: only this machine is served. `cleave keys create NAME` makes one."
    )


def revoke(name: KeyName, config: OfConfig = DEFAULT_CONFIG, file: OfFile = None, as_json: AsJSON = False) -> None:
    """Revoke a key. A running service refuses it a second later."""
    from app.keys import revoke_key

    key = revoke_key(_keys_path(config, file), name)
    if as_json:
        print_json(_key_record(key))
    else:
        open_console(stderr=True).print(f"Revoked the key {name} ({key.id}).")


def _keys_path(config: Path, file: Path | None) -> Path:
    from app.config import load_config
    from app.keys import keys_path

    return file or keys_path(load_config(config).settings)


def _key_record(key: "Key") -> "Record":
    return key.model_dump(mode="json", exclude={"hash"})
