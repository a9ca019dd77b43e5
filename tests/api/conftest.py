import base64
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from fastapi import FastAPI
from peft import LoraConfig, get_peft_model

from api.app import create_app
from tests.api.running import as_is, running
from tests.api.scripted import ScriptedLLM
from tests.checkpoints import TOOL_TEMPLATE, make_llava
from vlm_serve.config import EngineConfig, IngestConfig, ModelConfig, ServerConfig, Settings
from vlm_serve.serving.async_llm import AsyncLLM

MAX_BODY = 200_000


@dataclass(frozen=True)
class Scripted:
    """A real server around the scripted model."""

    llm: ScriptedLLM
    url: str
    http: httpx.Client

    def chat(self, **body: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json=text_body(**body))


def text_body(**changes: Any) -> dict[str, Any]:
    return {"model": "base", "messages": [{"role": "user", "content": "Hello"}]} | changes


def image_body(url: str = "data:application/dicom;base64," + base64.b64encode(b"file").decode(), **changes: Any) -> Any:
    content = [{"type": "text", "text": "Look."}, {"type": "image_url", "image_url": {"url": url}}]
    return text_body(messages=[{"role": "user", "content": content}], **changes)


@contextmanager
def scripted_server_of(**config: Any) -> Iterator[tuple[ScriptedLLM, str]]:
    """A server of these settings around a scripted model, and its address."""
    llm = ScriptedLLM()
    app = create_app(llm, ServerConfig(**config))  # type: ignore[arg-type]
    with running(lambda: as_is(app)) as url:
        yield llm, url


@contextmanager
def fresh(server: tuple[ScriptedLLM, str]) -> Iterator[Scripted]:
    """The server with nothing left of the test before."""
    llm, url = server
    llm.reset()
    with httpx.Client(base_url=url, timeout=10) as http:
        yield Scripted(llm, url, http)


def streamed(scripted: Scripted, path: str, body: dict[str, Any]) -> list[Any]:
    """The data of each event, parsed but for `[DONE]`."""
    text = scripted.http.post(path, json=body | {"stream": True}).text
    events = [event.split("data: ", 1)[1] for event in text.split("\n\n") if event]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


@pytest.fixture(scope="session")
def scripted_server() -> Iterator[tuple[ScriptedLLM, str]]:
    with scripted_server_of(max_body_bytes=MAX_BODY, max_images=2) as server:
        yield server


@pytest.fixture
def scripted(scripted_server: tuple[ScriptedLLM, str]) -> Iterator[Scripted]:
    with fresh(scripted_server) as scripted:
        yield scripted


@dataclass(frozen=True)
class Served:
    """A real tiny model in its engine process, behind a real server, and the official client."""

    url: str
    folder: Path
    adapters: Path
    client: openai.OpenAI

    def ask(self, messages: Any, *, model: str = "tiny", max_tokens: int = 8, **fields: Any) -> Any:
        return self.client.chat.completions.create(
            model=model, messages=messages, max_tokens=max_tokens, temperature=0, **fields
        )


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny LLaVA checkpoint whose template knows tools, and a directory with one adapter for it, `thorax`."""
    folder, adapters = tmp_path_factory.mktemp("models") / "tiny", tmp_path_factory.mktemp("adapters")
    model = make_llava(folder, chat_template=TOOL_TEMPLATE)
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)")
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(adapters / "thorax")
    return folder, adapters


@pytest.fixture(scope="session")
def served(checkpoint: tuple[Path, Path]) -> Iterator[Served]:
    folder, adapters = checkpoint
    settings = Settings(
        model=ModelConfig(model=str(folder), adapters=adapters, dtype="float32", device="cpu"),
        engine=EngineConfig(max_model_len=1024, kv_cache_memory=4 * 1024**2),
        ingest=IngestConfig(workers=1),
    )

    @contextlib.asynccontextmanager
    async def make_app() -> AsyncIterator[FastAPI]:
        llm = await AsyncLLM.start(settings)
        try:
            yield create_app(llm, settings.server)
        finally:
            await llm.close()

    with running(make_app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield Served(url, folder, adapters, client)
