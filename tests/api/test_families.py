"""Each family that takes images, over HTTP: chats about one image and two, text alone, streamed and whole; typed
placeholders, odd pictures and lying processors are the client's to mend, never a fault of the server.

The engine's own loop runs on a thread here, behind its real channel: a process for each family would take a minute.
"""

import contextlib
import io
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from PIL import Image

from api.app import create_app
from tests.api.running import running
from tests.api.test_served import asking, image_part
from tests.checkpoints import make_llava
from tests.families.image_checkpoints import FAMILIES
from tests.families.text_checkpoints import make_text
from vlm_serve.clinical.image import ClinicalImage
from vlm_serve.config import EngineConfig, IngestConfig, ModelConfig, Settings
from vlm_serve.families.base import ModelFamily
from vlm_serve.serving import client, engine_process
from vlm_serve.serving.async_llm import AsyncLLM
from vlm_serve.serving.channel import Channel, ChannelClosedError
from vlm_serve.types import ImageInputs, ImagePieces

QUESTION = "Is there an effusion?"

TYPED = "<image> <|image_pad|> <image_soft_token> <start_of_image> <IMG_CONTEXT> <img> <row_1_col_1> <|vision_start|>"
"""What stands for an image in one family or another."""


class EngineThread:
    """The engine's loop on a thread, where `spawn` gives a process."""

    def __init__(self, module: str, sock: socket.socket) -> None:
        assert module == engine_process.__name__
        self._socket = sock.dup()  # the caller closes its own
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(ChannelClosedError):
            engine_process.serve(Channel(self._socket))
        self._socket.close()

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def wait(self) -> None:
        self._thread.join()


@dataclass(frozen=True)
class Server:
    """One family's model behind HTTP."""

    http: httpx.Client
    family: ModelFamily

    def ask(self, *parts: Any, text: str = QUESTION, **fields: Any) -> httpx.Response:
        """Greedily, for four tokens with their log-probabilities."""
        body = {"model": "tiny", "messages": asking(*parts, text=text), "max_tokens": 4, "temperature": 0}
        return self.http.post("/v1/chat/completions", json=body | {"ignore_eos": True, "logprobs": True} | fields)

    def answer(self, *parts: Any) -> tuple[Any, str, list[float]]:
        """The body of an answer, its text, and the log-probability of each token."""
        response = self.ask(*parts)
        assert response.status_code == 200, response.text
        body = response.json()
        (choice,) = body["choices"]
        return body, choice["message"]["content"], [token["logprob"] for token in choice["logprobs"]["content"]]

    def streamed(self, *parts: Any) -> tuple[str, list[float]]:
        """Text and log-probabilities of a streamed answer."""
        events = [line.removeprefix("data: ") for line in self.ask(*parts, stream=True).text.splitlines() if line]
        assert events.pop() == "[DONE]"
        choices = [json.loads(event)["choices"][0] for event in events]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        tokens = [token for choice in choices if choice.get("logprobs") for token in choice["logprobs"]["content"]]
        return text, [token["logprob"] for token in tokens]

    def tokens(self, *parts: Any, text: str = QUESTION) -> list[int]:
        response = self.http.post("/tokenize", json={"messages": asking(*parts, text=text)})
        assert response.status_code == 200, response.text
        return cast(list[int], response.json()["tokens"])

    @property
    def model(self) -> Any:
        """Its entry of `/v1/models`."""
        (only,) = self.http.get("/v1/models").json()["data"]
        return only


@contextlib.contextmanager
def server_of(folder: Path, max_model_len: int = 1024) -> Iterator[Server]:
    settings = Settings(
        model=ModelConfig(model=str(folder), dtype="float32", device="cpu"),
        engine=EngineConfig(max_model_len=max_model_len, kv_cache_memory=8 * 1024**2),
        ingest=IngestConfig(workers=1),
    )
    started: list[AsyncLLM] = []

    @contextlib.asynccontextmanager
    async def make_app() -> AsyncIterator[FastAPI]:
        llm = await AsyncLLM.start(settings)
        started.append(llm)
        try:
            yield create_app(llm, settings.server)
        finally:
            await llm.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "spawn", EngineThread)
        with running(make_app) as url, httpx.Client(base_url=url, timeout=60) as http:
            yield Server(http, started[0]._family)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For tiny tensors a second one costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=FAMILIES, ids=FAMILIES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        folder = FAMILIES[request.param](tmp_path_factory.mktemp("family"), patch)
        if folder.name != "tiny":
            folder = folder.rename(folder.with_name("tiny"))
        with server_of(folder) as server:
            yield server


def picture(columns: int, rows: int, seed: int = 0) -> dict[str, Any]:
    """A part with a PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return image_part(buffer.getvalue(), "image/png")


ONE, TWO = picture(40, 30, seed=1), picture(24, 50, seed=2)


def test_chats_about_no_image_one_and_two_are_answered_streamed_as_whole(server: Server) -> None:
    seen = []
    for parts in ((), (ONE,), (TWO,), (ONE, TWO)):
        body, text, logprobs = server.answer(*parts)
        assert body["usage"]["completion_tokens"] == len(logprobs) == 4
        shown = body.get("x_vlm_serve", {"images": []})["images"]
        assert [image["columns"] for image in shown] == [{id(ONE): 40, id(TWO): 24}[id(part)] for part in parts]
        assert len({image["digest"] for image in shown}) == len(parts)
        if len(parts) != 1 or parts == (ONE,):
            again, streamed = server.streamed(*parts)
            assert again == text
            assert streamed == pytest.approx(logprobs, abs=1e-4)
        seen.append(logprobs)
    assert np.abs(np.subtract(seen[1], seen[2])).max() > 1e-3, "another image changes nothing"


def test_placeholders_typed_as_text_are_text(server: Server) -> None:
    placeholder = server.family.image_token_id
    assert placeholder not in server.tokens(text=TYPED)
    clean, typed = (server.tokens(ONE, text=text) for text in (QUESTION, TYPED))
    assert typed.count(placeholder) == clean.count(placeholder) > 0
    special = set(server.family.tokenizer.all_special_ids) - {placeholder}
    assert [token for token in typed if token in special] == [token for token in clean if token in special]
    back = server.http.post("/detokenize", json={"tokens": server.tokens(text=TYPED)}).json()["prompt"]
    assert TYPED in back
    assert server.ask(ONE, text=TYPED).status_code == 200


def test_odd_pictures_are_answered_or_refused_with_a_remedy(server: Server) -> None:
    for size in ((1, 1), (1, 2000), (5000, 10), (10, 900)):
        response = server.ask(picture(*size), max_tokens=1)
        if response.status_code != 200:
            assert response.status_code == 422, response.text
            error = response.json()["error"]
            assert (error["param"], error["code"]) == ("messages[0].content[0]", "image_limit_exceeded")
            assert "Crop it" in error["message"]
            assert max(size) > 50 * min(size)


def test_the_entry_of_the_model_tells_its_image_tokens_and_limits(server: Server) -> None:
    model = server.model
    images = model["images"]
    assert (model["dtype"], model["max_model_len"]) == ("float32", 1024)
    assert model["max_tokens_per_image"] == images["max_tokens"] >= images["min_tokens"] > 0
    assert images["media_types"] == ["application/dicom", "image/png", "image/jpeg"]
    placeholder = server.family.image_token_id
    for size in ((1, 1), (28, 28), (60, 20), (700, 400), (300, 4), (4, 300)):
        response = server.http.post("/tokenize", json={"messages": asking(picture(*size))})
        if response.status_code == 200:
            assert images["min_tokens"] <= response.json()["tokens"].count(placeholder) <= images["max_tokens"]


def test_a_picture_that_the_processor_miscounts_is_the_request_of_its_sender_alone(tmp_path: Path) -> None:
    """One placeholder too few, and more than the model has for any image."""
    make_llava(tmp_path / "tiny")
    with server_of(tmp_path / "tiny") as server, pytest.MonkeyPatch.context() as patch:
        honest, expected = server.family.process_image, server.answer(ONE)[1:]

        def lying(image: ClinicalImage) -> ImagePieces:
            (inputs,) = honest(image)
            assert isinstance(inputs, ImageInputs)
            count = {33: 15, 35: 17}.get(image.pixels.shape[0], inputs.num_tokens)
            return (ImageInputs.create(inputs.tensors, inputs.grid, count),)

        patch.setattr(server.family, "process_image", lying)
        with ThreadPoolExecutor(3) as threads:
            asked = [threads.submit(server.ask, part) for part in (picture(9, 33), ONE, picture(9, 35))]
            few, good, many = (future.result() for future in asked)
        assert (few.status_code, good.status_code, many.status_code) == (400, 200, 400)
        assert "gives 16 tokens for an image, of which its processor counts 15" in few.json()["error"]["message"]
        assert "counts 17 tokens" in many.json()["error"]["message"]
        assert [body.json()["error"]["param"] for body in (few, many)] == ["messages", "messages[0].content[0]"]
        assert server.answer(ONE)[1:] == expected


def test_an_image_for_a_model_of_text_alone_is_refused_by_its_kind(tmp_path: Path) -> None:
    make_text(tmp_path / "tiny", "Llama 3")
    with server_of(tmp_path / "tiny", max_model_len=256) as server:
        response = server.ask(ONE)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == "messages[0].content[0]"
        assert "This model (llama) takes text alone" in error["message"]
        assert (server.model["images"], server.model["max_tokens_per_image"]) == (None, 0)
        assert server.answer()[1]
