"""What belongs to this machine alone: names of its loopback address, and a server that answers to no other.

A web page can give its own name the address 127.0.0.1 (DNS rebinding), and a browser then takes the server for
a part of that page. The `Host` header tells: it carries the page's name.
"""

import ipaddress
import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import error_response
from api.record import record_of
from vlm_serve.errors import InvalidRequestError

_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:@\[\]]+))(?::\d*)?")


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address without brackets and port, can only be this machine."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class LoopbackHosts:
    """Refuses a request under any name but localhost, 127.0.0.1 and [::1], with 400."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_ours(Headers(scope=scope).get("host")):
            record_of(scope).facts["error"] = "host"
            error = InvalidRequestError(
                "This server listens on its own machine alone and answers to localhost, 127.0.0.1 and [::1], not to "
                "the name in the Host header. Use one of these, or start the server with another --host."
            )
            await error_response(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def _is_ours(host: str | None) -> bool:
    """A request without the header is not a browser's."""
    if host is None:
        return True
    match = _HOST.fullmatch(host)
    return match is not None and is_loopback(match[1] or match[2])
