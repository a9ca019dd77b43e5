"""The server that a subcommand measures: the one named by `--url`, or one started for the purpose. Serves bench and
evaluate.
"""

import argparse
import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator

import httpx
from rich.console import Console

from api.cli.arguments import given_settings
from api.cli.files import honours_proxy, key_header
from vlm_serve.errors import ConfigurationError, ServiceError
from vlm_serve.types import JsonObject

TIMEOUT = 600.0
"""Seconds of silence that a request may take: on a CPU, many at once are slow."""


@contextlib.asynccontextmanager
async def connect(arguments: argparse.Namespace, console: Console) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the server that `arguments` ask for; one started here ends with the block.

    Raises:
        ConfigurationError: settings are given for a server that runs already.
        ServiceError: it did not start.
    """
    async with _url(arguments, console) as url:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=url, timeout=TIMEOUT, limits=limits, headers=key_header(), trust_env=honours_proxy(url)
        ) as client:
            yield client


async def served_models(client: httpx.AsyncClient) -> list[JsonObject]:
    """The base model, then its adapters, as `/v1/models` has them.

    Raises:
        ServiceError: nothing answers as a server of ours would.
    """
    try:
        response = await client.get("/v1/models")
        models: list[JsonObject] = response.raise_for_status().json()["data"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise ServiceError(
            f"No list of models from {client.base_url} ({type(error).__name__}). Is a vlm-serve up at --url?"
        ) from None
    return models


@contextlib.asynccontextmanager
async def _url(arguments: argparse.Namespace, console: Console) -> AsyncIterator[str]:
    settings = given_settings(arguments)
    if arguments.url is not None:
        if settings or arguments.config:
            raise ConfigurationError(
                "--url names a server that runs already, with settings of its own: leave out the flags that set them."
            )
        yield arguments.url.removesuffix("/").removesuffix("/v1")
        return
    flags = [word for name, value in settings.items() for word in (_flag(name), str(value))]
    config = ["--config", str(arguments.config)] if arguments.config else []
    command = [sys.executable, "-m", "api.cli", "serve", "--port", "0", *flags, *config]
    with tempfile.TemporaryFile() as log:  # a line for each request, which nobody wants to read here
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=log)
        try:
            url = await _url_of(process, console)
            if url is None:
                log.seek(0)
                raise ServiceError(f"The server did not start. {log.read().decode().strip()}")
            yield url
        finally:
            if process.returncode is None:
                process.terminate()
            await process.communicate()


def _flag(name: str) -> str:
    return "--" + name.rpartition(".")[2].replace("_", "-")


async def _url_of(process: asyncio.subprocess.Process, console: Console) -> str | None:
    """Passes the start-up's phases on until the line that says where the server is; None if it ended instead."""
    assert process.stdout is not None
    while line := (await process.stdout.readline()).decode():
        if line.startswith("Ready at "):
            return line.split()[2].rstrip(".")
        console.print(line.rstrip(), markup=False, soft_wrap=True)
    return None
