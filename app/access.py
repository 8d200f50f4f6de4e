"""What the sender of a request may do: asked at every step to documents and model, and written into the log."""

from contextvars import ContextVar
from typing import Any

from app.domain import Dialect
from app.errors import Forbidden
from app.keys import Key


class Caller:
    """Who sent a request, and what it has touched so far. Without a key, it may do everything.

    `own_collection` is the service's, which is meant when neither the request nor the key names one.
    """

    def __init__(self, key: Key | None, own_collection: str) -> None:
        self.key = key
        self.was_checked = key is None
        """Something has asked what it may do."""
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._own_collection = own_collection
        self._collections: dict[str, None] = {}

    @property
    def dialect(self) -> Dialect | None:
        """How the key wants sources told."""
        return None if self.key is None else self.key.dialect

    def allow(self) -> None:
        """Give what is nobody's: every key may have it."""
        self.was_checked = True

    def may_read(self, collection: str) -> bool:
        """Tell whether it may know of this collection's documents."""
        self.was_checked = True
        return self.key is None or self.key.may_read(collection)

    def may_see(self, collection: str) -> bool:
        """Tell whether it may know that there is this collection."""
        return self.may_read(collection) or (self.key is not None and self.key.may_write(collection))

    def readable(self, collection: str | None) -> str:
        """Name the collection that is meant. Raises `Forbidden` unless its documents may be read."""
        found = self._meant(collection)
        if not self.may_read(found):
            raise self._refusal(f"read the collection {found!r}")
        return found

    def writable(self, collection: str | None) -> str:
        """Name the collection that is meant. Raises `Forbidden` unless documents may be added and deleted there."""
        found = self._meant(collection)
        self.was_checked = True
        if self.key is not None and not self.key.may_write(found):
            raise self._refusal(f"write to the collection {found!r}")
        return found

    def reindexable(self, collection: str | None) -> str:
        """Name the collection that is meant. Raises `Forbidden` unless the key is an administrator's."""
        found = self._meant(collection)
        self.was_checked = True
        if self.key is not None and not self.key.is_admin:
            raise self._refusal(f"reindex the collection {found!r}")
        return found

    def check_may_ask(self) -> None:
        """Refuse the language model to a key that may only write. Raises `Forbidden`."""
        self.was_checked = True
        if self.key is not None and not (self.key.is_admin or self.key.read):
            raise self._refusal("use the language model")

    @property
    def key_id(self) -> str | None:
        """Names its key, to whom belongs what it leaves here; None without a key."""
        return None if self.key is None else self.key.id

    def may_have(self, key_id: str | None) -> bool:
        """Tell whether what the bearer of this key has left here is shown to it too."""
        self.was_checked = True
        return self.key is None or self.key.is_admin or self.key.id == key_id

    def is_default(self, collection: str) -> bool:
        """Tell whether this collection is meant when a request names none."""
        return collection == self._default

    def audit(self) -> dict[str, Any]:
        """Give what the log says of the request: never the key's secret, which is not known here."""
        return {
            "key": self.key and self.key.name,
            "key_id": self.key and self.key.id,
            "collection": ",".join(self._collections) or None,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
        }

    @property
    def _default(self) -> str:
        return (self.key and self.key.default_collection) or self._own_collection

    def _meant(self, collection: str | None) -> str:
        found = collection or self._default
        self._collections[found] = None
        return found

    def _refusal(self, what: str) -> Forbidden:
        assert self.key is not None
        reads, writes = (", ".join(one) or "nothing" for one in (self.key.read, self.key.write))
        return Forbidden(f"The key {self.key.name!r} may not {what}. It may read: {reads}; write: {writes}.")


caller: ContextVar[Caller] = ContextVar("caller")
"""Of the request that is being answered; without one, nothing is given out."""
