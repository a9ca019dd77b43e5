"""A real uvicorn on a free port for a test, in a thread with a loop of its own."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager

from fastapi import FastAPI

from api.cli.serve import Server

AppFactory = Callable[[], AbstractAsyncContextManager[FastAPI]]


@contextlib.contextmanager
def running(make_app: AppFactory) -> Iterator[str]:
    """Serves the app until the block ends; the app is made and closed in the server's own loop."""
    started: threading.Event = threading.Event()
    failure: list[BaseException] = []
    stop: list[Callable[[], None]] = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))

        async def main() -> None:
            async with make_app() as app:
                server = _Server(app, started)
                loop = asyncio.get_running_loop()
                stop.append(lambda: loop.call_soon_threadsafe(setattr, server, "should_exit", True))
                await server.serve(sockets=[listener])

        def run() -> None:
            try:
                asyncio.run(main())
            except BaseException as error:  # noqa: BLE001 – shown to the test below
                failure.append(error)
            finally:
                started.set()

        thread = threading.Thread(target=run)
        thread.start()
        started.wait()
        if failure:
            raise failure[0]
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            stop[0]()
            thread.join()
    if failure:
        raise failure[0]


class _Server(Server):
    def __init__(self, app: FastAPI, has_started: threading.Event) -> None:
        super().__init__(app)
        self._has_started = has_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._has_started.set()


@contextlib.asynccontextmanager
async def as_is(app: FastAPI) -> AsyncIterator[FastAPI]:
    yield app


def connect(url: str) -> socket.socket:
    """A bare connection, for a client that breaks off."""
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def read_until(client: socket.socket, mark: bytes) -> bytes:
    """What the server sends, up to and including `mark`."""
    received = b""
    while mark not in received:
        piece = client.recv(65536)
        assert piece, f"the server closed before {mark!r}: {received!r}"
        received += piece
    return received
