"""The server around the routes: who may ask it, what its document says, and how it stops."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from api.app import create_app
from api.cli import main
from api.cli.files import honours_proxy
from api.request_log import STOPPING, RequestLog
from tests.api.conftest import Scripted, image_body, text_body
from tests.api.running import as_is, running
from tests.api.scripted import ScriptedLLM
from vlm_serve.config import ServerConfig


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:1", "[::1]:8000", "[::1]"])
def test_a_request_for_this_machine_is_answered(scripted: Scripted, host: str) -> None:
    assert scripted.http.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "[::2]", ""])
def test_a_page_that_points_its_own_name_here_is_refused(scripted: Scripted, host: str) -> None:
    response = scripted.http.post("/v1/chat/completions", json=text_body(), headers={"Host": host})
    assert response.status_code == 400
    assert "localhost alone" in response.json()["error"]["message"]
    assert not scripted.llm.asked


def test_a_server_for_others_answers_under_any_name() -> None:
    app = create_app(ScriptedLLM(), ServerConfig(host="0.0.0.0"))  # type: ignore[arg-type]
    with running(lambda: as_is(app)) as url:
        assert httpx.get(f"{url}/health", headers={"Host": "ai.hospital.example"}).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
def test_head_is_get_without_a_body(scripted: Scripted, path: str) -> None:
    response = scripted.http.head(path)
    assert (response.status_code, response.content) == (200, b"")


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_every_reference_of_the_openapi_document_resolves(scripted: Scripted) -> None:
    document = scripted.http.get("/openapi.json").json()
    found = set(references(document))
    assert "#/components/schemas/ChatCompletionRequest" in found
    for reference in found:
        node = document
        for name in reference.removeprefix("#/").split("/"):
            node = node[name]


def test_the_openapi_document_says_what_an_answer_has(scripted: Scripted) -> None:
    document = scripted.http.get("/openapi.json").json()
    responses = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    assert not any(
        "422" in operation["responses"] for path in document["paths"].values() for operation in path.values()
    )
    schemas = document["components"]["schemas"]
    whole = scripted.http.post("/v1/chat/completions", json=image_body(prompt_logprobs=1)).json()
    assert set(whole) == set(schemas["ChatCompletion"]["properties"])
    assert set(whole["choices"][0]) == set(schemas["ChatCompletion"]["properties"]["choices"]["items"]["properties"])
    assert set(whole["usage"]) == set(schemas["Usage"]["properties"])
    assert set(whole["x_vlm_serve"]) == set(schemas["AboutImages"]["properties"])
    stream = {"stream": True, "stream_options": {"include_usage": True}, "prompt_logprobs": 1}
    lines = scripted.http.post("/v1/chat/completions", json=image_body(**stream)).text.split("\n\n")
    first, second = (json.loads(line.removeprefix("data: ")) for line in lines[:2])
    assert set(first) | set(second) == set(schemas["ChatCompletionChunk"]["properties"])
    error = scripted.chat(top_k="x").json()
    assert set(error["error"]) == set(schemas["Error"]["properties"]["error"]["properties"])


@pytest.mark.parametrize(
    "fields",
    [{"max_tokens": 2**31 - 1}, {"top_k": -1}, {"top_k": 2**31 - 1}, {"seed": -(2**63)}, {"seed": 2**64 - 1}],
    ids=str,
)
def test_the_largest_numbers_of_each_field_are_taken(scripted: Scripted, fields: dict[str, int]) -> None:
    assert scripted.chat(**fields).status_code == 200


@pytest.mark.parametrize("asked", [True, False])
def test_each_chunk_names_the_usage_only_where_it_was_asked_for(scripted: Scripted, asked: bool) -> None:
    body = text_body(stream=True, stream_options={"include_usage": asked})
    lines = scripted.http.post("/v1/chat/completions", json=body).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    with_choices = [chunk for chunk in chunks if chunk["choices"]]
    assert all(("usage" in chunk) == asked for chunk in with_choices)
    assert all(chunk.get("usage") is None for chunk in with_choices)


def test_a_request_that_the_stop_cuts_off_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[dict[str, Any]] = []

    async def cut_off(scope: Any, receive: Any, send: Any) -> None:
        raise asyncio.CancelledError

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "headers": [], "path": "/"}
    asyncio.run(RequestLog(cut_off)(scope, None, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 503
    assert json.loads(sent[1]["body"])["error"]["message"] == STOPPING


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert main(["chat", "--url", scripted.url, "Hello?"]) == 0
    assert "Hello" in capsys.readouterr().out
    assert honours_proxy("http://ai.hospital.example:8000")
    assert not honours_proxy("http://[::1]:8000")


def test_more_answers_than_the_server_ever_takes_at_once_are_refused_with_the_bound(scripted: Scripted) -> None:
    most = scripted.llm.max_answers
    fitting = {"model": "base", "prompt": ["The chest"] * (most // 4), "n": 4, "max_tokens": 2}
    assert len(scripted.http.post("/v1/completions", json=fitting).json()["choices"]) == most
    scripted.llm.reset()
    one_more = fitting | {"prompt": [*fitting["prompt"], "shows"]}
    response = scripted.http.post("/v1/completions", json=one_more)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    assert f"takes {most}." in response.json()["error"]["message"]
    assert not scripted.llm.asked


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "top_k", "seed"])
@pytest.mark.parametrize("value", [10**30, 2**64, 2**63 - 1])
def test_a_number_that_no_array_holds_is_refused_by_name(scripted: Scripted, field: str, value: int) -> None:
    response = scripted.chat(**{field: value})
    if (field, value) == ("seed", 2**63 - 1):
        assert response.status_code == 200
        return
    assert response.status_code == 400
    named = "max_tokens" if field == "max_completion_tokens" else field
    assert response.json()["error"]["param"] in (field, named)
