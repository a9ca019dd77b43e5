"""A client's connection: there are only so many, and each must say in time what it wants. So neither silent clients nor
those that send a byte an hour keep others out, and none takes the descriptors that the engine needs.
"""

import asyncio
import contextlib
import resource

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from api.errors import error_response
from vlm_serve.errors import RequestTimeoutError, ServiceError

PATIENCE = 20.0
"""Seconds that a client has to send its request, head and body."""

SLOWEST = 16 * 1024
"""Bytes a second: a large body has as long as it takes at this rate besides."""

MAX_CONNECTIONS = 4096
MAX_ACCEPTED = 100

SLOW = "The request did not arrive in time. Send it faster."
FULL = "The server has as many connections as it can take. Try again in a moment."


def raise_descriptor_limit() -> None:
    """As far as the system lets this process go: many shells and service managers begin with 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # a system whose "unlimited" is not meant so
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def max_connections() -> int:
    """At once: half of the descriptors that this process may have."""
    return _share(2, MAX_CONNECTIONS)


def max_accepted() -> int:
    """In one turn of the event loop. Those past `max_connections` are closed three turns later and must not use up the
    descriptors meanwhile.
    """
    return _share(16, MAX_ACCEPTED)


def _share(parts: int, most: int) -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if limit == resource.RLIM_INFINITY else max(1, min(most, limit // parts))


class Connection(H11Protocol):
    """uvicorn's, with a bound and a deadline: it has one for connections that idle between two requests alone."""

    _look: asyncio.TimerHandle | None = None
    _began: float
    _received: int

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin()
        if len(self.connections) > max_connections():
            self._refuse(ServiceError(FULL))

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        super().data_received(data)

    def on_response_complete(self) -> None:
        self._begin()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        super().connection_lost(exc)

    def _begin(self) -> None:
        """A request may come now."""
        self._end()
        self._began, self._received = self.loop.time(), 0
        self._look = self.loop.call_later(PATIENCE, self._check)

    def _end(self) -> None:
        if self._look is not None:
            self._look.cancel()

    def _check(self) -> None:
        """Closes a connection whose client is too slow; one whose request is here has all the time it needs."""
        if self.transport.is_closing() or self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            return
        left = self._began + PATIENCE + self._received / SLOWEST - self.loop.time()
        if self.flow.read_paused:  # it is the server that does not read on
            left = PATIENCE
        if left > 0:
            self._look = self.loop.call_later(left, self._check)
        elif self._received:
            self._refuse(RequestTimeoutError(SLOW))
        else:
            self.transport.close()

    def _refuse(self, error: Exception) -> None:
        """Says why, as far as an answer has not begun, and closes."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        response = error_response(error)
        headers = [*response.raw_headers, (b"connection", b"close")]
        reason = STATUS_PHRASES[response.status_code]
        for event in (
            h11.Response(status_code=response.status_code, headers=headers, reason=reason),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:  # what the route still says is not sent
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
