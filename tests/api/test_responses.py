"""`/v1/responses`: OpenAI's newer form of an answer, whole and streamed."""

import base64
from typing import Any

import pytest

from tests.api.conftest import Scripted, image_body, streamed
from tests.api.scripted import Script, delta
from vlm_serve.errors import CorruptImageError, RequestFailedError
from vlm_serve.types import FinishReason

STOP = FinishReason.STOP
CHAT = "/v1/chat/completions"


def test_a_response_gives_its_metadata_back(scripted: Scripted) -> None:
    body = {"model": "base", "input": "x", "metadata": {"order": "2026-11"}}
    assert scripted.http.post("/v1/responses", json=body).json()["metadata"] == {"order": "2026-11"}
    for event in streamed(scripted, "/v1/responses", body):
        assert event.get("response", body)["metadata"] == {"order": "2026-11"}
    for bad in ({"a": 1}, {"a": "x" * 513}, {str(number): "" for number in range(17)}):
        assert scripted.http.post("/v1/responses", json=body | {"metadata": bad}).status_code == 400


def test_a_response_has_openais_newer_form(scripted: Scripted) -> None:
    body = scripted.http.post("/v1/responses", json={"model": "base", "input": "Hello", "instructions": "Hi."}).json()
    assert (body["object"], body["status"], body["error"], body["store"]) == ("response", "completed", None, False)
    (item,) = body["output"]
    assert item["content"] == [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}]
    assert body["usage"]["input_tokens_details"] == {"cached_tokens": 3}
    assert (body["usage"]["input_tokens"], body["usage"]["output_tokens"]) == (7, 2)
    messages = scripted.llm.asked[0].prompt.messages
    assert [(message.role, message.content[0].text) for message in messages] == [("system", "Hi."), ("user", "Hello")]


def response_input(**part: Any) -> dict[str, Any]:
    return {"model": "base", "input": [{"role": "user", "content": [part]}]}


DICOM = "data:application/dicom;base64," + base64.b64encode(b"file").decode()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_response_to_an_image_carries_its_receipts(scripted: Scripted, stream: bool) -> None:
    body = response_input(type="input_image", image_url=DICOM)
    if stream:
        events = streamed(scripted, "/v1/responses", body)
        about = [event["response"]["x_vlm_serve"] for event in events if "response" in event]
        assert about[0] == about[-1]
        shown = about[0]
    else:
        shown = scripted.http.post("/v1/responses", json=body).json()["x_vlm_serve"]
    assert shown["images"][0]["digest"] == "d" * 64
    assert shown == scripted.http.post("/v1/chat/completions", json=image_body()).json()["x_vlm_serve"]


def test_the_events_of_a_response_are_openais_in_order(scripted: Scripted) -> None:
    events = streamed(scripted, "/v1/responses", {"model": "base", "input": "Hello"})
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert "".join(event["delta"] for event in events if "delta" in event) == "Hello"
    raw = scripted.http.post("/v1/responses", json={"model": "base", "input": "Hello", "stream": True}).text
    assert raw.startswith("event: response.created\ndata: ")
    assert "[DONE]" not in raw


def test_a_response_cut_by_its_limit_is_incomplete(scripted: Scripted) -> None:
    scripted.llm.script = Script([delta("Hel", 1, FinishReason.LENGTH)])
    body = scripted.http.post("/v1/responses", json={"model": "base", "input": "x", "max_output_tokens": 1}).json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert scripted.llm.asked[0].params.max_tokens == 1


def test_a_response_that_fails_midway_ends_in_response_failed(scripted: Scripted) -> None:
    scripted.llm.script = Script([delta("Hel", 1), RequestFailedError("It failed.")])
    last = streamed(scripted, "/v1/responses", {"model": "base", "input": "x"})[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "request_failed", "message": "It failed."}


@pytest.mark.parametrize(
    "fields",
    [
        {"previous_response_id": "resp_1"},
        {"store": True},
        {"background": True},
        {"tools": [{"type": "web_search"}]},
        {"truncation": "auto"},
        {"conversation": "conv_1"},
        {"include": ["file_search_call.results"]},
        {"text": {"format": {"type": "json_schema", "name": "x"}}},
        {"input": []},
        {"input": [{"type": "item_reference", "id": "x"}]},
        {"n": 2},
    ],
    ids=str,
)
def test_what_a_response_would_need_a_memory_for_is_refused(scripted: Scripted, fields: dict[str, Any]) -> None:
    response = scripted.http.post("/v1/responses", json={"model": "base", "input": "x"} | fields)
    assert response.status_code == 400
    assert next(iter(fields)) in (response.json()["error"]["param"] or response.json()["error"]["message"])


def test_a_response_refuses_tools_by_name_and_says_where_they_are_served(scripted: Scripted) -> None:
    tools = [{"type": "function", "name": "f", "parameters": {}}]
    error = scripted.http.post("/v1/responses", json={"model": "base", "input": "x", "tools": tools}).json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "tools")
    assert error["message"] == "'tools' are not served here. Send functions to /v1/chat/completions."


def test_what_changes_nothing_in_a_response_is_accepted(scripted: Scripted) -> None:
    fields = {
        "store": False, "previous_response_id": None, "metadata": {"a": "b"}, "tools": [], "include": [],
        "truncation": "disabled", "service_tier": "auto", "parallel_tool_calls": True, "reasoning": None,
        "text": {"format": {"type": "text"}, "verbosity": "medium"}, "user": "u", "background": False,
    }  # fmt: skip
    assert scripted.http.post("/v1/responses", json={"model": "base", "input": "x"} | fields).status_code == 200


def test_an_error_about_an_image_of_a_response_names_its_place_in_the_input(scripted: Scripted) -> None:
    scripted.llm.script = Script(refuse=CorruptImageError("Cut.", param="messages[1].content[0]"))
    body = response_input(type="input_image", image_url=DICOM) | {"instructions": "Hi."}
    assert scripted.http.post("/v1/responses", json=body).json()["error"]["param"] == "input[0].content[0]"
