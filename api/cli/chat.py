"""`vlm-serve chat`: one question or a conversation, with a running server or with the model loaded here."""

import argparse
import asyncio
import json
import os
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx
from rich.console import Console

from api.cli.arguments import given_settings
from api.cli.files import data_url, honours_proxy, key_header, read_image
from api.cli.receipts import print_about_images
from api.cli.settings import load_settings
from api.responses import image_answer_json
from vlm_serve.errors import InvalidRequestError, ServiceError, VlmServeError
from vlm_serve.serving.async_llm import AsyncLLM
from vlm_serve.types import ChatInput, ChatMessage, ImagePart, JsonObject, SamplingParams, TextPart


@dataclass
class Turn:
    """A question on its way; the answer's `x_vlm_serve` and finish reason are known once it ends."""

    messages: tuple[ChatMessage, ...]
    sampling: SamplingParams
    about_images: JsonObject | None = None
    finish_reason: str | None = None


class Backend(Protocol):
    """Where answers come from."""

    def answer(self, turn: Turn) -> AsyncIterator[str]:
        """The answer's text as it comes."""
        ...


class Server:
    """A running server, by its URL."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client = client
        self._model = model

    @classmethod
    @asynccontextmanager
    async def connect(cls, url: str, model: str | None) -> AsyncIterator["Server"]:
        timeout = httpx.Timeout(600.0, connect=5.0)
        base_url = url.removesuffix("/").removesuffix("/v1")
        async with httpx.AsyncClient(
            base_url=base_url, timeout=timeout, headers=key_header(), trust_env=honours_proxy(url)
        ) as client:
            if model is None:
                model = (await _request(client, "GET", "/v1/models"))["data"][0]["id"]
            yield cls(client, model)

    async def answer(self, turn: Turn) -> AsyncIterator[str]:
        sampling = turn.sampling
        body = {
            "model": self._model,
            "messages": [_message_json(message) for message in turn.messages],
            "stream": True,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
        }
        try:
            async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise _server_error(response.json())
                async for line in response.aiter_lines():
                    event = line.removeprefix("data: ")
                    if not event or event == "[DONE]":
                        continue
                    chunk = json.loads(event)
                    if "error" in chunk:
                        raise _server_error(chunk)
                    turn.about_images = chunk.get("x_vlm_serve", turn.about_images)
                    for choice in chunk["choices"]:
                        turn.finish_reason = choice["finish_reason"] or turn.finish_reason
                        yield choice["delta"].get("content", "")
        except httpx.HTTPError as error:
            raise _unreachable(self._client, error) from None


class Local:
    """The model, loaded in this process's own engine."""

    def __init__(self, llm: AsyncLLM, model: str) -> None:
        self._llm = llm
        self._model = model

    @classmethod
    @asynccontextmanager
    async def load(cls, arguments: argparse.Namespace, console: Console) -> AsyncIterator["Local"]:
        settings = load_settings(given_settings(arguments), os.environ, arguments.config)
        with console.status("Loading the model …") as status:
            llm = await AsyncLLM.start(settings, on_progress=lambda what: status.update(f"{what} …"))
        try:
            yield cls(llm, llm.models[0].id)
        finally:
            await llm.close()

    async def answer(self, turn: Turn) -> AsyncIterator[str]:
        run = await self._llm.chat(
            ChatInput(turn.messages), model=self._model, sampling=turn.sampling, request_id=uuid.uuid4().hex
        )
        if run.receipts:
            turn.about_images = image_answer_json(run, self._llm.models[0])
        async with aclosing(run):
            async for delta in run:
                turn.finish_reason = delta.finish_reason
                yield delta.text


async def _request(client: httpx.AsyncClient, method: str, path: str) -> JsonObject:
    try:
        response = await client.request(method, path)
        if response.status_code != 200:
            raise _server_error(response.json())
    except (httpx.HTTPError, ValueError) as error:
        raise _unreachable(client, error) from None
    body: JsonObject = response.json()
    return body


def _server_error(body: JsonObject) -> VlmServeError:
    return InvalidRequestError(str(body["error"]["message"]))


def _unreachable(client: httpx.AsyncClient, error: Exception) -> ServiceError:
    return ServiceError(
        f"No answer from {client.base_url} ({type(error).__name__}). Is the server up? `vlm-serve serve` starts one."
    )


def _message_json(message: ChatMessage) -> JsonObject:
    return {"role": message.role, "content": [_part_json(part) for part in message.content]}


def _part_json(part: TextPart | ImagePart) -> JsonObject:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": "image_url", "image_url": {"url": data_url(part)}}


def chat(arguments: argparse.Namespace) -> int:
    return asyncio.run(_chat(arguments, Console(highlight=False)))


async def _chat(arguments: argparse.Namespace, console: Console) -> int:
    sampling = SamplingParams(max_tokens=arguments.max_tokens, temperature=arguments.temperature, seed=arguments.seed)
    images = [read_image(path) for path in arguments.image]
    start = (ChatMessage("system", (TextPart(arguments.system),)),) if arguments.system else ()
    async with _backend(arguments, console) as backend:
        if arguments.message is not None:
            await _ask(backend, start, arguments.message, images, sampling, console)
        else:
            await _converse(backend, start, images, sampling, console)
    return 0


def _backend(arguments: argparse.Namespace, console: Console) -> AbstractAsyncContextManager[Backend]:
    if arguments.url is not None:
        return Server.connect(arguments.url, given_settings(arguments).get("model.model"))
    return Local.load(arguments, console)


async def _ask(
    backend: Backend,
    history: tuple[ChatMessage, ...],
    text: str,
    images: list[ImagePart],
    sampling: SamplingParams,
    console: Console,
) -> tuple[ChatMessage, ...]:
    """Prints the answer as it comes, then what belongs to it; returns the conversation with it."""
    messages = (*history, ChatMessage("user", (*images, TextPart(text))))
    turn = Turn(messages, sampling)
    answer = []
    async for piece in backend.answer(turn):
        answer.append(piece)
        print(piece, end="", flush=True)
    print()
    if turn.finish_reason == "length":
        console.print(f"(cut at {sampling.max_tokens} tokens; --max-tokens gives it more)", style="dim")
    if turn.about_images is not None:
        print_about_images(turn.about_images, console)
    return (*messages, ChatMessage("assistant", (TextPart("".join(answer)),)))


async def _converse(
    backend: Backend,
    history: tuple[ChatMessage, ...],
    images: list[ImagePart],
    sampling: SamplingParams,
    console: Console,
) -> None:
    console.print("/image FILE adds a file, /quit or Ctrl-D ends.", style="dim")
    while True:
        try:
            line = (await asyncio.to_thread(input, "> ")).strip()
        except EOFError:
            return
        if line == "/quit":
            return
        try:
            if line.startswith("/image "):
                images.append(read_image(Path(line.removeprefix("/image ").strip())))
            elif line:
                history = await _ask(backend, history, line, images, sampling, console)
                images = []
        except VlmServeError as error:  # one question fails, the conversation goes on
            print(f"vlm-serve: {error}", file=sys.stderr)
