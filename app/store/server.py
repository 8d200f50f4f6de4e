"""The store on a Qdrant server, for collections that several processes share; `:memory:` is for tests.

Same points, filters and fusion as the embedded store. A write ends with one request that publishes the new version
and removes the older one; a search that falls between the two keeps the newer.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from qdrant_client import AsyncQdrantClient
from qdrant_client.http.exceptions import ApiException, UnexpectedResponse
from qdrant_client.models import (
    Condition,
    DeleteOperation,
    Distance,
    Document as _,  # noqa
)
