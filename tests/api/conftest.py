import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from api.app import create_app
from tests.api.running import as_is, running
from tests.api.scripted import ScriptedLLM
from vlm_serve.config import ServerConfig

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


@pytest.fixture(scope="session")
def scripted_server() -> Iterator[tuple[ScriptedLLM, str]]:
    llm = ScriptedLLM()
    app = create_app(llm, ServerConfig(max_body_bytes=MAX_BODY, max_images=2))  # type: ignore[arg-type]
    with running(lambda: as_is(app)) as url:
        yield llm, url


@pytest.fixture
def scripted(scripted_server: tuple[ScriptedLLM, str]) -> Iterator[Scripted]:
    llm, url = scripted_server
    llm.reset()
    with httpx.Client(base_url=url, timeout=10) as http:
        yield Scripted(llm, url, http)
