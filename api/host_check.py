"""Refuses requests for other hosts where the server listens on this machine alone.

A web page can point its own name at 127.0.0.1 (DNS rebinding) and would then speak to the server as if it
were its own site; the `Host` header still tells.
"""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import error_response
from vlm_serve.errors import InvalidRequestError

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class HostCheck:
    """Lets pass what asks for a loopback name, with any port."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and host_name(Headers(scope=scope).get("host", "")) not in LOOPBACK:
            refusal = InvalidRequestError(
                "This server answers on localhost alone. Ask for localhost, or start it with --host."
            )
            await error_response(refusal)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def host_name(host: str) -> str:
    """The name in a `Host` header, in lower case: `[::1]:8000` is `::1`."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
