"""An ASGI middleware that bounds a request's body while it streams in, before anyone holds all of it.

A declared length past the limit is refused at once; a body without one (or with a false one) when the byte
past the limit arrives. Depth of JSON is bounded where it is parsed: pydantic's parser stops at 200 levels.
"""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import error_response
from vlm_serve.errors import PayloadTooLargeError


class BodyLimit:
    """Refuses a body of more than `max_bytes` with 413."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > self.max_bytes:
            await error_response(self._too_large())(scope, receive, send)
            return
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise self._too_large()
            return message

        await self.app(scope, bounded, send)

    def _too_large(self) -> PayloadTooLargeError:
        return PayloadTooLargeError(
            f"The body is larger than {self.max_bytes} bytes. Send fewer or smaller files, or raise max_body_bytes."
        )
