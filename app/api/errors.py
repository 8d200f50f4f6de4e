"""Every error on every route as an OpenAI error object."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app.errors import CleaveError, InvalidRequest, NotFound
from app.telemetry import logger, request_id

BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
"""A message is one line, also where it names what a client has sent."""
STATUS_NAMES = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 415: "unsupported_media_type"}


def error_body(error: CleaveError) -> dict[str, Any]:
    """Build the error object of one error."""
    message = BREAKS.sub(" ", error.message).strip()
    return {"error": {"message": message, "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: CleaveError) -> JSONResponse:
    """Answer with an error: its status, its object, and when to try again if that is known."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.status, headers)


def install_error_handlers(api: FastAPI) -> None:
    """Answer every kind of failure in the one shape."""
    api.add_exception_handler(CleaveError, _cleave_error)
    api.add_exception_handler(RequestValidationError, _validation_error)
    api.add_exception_handler(HTTPException, _http_error)
    api.add_exception_handler(ClientDisconnect, _client_left)


def internal_error(error: BaseException) -> CleaveError:
    """Log an error that nobody foresaw, and give the caller what to quote in a report."""
    logger.error("unexpected error", exc_info=error)
    return CleaveError(f"Internal error. The service's log has the details under request id {request_id.get()!r}.")


async def _cleave_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, CleaveError)
    return error_response(error)


def refusal(error: Mapping[str, Any], path: Sequence[int | str]) -> InvalidRequest:
    """Say in one line what pydantic found wrong at `path` of a body."""
    param = ".".join(map(str, path)) or None
    if error["type"] == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON: {error['ctx']['error']}.")
    if not param:
        return InvalidRequest("The body is not a JSON object. Send one with the header Content-Type: application/json.")
    return InvalidRequest(f"{param}: {error['msg']}.", param=param)


async def _validation_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return error_response(refusal(first, first["loc"][1:]))


async def _client_left(_: Request, error: Exception) -> JSONResponse:
    return error_response(InvalidRequest("The client left before all had come."))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, CleaveError):
        return await _cleave_error(request, error.__cause__)  # Raised by the body limit while the body was parsed.
    if isinstance(error.__cause__, (RecursionError, ValueError)):
        # What stopped the parser of JSON.
        message = "The body cannot be read as JSON: send UTF-8, nested less deeply, with shorter numbers."
        return await _cleave_error(request, InvalidRequest(message))
    if error.status_code == 404:
        message = f"There is no {request.method} {request.url.path}. See /docs for the routes."
        return await _cleave_error(request, NotFound(message))
    translated = InvalidRequest(f"{request.method} {request.url.path}: {error.detail.rstrip('.')}.")
    translated.status = error.status_code
    translated.code = STATUS_NAMES.get(error.status_code, "bad_request")
    response = await _cleave_error(request, translated)
    response.headers.update(error.headers or {})
    return response
