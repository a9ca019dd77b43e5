"""One line in the log for each request, and an id to find it by; the last stop of an unexpected exception.

Neither carries anything a client wrote, but for an id of a strict pattern: no URL, no content, no text of
an exception.
"""

import asyncio
import logging
import re
import traceback
import uuid
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import error_response
from api.record import RECORD, RequestRecord
from vlm_serve.errors import ServiceError

logger = logging.getLogger("vlm_serve.api")

STOPPING = "The server is shutting down. Send the request again."

_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{7,63}")


def request_id_of(headers: Mapping[str, str]) -> str:
    """The client's `X-Request-Id` if it is a plain word of 8 to 64 characters, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


class RequestLog:
    """Gives each request its id and its line in the log, and turns an unexpected exception into a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = RequestRecord(request_id_of(Headers(scope=scope)))
        scope[RECORD] = record

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = record.request_id
            await send(message)

        try:
            await self.app(scope, receive, stamped)
        except asyncio.CancelledError:  # the server is told to stop at once
            if record.status is None:
                record.facts["error"] = "shutdown"
                await error_response(ServiceError(STOPPING))(scope, receive, stamped)
        except Exception as error:  # noqa: BLE001 – the last stop; its text may echo content and is not logged
            self._log_unexpected(record, error)
            if record.status is None:
                await error_response(error)(scope, receive, stamped)
        finally:
            self._log(scope, record)

    @staticmethod
    def _log_unexpected(record: RequestRecord, error: Exception) -> None:
        frames = traceback.extract_tb(error.__traceback__)[-8:]
        where = " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames))
        logger.error("request %s: unexpected %s at %s", record.request_id, type(error).__name__, where)

    @staticmethod
    def _log(scope: Scope, record: RequestRecord) -> None:
        route = getattr(scope.get("route"), "path", "-")  # its template, never the URL that was asked for
        facts = "".join(
            f" {name}={value:.3f}" if isinstance(value, float) else f" {name}={value}"
            for name, value in record.facts.items()
        )
        status = record.status if record.status is not None else "-"
        level = logging.DEBUG if route in ("/health", "/ready", "/metrics") and record.status == 200 else logging.INFO
        logger.log(
            level,
            "request %s: %s %s status=%s%s seconds=%.3f",
            record.request_id,
            scope["method"] if route != "-" else "-",
            route,
            status,
            facts,
            record.elapsed,
        )
