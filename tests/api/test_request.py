"""What a request may say: what is accepted, what is refused, and that a refusal names the field, not the value."""

import json
from typing import Any

import httpx
import pytest

from tests.api.conftest import MAX_BODY, Scripted, image_body, text_body
from tests.api.running import connect, read_until
from vlm_serve.types import ChatMessage, ImagePart, TextPart

SECRET = "DOE^JANE"


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


REFUSED = {
    "no model": ({"model": None}, "model", "model"),
    "no messages": ({"messages": []}, "messages", "messages"),
    "messages of another kind": ({"messages": SECRET}, "messages", "messages"),
    "unknown field": ({"temprature": SECRET}, "'temprature'", "temprature"),
    "two unknown fields": ({"a1": SECRET, "b2": 1}, "'a1', 'b2'", "a1"),
    "unknown role": ({"messages": [{"role": SECRET, "content": "x"}]}, "role", "messages[0].role"),
    "tool role": ({"messages": [{"role": "tool", "content": "x"}]}, "role", "messages[0].role"),
    "no content": ({"messages": [{"role": "user"}]}, "needs content", "messages[0].content"),
    "unknown part": ({"messages": user({"type": SECRET})}, "text, image_url, dicom", "messages[0].content[0]"),
    "part without type": ({"messages": user({"text": SECRET})}, "'type' is missing", "messages[0].content[0]"),
    "unknown field of a part": (
        {"messages": user({"type": "text", "text": "x", "texture": SECRET})},
        "messages[0].content[0].texture",
        "messages[0].content[0].texture",
    ),
    "url that is no text": ({"messages": user(picture(7))}, "image_url.url", "messages[0].content[0].image_url.url"),
    "remote image": (
        {"messages": user(picture(f"https://pacs.example/{SECRET}.png"))},
        "Remote images are not fetched. Send the file itself: data:",
        "messages[0].content[0].image_url.url",
    ),
    "file url": (
        {"messages": user(picture(f"file:///{SECRET}"))},
        "Remote images are not fetched",
        "messages[0].content[0].image_url.url",
    ),
    "data url without base64": (
        {"messages": user(picture(f"data:image/png,{SECRET}"))},
        "must read data:MEDIA-TYPE;base64,DATA",
        "messages[0].content[0].image_url.url",
    ),
    "media type that is not served": (
        {"messages": user(picture("data:image/svg+xml;base64,AAAA"))},
        "media type must be one of",
        "messages[0].content[0].image_url.url",
    ),
    "loose base64": (
        {"messages": user({"type": "dicom", "dicom": {"data": f"AAAA\n{SECRET}"}})},
        "not valid base64",
        "messages[0].content[0].dicom.data",
    ),
    "empty file": (
        {"messages": user({"type": "dicom", "dicom": {"data": ""}})},
        "The file is empty",
        "messages[0].content[0].dicom.data",
    ),
    "too many images": (
        {"messages": user(*[picture("data:image/png;base64,AAAA")] * 3)},
        "At most 2 images",
        "messages",
    ),
    "image from the assistant": (
        {"messages": [{"role": "assistant", "content": [picture("data:image/png;base64,AAAA")]}]},
        "message of the user",
        "messages[0].content[0]",
    ),
    "tool calls in a message": (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": SECRET}]}]},
        "'tool_calls' is not supported",
        "messages[0]",
    ),
    "temperature as text": ({"temperature": SECRET}, "temperature", "temperature"),
    "temperature too high": ({"temperature": 3}, "between 0 and 2", "temperature"),
    "max_tokens zero": ({"max_tokens": 0}, "greater than or equal to 1", "max_tokens"),
    "max_tokens as a fraction": ({"max_tokens": 1.5}, "max_tokens", "max_tokens"),
    "two limits": ({"max_tokens": 3, "max_completion_tokens": 4}, "Send one of them", "max_tokens"),
    "stop that is empty": ({"stop": [""]}, "stop string", "stop"),
    "stream options without stream": ({"stream_options": {"include_usage": True}}, "stream", "stream_options"),
    "several answers": ({"n": 2}, "'n'", "n"),
    "log probabilities": ({"logprobs": True}, "'logprobs'", "logprobs"),
    "tools": ({"tools": [{"type": "function", "function": {"name": SECRET}}]}, "'tools'", "tools"),
    "json output": ({"response_format": {"type": "json_object"}}, "'response_format'", "response_format"),
    "penalty": ({"presence_penalty": 0.5}, "'presence_penalty'", "presence_penalty"),
    "two that are not served": ({"n": 3, "min_p": 0.1}, "'n', 'min_p'", "n"),
}


@pytest.mark.parametrize(("changes", "message", "param"), REFUSED.values(), ids=REFUSED)
def test_a_bad_request_is_a_400_that_names_the_field_and_not_the_value(
    scripted: Scripted, changes: dict[str, Any], message: str, param: str
) -> None:
    response = scripted.chat(**changes)
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert SECRET not in response.text
    assert scripted.llm.asked == []


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{", 400),
        (b"", 400),
        (b"[]", 400),
        (b"[" * 90_000, 400),
        (b'{"model":' * 20_000, 400),
        (b'{"model": "base", "messages": NaN}', 400),
        (b'{"model": "base", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"model": "\xff"}', 400),
    ],
    ids=["cut", "empty", "a list", "a deep list", "a deep object", "NaN", "half a surrogate", "not UTF-8"],
)
def test_a_body_that_is_not_sound_json_is_a_400(scripted: Scripted, content: bytes, code: int) -> None:
    response = scripted.http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == code
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_body_of_a_type_that_a_web_page_may_send_unasked_is_refused(scripted: Scripted) -> None:
    response = scripted.http.post(
        "/v1/chat/completions", content=json.dumps(text_body()), headers={"Content-Type": "text/plain"}
    )
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]


def test_what_openai_knows_and_changes_nothing_is_accepted(scripted: Scripted) -> None:
    response = scripted.chat(
        user="u", metadata={"a": "b"}, store=False, n=1, logprobs=False, presence_penalty=0, frequency_penalty=0.0,
        tools=[], tool_choice="auto", response_format={"type": "text"}, logit_bias=None, seed=None, stop=None,
        temperature=None, top_p=None, stream=False, service_tier="auto",
    )  # fmt: skip
    assert response.status_code == 200


def test_defaults_are_openais(scripted: Scripted) -> None:
    scripted.chat()
    ((_, _, sampling),) = scripted.llm.asked
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (None, 1.0, 1.0)


def test_sampling_fields_arrive(scripted: Scripted) -> None:
    scripted.chat(
        max_completion_tokens=9, temperature=0.5, top_p=0.9, top_k=3, seed=4, stop=["a", "b"], ignore_eos=True
    )
    ((_, _, sampling),) = scripted.llm.asked
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (9, 0.5, 0.9, 3)
    assert (sampling.seed, sampling.stop, sampling.ignore_eos) == (4, ("a", "b"), True)


def test_parts_keep_their_order_and_bytes(scripted: Scripted) -> None:
    response = scripted.chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": []},
            {
                "role": "user",
                "content": [
                    picture("data:image/PNG;charset=binary;base64,aW1n"),
                    {"type": "text", "text": "and"},
                    {"type": "dicom", "dicom": {"data": "ZGNt"}},
                ],
            },
        ]
    )
    assert response.status_code == 200
    ((_, chat, _),) = scripted.llm.asked
    assert chat.messages == (
        ChatMessage("system", (TextPart("Be brief."),)),
        ChatMessage("assistant", ()),
        ChatMessage("user", (ImagePart(b"img", "image/png"), TextPart("and"), ImagePart(b"dcm", "application/dicom"))),
    )


def post_head(*headers: str) -> bytes:
    lines = ("POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers)
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def test_a_declared_length_past_the_limit_is_refused_before_the_body_comes(scripted: Scripted) -> None:
    with connect(scripted.url) as client:
        client.sendall(post_head(f"Content-Length: {MAX_BODY + 1}"))
        assert b"413 " in read_until(client, b"payload_too_large")


def test_a_body_without_a_length_is_refused_once_it_passes_the_limit(scripted: Scripted) -> None:
    with connect(scripted.url) as client:
        client.sendall(post_head("Transfer-Encoding: chunked"))
        chunk = b" " * (MAX_BODY // 2)
        for _ in range(3):  # no last chunk follows: the body never ends
            client.sendall(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        assert b"413 " in read_until(client, b"payload_too_large")
    assert scripted.llm.asked == []


def test_a_body_at_the_limit_is_served(scripted: Scripted) -> None:
    body = json.dumps(text_body()).encode()
    body += b" " * (MAX_BODY - len(body))
    headers = {"Content-Type": "application/json"}
    assert scripted.http.post("/v1/chat/completions", content=body, headers=headers).status_code == 200
    assert scripted.http.post("/v1/chat/completions", content=body + b" ", headers=headers).status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", f"/v1/{SECRET}", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("GET", f"/v1/models/{SECRET}", 404, "model_not_found"),
        ("GET", "/docs", 404, "not_found"),
    ],
)
def test_an_unknown_route_has_the_error_form_too(
    scripted: Scripted, method: str, path: str, status: int, code: str
) -> None:
    response = scripted.http.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert SECRET not in response.text


def test_an_unknown_model_is_a_404(scripted: Scripted) -> None:
    response = httpx.post(f"{scripted.url}/v1/chat/completions", json=image_body(model=SECRET))
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert SECRET not in response.text
