"""Routes: is the process alive, and can it answer."""

import asyncio
from collections.abc import Awaitable
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from app.api.bodies import Live, Ready
from app.api.errors import internal_error
from app.errors import CleaveError, LLMCold
from app.keys import KeyFile
from app.services import Services

PROBE_TIMEOUT_S = 2.0
SHOWN_TO_ALL = frozenset({"status", "error", "code", "embedding_model"})
"""Of the retriever, where there are keys."""


def health_router(services: Services, keys: KeyFile) -> APIRouter:
    """Build the routes over the given parts."""
    router = APIRouter(tags=["health"])

    @router.get("/livez", responses={200: {"model": Live}})
    @router.get("/health", responses={200: {"model": Live}})
    async def live() -> dict[str, str]:
        """Answer at once, without asking any other part: a slow dependency is no reason for a restart."""
        return {"status": "ok"}

    @router.get("/readyz", responses={200: {"model": Ready}, 503: {"model": Ready}})
    async def ready(verbose: str | None = None) -> JSONResponse:
        """Say whether questions can be answered: not without the retriever; without the LLM in quotes (`degraded`)."""
        retriever, llm = await asyncio.gather(_probe(services.retriever.info()), _probe(services.llm.info()))
        if "error" in retriever:
            status, code = "not_ready", 503
        else:
            status, code = ("degraded" if "error" in llm else "ready"), 200
        if await keys.are_needed():
            # Anybody may ask, and the documents are their owners' business.
            retriever = {key: value for key, value in retriever.items() if key in SHOWN_TO_ALL}
        details: dict[str, Any] = {}
        if verbose is not None or code != 200:
            details = {"parts": {"retriever": retriever, "llm": llm}, "limits": services.settings.api.model_dump()}
        return JSONResponse({"status": status, **details}, code)

    return router


async def _probe(question: Awaitable[Any]) -> dict[str, Any]:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            return {"status": "ok", **asdict(await question)}
    except TimeoutError:
        return {
            "status": "unavailable",
            "error": f"No answer within {PROBE_TIMEOUT_S:g} s; it may be busy or starting.",
        }
    except CleaveError as error:
        status = "cold" if isinstance(error, LLMCold) else "unavailable"
        return {"status": status, "error": error.message, "code": error.code}
    except Exception as error:
        return {"status": "unavailable", "error": internal_error(error).message}
