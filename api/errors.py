"""Errors on the wire: one table from the exception tree to HTTP, and OpenAI's error form for every failure.

    {"error": {"message": …, "type": …, "param": …, "code": …}}

Nothing that a client sent is echoed but the names of its fields, and an unexpected exception becomes a
fixed text: its own may carry what it was given.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from api.disconnect import ClientGoneError
from api.record import record_of
from api.schemas.fields import WireModel
from vlm_serve.errors import (
    AuthenticationError,
    ContextLengthError,
    CorruptImageError,
    EngineDeadError,
    ImageError,
    ImageLimitError,
    InputError,
    InvalidRequestError,
    MediaMismatchError,
    ModelNotFoundError,
    OverloadedError,
    PayloadTooLargeError,
    PermissionDeniedError,
    PoisonedRequestError,
    RequestFailedError,
    RequestTimeoutError,
    ServiceError,
    UnsupportedImageError,
    VlmServeError,
)
from vlm_serve.types import JsonObject


@dataclass(frozen=True, slots=True)
class HttpError:
    """How a failure looks on the wire."""

    status: int
    type: str
    code: str | None = None
    headers: Mapping[str, str] | None = None


TABLE: Mapping[type[VlmServeError], HttpError] = {
    InputError: HttpError(400, "invalid_request_error"),
    InvalidRequestError: HttpError(400, "invalid_request_error"),
    ContextLengthError: HttpError(400, "invalid_request_error", "context_length_exceeded"),
    AuthenticationError: HttpError(401, "authentication_error", "invalid_api_key", {"WWW-Authenticate": "Bearer"}),
    PermissionDeniedError: HttpError(403, "permission_error", "permission_denied"),
    ModelNotFoundError: HttpError(404, "invalid_request_error", "model_not_found"),
    PayloadTooLargeError: HttpError(413, "invalid_request_error", "payload_too_large"),
    RequestTimeoutError: HttpError(408, "invalid_request_error", "request_timeout"),
    ImageError: HttpError(422, "invalid_request_error", "invalid_image"),
    MediaMismatchError: HttpError(400, "invalid_request_error", "media_mismatch"),
    UnsupportedImageError: HttpError(422, "invalid_request_error", "unsupported_image"),
    CorruptImageError: HttpError(422, "invalid_request_error", "corrupt_image"),
    ImageLimitError: HttpError(422, "invalid_request_error", "image_limit_exceeded"),
    ServiceError: HttpError(503, "server_error", "unavailable"),
    OverloadedError: HttpError(429, "rate_limit_error", "overloaded", {"Retry-After": "1"}),
    EngineDeadError: HttpError(503, "server_error", "engine_unavailable"),
    PoisonedRequestError: HttpError(500, "server_error", "request_refused"),
    RequestFailedError: HttpError(500, "server_error", "request_failed"),
}

CLIENT_CLOSED_REQUEST = 499
"""In the log, for a client that left before its answer (nginx's number); nobody is there to read it."""

INTERNAL = HttpError(500, "server_error", "internal_error")
INTERNAL_MESSAGE = "An unexpected error ended this request. Its id, in the X-Request-Id header, finds it in the log."


def http_error(error: Exception) -> HttpError:
    """The row of the nearest class of the tree; an exception from outside it is an internal error."""
    return next((TABLE[cls] for cls in type(error).__mro__ if cls in TABLE), INTERNAL)


def error_body(error: Exception) -> JsonObject:
    """OpenAI's error form. The text of an exception that has no row is not shown."""
    row = http_error(error)
    message = INTERNAL_MESSAGE if row is INTERNAL else str(error)
    return _form(message, row.type, getattr(error, "param", None), row.code)


def _form(message: str, kind: str, param: str | None, code: str | None) -> JsonObject:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: Exception) -> JSONResponse:
    row = http_error(error)
    return JSONResponse(error_body(error), row.status, headers=row.headers)


_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")


@cache
def _field_names() -> frozenset[str]:
    """Every field of the wire's models: all else in a location of pydantic's is its own, or a caller's."""
    models, names = [WireModel], set[str]()
    for model in models:
        models += model.__subclasses__()
        names |= {field.alias or name for name, field in model.model_fields.items()}
    return frozenset(names)


def _field_path(location: Sequence[int | str], *, is_unknown: bool = False) -> str | None:
    """`messages[0].content[1].image_url.url`: pydantic's location without the tags of unions.

    Args:
        is_unknown: its last step is a field that no model has.
    """
    path = ""
    for index, step in enumerate(location):
        is_last = index == len(location) - 1
        if isinstance(step, int):
            path += f"[{step}]"
        elif index >= 2 and location[index - 2] == "content" and isinstance(location[index - 1], int):
            continue
        elif step in _field_names() or (is_unknown and is_last and _FIELD.fullmatch(step)):
            path += f".{step}" if path else step
    return path or None


def invalid_request(error: ValidationError) -> InvalidRequestError:
    """Of pydantic's findings, every unknown field by name, else the first; never the value that was sent."""
    found = error.errors(include_url=False, include_input=False)
    unknown = [_field_path(item["loc"], is_unknown=True) for item in found if item["type"] == "extra_forbidden"]
    if unknown:
        names = ", ".join(f"'{name}'" if name else "a field with an odd name" for name in unknown[:8])
        return InvalidRequestError(f"Unknown: {names}. Leave it out, or check its spelling.", param=unknown[0])
    first = found[0]
    param = _field_path(first["loc"])
    if first["type"] == "value_error":  # our own validators'; their texts name the fields
        message = first["msg"].removeprefix("Value error, ")
        named = re.search(r"'(\w+)'", message)
        return InvalidRequestError(message, param=param or (named.group(1) if named else None))
    if first["type"] == "union_tag_invalid":  # pydantic's own text echoes the tag
        tags = first["ctx"]["expected_tags"].replace("'", "")
        message = f"'type' must be one of {tags}."
    elif first["type"] == "union_tag_not_found":
        message = "'type' is missing."
    else:
        message = first["msg"].rstrip(".") + "."
    return InvalidRequestError(f"{param}: {message}" if param else message, param=param)


def install_error_handlers(app: FastAPI) -> None:
    """Every failure of a route in one form: our tree's, pydantic's, and the router's 404 and 405."""

    def ours(request: Request, error: Exception) -> JSONResponse:
        record_of(request.scope).facts["error"] = http_error(error).code or "invalid_request"
        return error_response(error)

    def validation(_: Request, error: Exception) -> JSONResponse:
        return error_response(InvalidRequestError("A parameter of the URL is not valid."))

    def routing(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        texts: dict[int, tuple[str, str]] = {
            404: ("There is no such route; see /openapi.json for those there are.", "not_found"),
            405: ("This route does not take this method.", "method_not_allowed"),
        }
        message, code = texts.get(error.status_code, ("The request could not be handled.", "http_error"))
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        return JSONResponse(_form(message, kind, None, code), error.status_code, headers=error.headers)

    def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    handlers: dict[Any, Any] = {
        VlmServeError: ours,
        RequestValidationError: validation,
        HTTPException: routing,
        ClientGoneError: gone,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
