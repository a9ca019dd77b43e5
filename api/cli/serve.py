"""`vlm-serve serve`: binds the port, starts the engine, serves until a signal, and cleans up after itself."""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI
from rich.console import Console

from api.app import create_app
from api.cli.arguments import given_settings
from api.cli.settings import load_settings
from api.connection import Connection, max_accepted, raise_descriptor_limit
from api.gateway.keys import KeyFile
from vlm_serve.config import ServerConfig, Settings
from vlm_serve.errors import ConfigurationError
from vlm_serve.serving.async_llm import AsyncLLM

GRACE = 8
"""Seconds that running answers have to end after a first SIGTERM or SIGINT; a second one ends them. Container
runtimes kill after 10."""

BACKLOG = 2048
"""Connections that the system keeps until they are accepted."""

FAREWELL = 1.0
"""Seconds that requests cut off at the end have to tell their clients."""


def serve(arguments: argparse.Namespace) -> int:
    settings = load_settings(given_settings(arguments), os.environ, arguments.config)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    raise_descriptor_limit()
    return asyncio.run(run_server(settings, Console()))


async def run_server(settings: Settings, console: Console) -> int:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigurationError: the port is taken, or the model, its settings or the file of keys are wrong.
    """
    if settings.server.api_keys is not None:
        KeyFile.read(settings.server.api_keys)  # what is wrong in it is told before a model is loaded
    with bind(settings.server) as listener, stop_signals() as stop:
        starting = asyncio.ensure_future(
            AsyncLLM.start(
                settings,
                on_phase=lambda name, seconds: print_phase(console, name, seconds),
                on_progress=lambda what: console.print(f"  [dim]…[/] {what}", highlight=False),
            )
        )
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return 0
        llm = starting.result()
        try:
            print_ready(console, listener, llm)
            await _serve_until(stop, create_app(llm, settings.server), listener)
        finally:
            await llm.close()
    return 0


@contextlib.contextmanager
def bind(config: ServerConfig) -> Iterator[socket.socket]:
    """The listening socket, taken before a model is loaded.

    Raises:
        ConfigurationError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((config.host, config.port))
        except OSError as error:
            raise ConfigurationError(
                f"Cannot listen on {config.host} port {config.port}: {error.strerror}. "
                "Stop what holds it, or choose another --host or --port."
            ) from None
        yield listener


@contextlib.contextmanager
def stop_signals() -> Iterator[asyncio.Event]:
    """An event that the first SIGTERM or SIGINT sets."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: they would end the process before the engine is closed."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                # Its access log would write URLs, and our phases tell the start-up: `api.request_log` logs requests.
                access_log=False,
                # h11, whatever else is installed: it bounds the head of a request, to 64 KiB.
                http=Connection,
                backlog=max_accepted(),
                log_level="warning",
                log_config=None,
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=GRACE,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():  # the system's queue, of those who come at once, may be long
            listener.listen(BACKLOG)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def force(self) -> None:
        """Ends the requests that are left: uvicorn's own `force_exit` would leave them to the loop's end."""
        self.force_exit = True
        for task in self.server_state.tasks:
            if not task.cancelling():  # a second cancellation would cut off what the first one says
                task.cancel()

    async def ended(self) -> None:
        """Waits until the requests cut off have told their clients, while the engine is still there."""
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=FAREWELL)


async def _serve_until(stop: asyncio.Event, app: FastAPI, listener: socket.socket) -> None:
    server = Server(app)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.force)
        await serving
        await server.ended()
    finally:
        stopping.cancel()


def print_phase(console: Console, name: str, seconds: float) -> None:
    console.print(f"  [green]✓[/] {name} [dim]{seconds:.2f} s[/]", highlight=False, soft_wrap=True)


def print_ready(console: Console, listener: socket.socket, llm: AsyncLLM) -> None:
    host, port = listener.getsockname()[:2]
    shown = "127.0.0.1" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}"
    body = json.dumps(
        {"model": llm.models[0].id, "messages": [{"role": "user", "content": "What is a pleural effusion?"}]}
    )
    for model in llm.models:
        kind = f"an adapter of {model.parent}" if model.parent else f"{model.max_model_len} tokens of context"
        console.print(f"  {model.id}: {kind}", highlight=False, markup=False, soft_wrap=True)
        if model.notice:
            console.print(f"    {model.notice}", style="yellow", markup=False, soft_wrap=True)
    console.print(f"Ready at {url}. To try it:", highlight=False, markup=False, soft_wrap=True)
    command = f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    console.print(command, soft_wrap=True, highlight=False, markup=False)
