"""What a request may say: what is accepted, what is refused, and that a refusal names the field, not the value."""

import json
from typing import Any

import httpx
import pytest

from tests.api.conftest import MAX_BODY, Scripted, image_body, text_body
from tests.api.running import connect, read_until
from vlm_serve.types import ChatMessage, ImagePart, StructuredOutputs, TextPart

SECRET = "DOE^JANE"
DEEP: Any = json.loads('{"a":' * 99 + "1" + "}" * 99)


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
    "result of no call": ({"messages": [{"role": "tool", "content": "x"}]}, "'tool_call_id'", "messages[0]"),
    "no content": ({"messages": [{"role": "user"}]}, "needs content", "messages[0].content"),
    "unknown part": ({"messages": user({"type": SECRET})}, "text, image_url, dicom", "messages[0].content[0]"),
    "part without type": ({"messages": user({"text": SECRET})}, "'type' is missing", "messages[0].content[0]"),
    "unknown field of a part": (
        {"messages": user({"type": "text", "text": "x", "texture": SECRET})},
        "messages[0].content[0].texture",
        "messages[0].content[0].texture",
    ),
    "url that is no text": ({"messages": user(picture(7))}, "image_url.url", "messages[0].content[0].image_url.url"),
    "row 14: a remote image": (
        {"messages": user(picture(f"https://pacs.example/{SECRET}.png"))},
        "Remote images are not fetched. Send the file itself: data:",
        "messages[0].content[0].image_url.url",
    ),
    "row 14: a file's url": (
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
        {"messages": [{"role": "user", "content": "x", "tool_calls": [{"id": SECRET, "function": {"name": "f"}}]}]},
        "'tool_calls' belong to a message of the assistant",
        "messages[0]",
    ),
    "arguments that are no object": (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "7"}}]}]},
        "must be a JSON object",
        "messages[0].tool_calls[0].function.arguments",
    ),
    "temperature as text": ({"temperature": SECRET}, "temperature", "temperature"),
    "temperature too high": ({"temperature": 3}, "between 0 and 2", "temperature"),
    "max_tokens zero": ({"max_tokens": 0}, "greater than or equal to 1", "max_tokens"),
    "max_tokens as a fraction": ({"max_tokens": 1.5}, "max_tokens", "max_tokens"),
    "two limits": ({"max_tokens": 3, "max_completion_tokens": 4}, "Send one of them", "max_tokens"),
    "stop that is empty": ({"stop": [""]}, "stop must be", "stop"),
    "stream options without stream": ({"stream_options": {"include_usage": True}}, "stream", "stream_options"),
    "too many answers": ({"n": 65}, "between 1 and 64", "n"),
    "tops without logprobs": ({"top_logprobs": 3}, "'logprobs': true", "top_logprobs"),
    "too many tops": ({"logprobs": True, "top_logprobs": 21}, "less than or equal to 20", "top_logprobs"),
    "tools of a model that knows none": (
        {"tools": [{"type": "function", "function": {"name": "f", "description": SECRET}}]},
        "knows no tools",
        "tools",
    ),
    "a function's odd name": (
        {"tools": [{"type": "function", "function": {"name": f"{SECRET} x"}}]},
        "pattern",
        "tools[0].function.name",
    ),
    "two functions of one name": (
        {"tools": [{"type": "function", "function": {"name": "f"}}] * 2},
        "two functions of one name",
        "tools",
    ),
    "required without tools": ({"tool_choice": "required"}, "needs 'tools'", "tool_choice"),
    "a function that is not there": (
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        "'tools' does not have",
        "tool_choice",
    ),
    "schema without a schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "'schema'",
        "response_format",
    ),
    "two forms at once": (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "Say in one way",
        "structured_outputs",
    ),
    "two structures": ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "exactly one", "structured_outputs"),
    "no structure": ({"structured_outputs": {}}, "exactly one", "structured_outputs"),
    "penalty": ({"presence_penalty": 2.5}, "between -2 and 2", "presence_penalty"),
    "penalty of nothing": ({"repetition_penalty": 0}, "above 0", "repetition_penalty"),
    "min_p": ({"min_p": 1.5}, "between 0 and 1", "min_p"),
    "bias of no token": ({"logit_bias": {SECRET: 1}}, "token ids to numbers", "logit_bias"),
    "bias of no number": ({"logit_bias": {"1": SECRET}}, "token ids to numbers", "logit_bias"),
    "bias too high": ({"logit_bias": {"1": 101}}, "between -100 and 100", "logit_bias"),
    "no token allowed": ({"allowed_token_ids": []}, "between 1 and 1024", "allowed_token_ids"),
    "an empty bad word": ({"bad_words": [""]}, "characters", "bad_words"),
    "min_tokens past max_tokens": ({"min_tokens": 5, "max_tokens": 4}, "at most max_tokens", "min_tokens"),
    "a priority of no kind": ({"priority": SECRET}, "priority", "priority"),
    "an odd request id": ({"request_id": f"../{SECRET}"}, "pattern", "request_id"),
    "a cue and a continuation": (
        {"add_generation_prompt": True, "continue_final_message": True},
        "'add_generation_prompt': false",
        "continue_final_message",
    ),
    "row 23: variables nested without end": (
        {"chat_template_kwargs": {"a": json.loads("[" * 100 + "]" * 100)}},
        "32 levels",
        "chat_template_kwargs",
    ),
    "row 23: variables without end": (
        {"chat_template_kwargs": {"a": [SECRET] * 9000}},
        "too large",
        "chat_template_kwargs",
    ),
    "row 23: a schema nested without end": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": DEEP}}},
        "32 levels",
        "response_format.json_schema.schema",
    ),
    "a template of the caller's": ({"chat_template": SECRET}, "'chat_template'", "chat_template"),
    "what would change the answer": ({"audio": {"voice": SECRET}}, "would change the answer: 'audio'", "audio"),
    "two that are not served": ({"functions": [1], "best_of": 2}, "'best_of', 'functions'", "best_of"),
}


@pytest.mark.parametrize(("changes", "message", "param"), REFUSED.values(), ids=REFUSED)
def test_a_bad_request_is_a_400_that_names_the_field_and_not_the_value(
    scripted: Scripted, changes: dict[str, Any], message: str, param: str
) -> None:
    """Rows 14 (nothing is fetched) and 23 (sizes are bounded) of engines.md are among them."""
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
        temperature=None, top_p=None, stream=False, service_tier="auto", parallel_tool_calls=True, modalities=["text"],
        chat_template_kwargs={}, guided_json=None, audio=None, prediction=None, priority="routine",
    )  # fmt: skip
    assert response.status_code == 200


def test_defaults_are_openais(scripted: Scripted) -> None:
    scripted.chat()
    (asked,) = scripted.llm.asked
    sampling = asked.params
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (None, 1.0, 1.0)


def test_sampling_fields_arrive(scripted: Scripted) -> None:
    scripted.chat(
        max_completion_tokens=9, temperature=0.5, top_p=0.9, top_k=3, seed=4, stop=["a", "b"], ignore_eos=True
    )
    (asked,) = scripted.llm.asked
    sampling = asked.params
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (9, 0.5, 0.9, 3)
    assert (sampling.seed, sampling.stop, sampling.ignore_eos) == (4, ("a", "b"), True)


SAMPLING: dict[str, Any] = {
    "n": 3,
    "min_p": 0.25,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.5,
    "logit_bias": {"7": -100, "8": 2.5},
    "allowed_token_ids": (7, 8),
    "bad_words": ("left",),
    "min_tokens": 2,
    "stop_token_ids": (9,),
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "prompt_logprobs": 2,
    "truncate_prompt_tokens": 5,
}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("field", SAMPLING)
def test_each_field_of_sampling_arrives_under_its_own_name(scripted: Scripted, field: str, path: str) -> None:
    body = text_body() if "chat" in path else {"model": "base", "prompt": "Hello"}
    assert scripted.http.post(path, json=body | {field: SAMPLING[field]}).status_code == 200
    (asked,) = scripted.llm.asked
    expected = {7: -100, 8: 2.5} if field == "logit_bias" else SAMPLING[field]
    assert getattr(asked.params, field) == expected


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [({}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 4}, 4), ({"logprobs": False}, None)],
    ids=str,
)
def test_log_probabilities_are_asked_for_with_as_many_as_are_shown(
    scripted: Scripted, fields: dict[str, Any], logprobs: int | None
) -> None:
    scripted.chat(**fields)
    (asked,) = scripted.llm.asked
    assert asked.params.logprobs == logprobs


SCHEMA = {"type": "object"}


@pytest.mark.parametrize(
    ("fields", "structure"),
    [
        ({"response_format": {"type": "json_object"}}, StructuredOutputs(json_object=True)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"strict": True, "schema": SCHEMA}}},
            StructuredOutputs(json=SCHEMA),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, StructuredOutputs(json=SCHEMA)),
        ({"structured_outputs": {"json_object": True}}, StructuredOutputs(json_object=True)),
        ({"structured_outputs": {"regex": "a+"}}, StructuredOutputs(regex="a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutputs(choice=("a", "b"))),
        ({"structured_outputs": {"grammar": "start: A"}}, StructuredOutputs(grammar="start: A")),
        ({"guided_json": SCHEMA}, StructuredOutputs(json=SCHEMA)),
        ({"guided_regex": "a+"}, StructuredOutputs(regex="a+")),
        ({"guided_choice": ["a"]}, StructuredOutputs(choice=("a",))),
        ({"guided_grammar": "start: A"}, StructuredOutputs(grammar="start: A")),
    ],
    ids=str,
)
def test_each_way_to_say_a_structure_arrives(scripted: Scripted, fields: Any, structure: StructuredOutputs) -> None:
    assert scripted.chat(**fields).status_code == 200
    (asked,) = scripted.llm.asked
    assert asked.params.structured_outputs == structure


@pytest.mark.parametrize(("asked", "number"), [(None, 0), ("routine", 0), ("stat", -1), (-5, -5), (3, 3)])
def test_priorities_are_vllms_numbers(scripted: Scripted, asked: Any, number: int) -> None:
    scripted.chat(priority=asked)
    assert scripted.llm.asked[0].priority == number


def test_an_id_of_the_body_is_the_requests(scripted: Scripted) -> None:
    assert scripted.chat(request_id="order-2026-11").headers["X-Request-Id"] == "order-2026-11"


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
    (asked,) = scripted.llm.asked
    assert asked.prompt.messages == (
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


def test_a_giant_header_is_refused_while_it_comes(scripted: Scripted) -> None:
    """Row 23 of engines.md."""
    with connect(scripted.url) as client:
        client.sendall(post_head()[:-2] + b"X-Giant: " + b"a" * 2**17)  # and it does not end
        assert b"400 " in read_until(client, b"\r\n")
    assert scripted.chat().status_code == 200


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
