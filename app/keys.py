"""Keys: who may use the service, in one file of hashes, written by `cleave keys` and followed by every Ingress.

A secret has 256 random bits, so that nobody finds it by trying: a fast hash (SHA-256) hides it as well as a slow one,
which is made for passwords, and does not cost every request a tenth of a second.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from app.addresses import reaches_loopback_only
from app.config import Config
from app.domain import Dialect
from app.durable import in_turn, write_whole
from app.errors import ConfigurationError, InvalidKey, InvalidRequest, KeysUnreadable
from app.settings import Settings
from app.telemetry import logger

FILE = "keys.json"
PREFIX = "cleave"
SECRET_BYTES = 32
CHECK_S = 1.0
"""A key that was revoked is refused after this."""
FORM = re.compile(rf"{PREFIX}-(?P<id>[0-9a-f]{{12}})-(?P<secret>[\w-]+)", re.ASCII)

Pattern: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9_*-]{1,64}$")]
"""The name of a collection; `*` stands for any characters."""
Signature: TypeAlias = tuple[int, int, int]
"""What changes when a file does."""


class Key(BaseModel):
    """What is kept of a key: its hash, what it may do, and how much of it in a minute."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")
    hash: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    read: tuple[Pattern, ...] = ()
    write: tuple[Pattern, ...] = ()
    default_collection: str | None = Field(None, pattern=r"^[A-Za-z0-9_-]{1,64}$")
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    dialect: Dialect | None = None
    """How its clients are told the sources, if the request does not say."""
    expires_at: AwareDatetime | None = None
    is_admin: bool = False
    created_at: AwareDatetime

    @property
    def is_expired(self) -> bool:
        """Its time has passed."""
        return self.expires_at is not None and self.expires_at <= datetime.now(UTC)

    def may_read(self, collection: str) -> bool:
        """Search in it, ask it, and list and read its documents."""
        return self.is_admin or _matches(collection, self.read)

    def may_write(self, collection: str) -> bool:
        """Add documents to it, and delete them."""
        return self.is_admin or _matches(collection, self.write)


class Keys(BaseModel):
    """The whole file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[Key, ...] = ()


def keys_path(settings: Settings) -> Path:
    """Say where the keys are."""
    return settings.access.keys_file or settings.data_dir / FILE


def read_keys(path: Path) -> tuple[Key, ...]:
    """Read all keys; none where there is no file. Raises `ConfigurationError`."""
    try:
        return Keys.model_validate_json(path.read_bytes()).keys
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ConfigurationError(
            f"{path}: the file of keys cannot be read ({error.strerror}). Give the service's user access to it."
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise ConfigurationError(
            f"{path}: the file of keys is broken ({where}: {first['msg']}). Restore it, or remove it and create the "
            "keys again with `cleave keys create`."
        ) from None


def check_keys(config: Config) -> None:
    """Refuse to serve other machines without a key, and a file of keys that is broken. Raises `ConfigurationError`."""
    path = keys_path(config.settings)
    has_key = any(not key.is_expired for key in read_keys(path))
    if has_key or config.settings.access.allow_without_keys or reaches_loopback_only(config.host):
        return
    raise ConfigurationError(
        f"http_options.host: {config.host} is open to other machines, and there is no key in {path}. Create one with "
        "`cleave keys create NAME --admin`, or set http_options.host: 127.0.0.1."
    )


def create_key(
    path: Path,
    name: str,
    *,
    read: Sequence[str] = (),
    write: Sequence[str] = (),
    default_collection: str | None = None,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    dialect: Dialect | None = None,
    expires_at: datetime | None = None,
    is_admin: bool = False,
) -> tuple[Key, str]:
    """Add a key to the file; return it and the text that its owner sends, which is kept nowhere.

    Without `default_collection` it is the first of the collections that is named in full.

    Raises:
        InvalidRequest: it may do nothing, or the name is taken or cannot be one.
        ConfigurationError: the file cannot be read or written.
    """
    if not (read or write or is_admin):
        raise InvalidRequest("A key must be allowed something: --read COLLECTION, --write COLLECTION, or --admin.")
    secret = secrets.token_urlsafe(SECRET_BYTES)
    try:
        key = Key(
            id=secrets.token_hex(6),
            name=name,
            hash=_hash(secret),
            read=tuple(read),
            write=tuple(write),
            default_collection=default_collection or next((one for one in (*read, *write) if "*" not in one), None),
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            dialect=dialect,
            expires_at=expires_at,
            is_admin=is_admin,
            created_at=datetime.now(UTC).replace(microsecond=0),
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidRequest(f"{first['loc'][0]}: {first['input']!r} cannot be one: {first['msg']}.") from None
    with _locked(path):
        held = read_keys(path)
        if any(one.name == name for one in held):
            raise InvalidRequest(f"There is a key {name!r} already. Revoke it first, or choose another name.")
        _write(path, (*held, key))
    return key, f"{PREFIX}-{key.id}-{secret}"


def revoke_key(path: Path, name: str) -> Key:
    """Remove a key from the file. Raises `InvalidRequest` when there is none of that name."""
    with _locked(path):
        held = read_keys(path)
        revoked = next((one for one in held if one.name == name), None)
        if revoked is None:
            raise InvalidRequest(f"There is no key {name!r} in {path}. `cleave keys list` shows those that there are.")
        _write(path, [one for one in held if one is not revoked])
    return revoked


class KeyFile:
    """The file as a running service follows it: what `cleave keys` changes counts after a second.

    Where there was a file, a key is needed, even if the file is empty now or gone: losing a disk opens nothing.
    """

    def __init__(self, settings: Settings) -> None:
        self._path = keys_path(settings)
        self._keys: dict[str, Key] = {}
        self._signature: Signature | None = None
        self._problem = ""
        self._is_needed = settings.access.keys_file is not None
        self._checked_at = -CHECK_S
        self._checking = asyncio.Lock()

    async def are_needed(self) -> bool:
        """Tell whether requests must bring a key."""
        await self._follow()
        return self._is_needed

    async def find(self, sent: str) -> Key:
        """Find the key that was sent. Raises `InvalidKey`, and `KeysUnreadable` while the file is broken."""
        await self._follow()
        if self._problem:
            raise self._unreadable()
        form = FORM.fullmatch(sent)
        key = self._keys.get(form["id"]) if form else None
        # Compared also where there is no such key, so that the time tells nothing.
        is_right = hmac.compare_digest(_hash(form["secret"] if form else ""), key.hash if key else _hash(""))
        if key is None or not is_right:
            raise InvalidKey("This key is not valid here, or was revoked. Ask whoever runs the service for another.")
        if key.is_expired:
            raise InvalidKey(f"The key {key.name!r} has expired. Ask whoever runs the service for another.")
        return key

    async def by_id(self, key_id: str) -> Key:
        """Find the key that began something which goes on without its owner. Raises as `find` does."""
        await self._follow()
        if self._problem:
            raise self._unreadable()
        key = self._keys.get(key_id)
        if key is None or key.is_expired:
            raise InvalidKey("The key that this was begun with was revoked, or has expired.")
        return key

    def _unreadable(self) -> KeysUnreadable:
        return KeysUnreadable("The service cannot read its keys. Its log says why.", retry_after_s=10)

    async def _follow(self) -> None:
        """Read the file again if it is another than at the last look, at most once a second."""
        async with self._checking:
            if time.monotonic() - self._checked_at < CHECK_S:
                return
            await asyncio.to_thread(self._read)
            self._checked_at = time.monotonic()

    def _read(self) -> None:
        try:
            signature = _signature(self._path)
            if signature == self._signature and not self._problem:
                return
            self._keys = {key.id: key for key in read_keys(self._path)}
        except (OSError, ConfigurationError) as error:
            self._is_needed = True
            problem = error.message if isinstance(error, ConfigurationError) else f"{self._path}: {error.strerror}"
            if problem != self._problem:
                logger.error("the keys cannot be read, and nobody is let in", extra={"why": problem})
            self._problem = problem
            return
        self._is_needed = self._is_needed or signature is not None
        self._signature = signature
        self._problem = ""
        logger.info("keys read", extra={"file": str(self._path), "num_keys": len(self._keys)})


def _signature(path: Path) -> Signature | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _matches(collection: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(collection, pattern) for pattern in patterns)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let nobody else change the file meanwhile."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with in_turn(path.with_name(f".{path.name}.lock")):
            yield
    except OSError as error:
        raise ConfigurationError(f"{path}: the file of keys cannot be written ({error.strerror}).") from None


def _write(path: Path, keys: Sequence[Key]) -> None:
    """Write the file, for its owner's eyes only."""
    content = Keys(keys=tuple(keys)).model_dump_json(indent=2) + "\n"
    write_whole(path, content.encode(), mode=0o600)
