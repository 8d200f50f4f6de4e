"""Routes: the models that clients may name, which are the profiles and the raw language model."""

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from fastapi import APIRouter

from app.access import caller
from app.api.bodies import Listed, ModelBody
from app.api.schemas import PROFILE
from app.domain import ModelInfo
from app.errors import LLMUnavailable, ModelNotFound
from app.services import Answering, Services
from app.settings import ProfileSettings, Settings

STARTED_AT = int(time.time())


def models_router(services: Services) -> APIRouter:
    """Build the routes over the given parts."""
    router = APIRouter(tags=["models"])

    @router.get("/v1/models", responses={200: {"model": Listed[ModelBody]}})
    async def list_models() -> dict[str, Any]:
        """List the profiles that answer from documents, and the raw language model while it is up."""
        models = [_profile(name, profile) for name, profile in profiles(services.settings).items()]
        with suppress(LLMUnavailable):  # It is listed again when it is back.
            models.append(_raw_model(await services.llm.info()))
        return {"object": "list", "data": models}

    @router.get("/v1/models/{model:path}", responses={200: {"model": ModelBody}})
    async def read_model(model: str) -> dict[str, Any]:
        """Describe one model."""
        caller.get().allow()
        profile = profiles(services.settings).get(model)
        if profile is not None:
            return _profile(model, profile)
        info = await services.llm.info()
        if info.id != model:
            raise _not_found(model, info.id, services.settings)
        return _raw_model(info)

    return router


def profiles(settings: Settings) -> Mapping[str, ProfileSettings]:
    """Give the models that answer from documents, by name."""
    return {PROFILE: ProfileSettings(), **settings.profiles}


async def find_profile(services: Answering, model: str) -> ProfileSettings | None:
    """Look a profile up; None for the raw language model. Raises `ModelNotFound` for any other name."""
    profile = profiles(services.settings).get(model)
    if profile is not None:
        return profile
    try:
        served = (await services.llm.info()).id
    except LLMUnavailable:
        return None  # The name cannot be checked now. The request is refused, and wakes a tier scaled to zero.
    if model != served:
        raise _not_found(model, served, services.settings)
    return None


def _not_found(model: str, served: str, settings: Settings) -> ModelNotFound:
    names = " or ".join(map(repr, (*profiles(settings), served)))
    return ModelNotFound(f"The model {model!r} is not served here. Use {names}.", param="model")


def _profile(name: str, profile: ProfileSettings) -> dict[str, Any]:
    return _model(name, "cleave", profile.description)


def _raw_model(info: ModelInfo) -> dict[str, Any]:
    return _model(info.id, info.engine, f"The language model alone, {info.context_window} tokens.")


def _model(name: str, owner: str, description: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": STARTED_AT, "owned_by": owner, "description": description}
