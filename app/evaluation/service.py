"""The service that is measured: one in this process, or one that runs, with a collection of the evaluation's own."""

import asyncio
import contextlib
import logging
import os
import re
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from app.api import create_api
from app.client import Client
from app.errors import InvalidRequest, NotFound
from app.llm.extractive import ExtractiveEngine
from app.services import build_llm, build_retriever, build_services, decide_grounding, spare_from_collection
from app.settings import AccessSettings, Device, Settings, StoreSettings
from app.telemetry import logger

WITHOUT_EFFECT = {"data_dir", "seed", "store", "api", "access", "logging"}
"""Settings that do not change what is found and answered."""
SECRET = re.compile(r"key|token$|password|secret", re.IGNORECASE)
CREDENTIALS = re.compile(r"(?<=//)[^/@\s]*@")


@dataclass(frozen=True, slots=True)
class Target:
    """A client of the service, bound to the evaluation's collection, and the settings that the service has."""

    client: Client
    settings: Mapping[str, Any]


@asynccontextmanager
async def in_process(settings: Settings, name: str, *, with_llm: bool, is_kept: bool) -> AsyncIterator[Target]:
    """Build a service in this process over a store in a folder of its own; without the LLM, answers are quotes.

    The questions go through the same routes as a client's.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        if is_kept:
            folder = settings.data_dir / "evaluation"
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cleave-evaluation-")))
        store = StoreSettings(collection=_collection(name, is_kept=is_kept))
        own = settings.model_copy(update={"data_dir": folder, "seed": None, "store": store, "access": AccessSettings()})
        device = await asyncio.to_thread(_device, settings)
        retriever = await build_retriever(own)
        llm = await build_llm(settings, device) if with_llm else ExtractiveEngine()
        services = await build_services(own, device=device, retriever=retriever, llm=llm)
        spare_from_collection()
        try:
            transport = httpx.ASGITransport(create_api(services))
            async with Client("http://localhost", transport=transport) as client:
                yield Target(client, _resolved(settings, device))
        finally:
            await services.close()


@asynccontextmanager
async def over_http(url: str, name: str, *, is_kept: bool) -> AsyncIterator[Target]:
    """Reach a running service. Its other collections are not touched, and this one is removed afterwards.

    Raises:
        InvalidRequest: the service has one collection only, which is the user's.
    """
    collection = _collection(name, is_kept=is_kept)
    async with Client(url, collection=collection, api_key=os.environ.get("CLEAVE_API_KEY")) as client:
        try:
            await client.collections()
        except NotFound:
            raise InvalidRequest(
                f"The service at {client.url} keeps no other collection beside its own. Update it, or leave out --url."
            ) from None
        try:
            readiness = await client.readiness() or {}
            yield Target(client, {"url": client.url, **readiness.get("parts", {})})
        finally:
            if not is_kept:
                with contextlib.suppress(NotFound):  # It stopped before the first document.
                    await client.drop_collection(collection)


def _collection(name: str, *, is_kept: bool) -> str:
    """Name the collection: after the set if it is kept, so that the next run finds it, else like no other."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:40]
    return f"eval-{readable}" if is_kept else f"eval-{readable}-{uuid.uuid4().hex[:8]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the service logs from between the progress bars: the report says what matters of it."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # vLLM writes to standard output, which is the report's. It reads its environment when it is imported.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _device(settings: Settings) -> Device:
    import torch

    is_gpu = torch.cuda.is_available() if settings.llm.device == "auto" else settings.llm.device == "gpu"
    return "gpu" if is_gpu else "cpu"


def _resolved(settings: Settings, device: Device) -> dict[str, Any]:
    """Write the settings down as they take effect, without secrets."""
    llm = settings.llm.model_copy(update={"device": device, "model": settings.llm.model_on(device)})
    answer = settings.answer.model_copy(update={"grounding": decide_grounding(settings, device)})
    shown = settings.model_copy(update={"llm": llm, "answer": answer})
    return _without_secrets(shown.model_dump(mode="json", exclude=WITHOUT_EFFECT))


def _without_secrets(tree: Mapping[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for key, value in tree.items():
        if SECRET.search(key):
            continue
        if isinstance(value, dict):
            shown[key] = _without_secrets(value)
        else:
            shown[key] = CREDENTIALS.sub("", value) if isinstance(value, str) else value
    return shown
