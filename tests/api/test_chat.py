"""An answer on its way out: its forms, its failures, and a client that leaves."""

import asyncio
import json
import logging
from typing import Any

import openai
import pytest

from api import errors as api_errors
from tests.api.conftest import Scripted, image_body, text_body
from tests.api.running import connect, read_until
from tests.api.scripted import ADAPTER, BASE, Script, delta
from vlm_serve import errors
from vlm_serve.types import FinishReason

NOTICE = "Draft for review by a qualified clinician. Not for diagnostic use."
CONTENT = "a prompt nobody may log"


def events(scripted: Scripted, body: dict[str, Any]) -> list[Any]:
    """The data of each server-sent event, parsed but for `[DONE]`."""
    with scripted.http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        found = "".join(response.iter_text()).split("\n\n")
    assert found.pop() == ""
    texts = [event.removeprefix("data: ") for event in found]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


def subclasses(kind: type[Exception]) -> list[type[Exception]]:
    return [kind, *(found for child in kind.__subclasses__() for found in subclasses(child))]


def test_a_whole_answer_has_openais_form(scripted: Scripted) -> None:
    body = scripted.chat().json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "base"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello", "refusal": None}
    assert (choice["index"], choice["finish_reason"]) == (0, "stop")
    assert body["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert "x_vlm_serve" not in body


def test_a_stream_is_the_same_answer_in_chunks(scripted: Scripted) -> None:
    scripted.llm.script = Script([delta("Hel", 1), delta("", 2), delta("lo", 4, FinishReason.LENGTH, tokens=2)])
    *chunks, done = events(scripted, text_body(stream_options={"include_usage": True}))
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    *answer, usage = chunks
    assert [chunk["choices"][0]["delta"] for chunk in answer] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in answer] == [None, None, "length"]
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 4)


def test_a_stream_without_include_usage_has_none(scripted: Scripted) -> None:
    assert all("usage" not in chunk for chunk in events(scripted, text_body())[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_to_an_image_carries_notices_receipts_and_digests_outside_its_content(
    scripted: Scripted, stream: bool
) -> None:
    if stream:
        chunks = events(scripted, image_body(model="thorax"))
        about = chunks[0]["x_vlm_serve"]
        assert not any("x_vlm_serve" in chunk for chunk in chunks[1:-1])
        content = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    else:
        body = scripted.http.post("/v1/chat/completions", json=image_body(model="thorax")).json()
        about, content = body["x_vlm_serve"], body["choices"][0]["message"]["content"]
    assert content == "Hello"
    assert about["notice"] == NOTICE
    assert about["model_notice"] == "The projector is untrained."
    assert about["model"] == {"id": "base", "digest": BASE.digest}
    assert about["adapter"] == {"id": "thorax", "digest": ADAPTER.digest}
    (image,) = about["images"]
    assert image["digest"] == "d" * 64
    assert image["file_sha256"] == "f" * 64
    assert image["window"] == {
        "source": "file window 1 of 2",
        "center": 40.0,
        "width": 400.0,
        "function": "LINEAR",
    }
    assert image["attributes"] == {"Modality": "CT"}


REQUEST_ERRORS = [
    kind
    for kind in subclasses(errors.InputError) + subclasses(errors.ServiceError)
    if kind.__module__ == errors.__name__
]


@pytest.mark.parametrize("kind", REQUEST_ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_of_the_tree_has_a_row_and_its_text_is_shown(scripted: Scripted, kind: type[Exception]) -> None:
    scripted.llm.script = Script(refuse=kind("What is wrong and what to do."))
    response = scripted.chat()
    assert kind in api_errors.TABLE
    assert response.json()["error"]["message"] == "What is wrong and what to do."
    is_the_callers = issubclass(kind, errors.InputError) or kind is errors.OverloadedError
    assert (400 <= response.status_code < 500) == is_the_callers


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        (errors.ContextLengthError, 400, "context_length_exceeded"),
        (errors.ModelNotFoundError, 404, "model_not_found"),
        (errors.MediaMismatchError, 400, "media_mismatch"),
        (errors.CorruptImageError, 422, "corrupt_image"),
        (errors.OverloadedError, 429, "overloaded"),
        (errors.EngineDeadError, 503, "engine_unavailable"),
        (errors.RequestFailedError, 500, "request_failed"),
    ],
)
def test_an_error_of_the_engine_becomes_its_status(
    scripted: Scripted, kind: type[Exception], status: int, code: str
) -> None:
    scripted.llm.script = Script(refuse=kind("Text."))
    response = scripted.chat(stream=True)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.headers["content-type"] == "application/json"


def test_a_full_queue_says_when_to_come_back(scripted: Scripted) -> None:
    """Row 17 of engines.md: 429 with Retry-After."""
    scripted.llm.script = Script(refuse=errors.OverloadedError("Full."))
    assert int(scripted.chat().headers["Retry-After"]) >= 1


def test_the_param_of_an_input_error_is_named(scripted: Scripted) -> None:
    scripted.llm.script = Script(refuse=errors.InvalidRequestError("Text.", param="messages[0].content[1]"))
    assert scripted.chat().json()["error"]["param"] == "messages[0].content[1]"


def test_an_unexpected_exception_is_a_500_that_tells_nothing(
    scripted: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    scripted.llm.script = Script(refuse=ValueError(CONTENT))
    response = scripted.chat()
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert CONTENT not in response.text
    assert CONTENT not in caplog.text
    assert "unexpected ValueError at" in caplog.text
    assert response.headers["X-Request-Id"] in caplog.text


@pytest.mark.parametrize(
    ("error", "code"),
    [(errors.RequestFailedError("It failed."), "request_failed"), (ValueError(CONTENT), "internal_error")],
    ids=["of the tree", "unexpected"],
)
def test_a_failure_midway_is_the_last_event_of_the_stream(
    scripted: Scripted, error: Exception, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    scripted.llm.script = Script([delta("Hel", 1), error])
    *_, text, last = events(scripted, text_body())
    assert text["choices"][0]["delta"] == {"content": "Hel"}
    assert last["error"]["code"] == code
    assert CONTENT not in json.dumps(last)
    assert CONTENT not in caplog.text
    assert scripted.llm.run_closed.wait(10)


@pytest.mark.parametrize("end", [[], [delta("", 1, FinishReason.ABORT)], [delta("", 1, FinishReason.ERROR)]])
def test_an_answer_that_the_server_breaks_off_is_an_error_and_never_a_finish_reason(
    scripted: Scripted, end: list[Any]
) -> None:
    scripted.llm.script = Script([delta("Hel", 1), *end])
    assert scripted.chat().json()["error"]["code"] == "request_failed"
    scripted.llm.script = Script([delta("Hel", 1), *end])
    assert events(scripted, text_body())[-1]["error"]["code"] == "request_failed"


def test_a_run_is_closed_when_its_answer_is_complete(scripted: Scripted) -> None:
    scripted.chat()
    assert scripted.llm.run_closed.wait(10)
    scripted.llm.run_closed.clear()
    events(scripted, text_body())
    assert scripted.llm.run_closed.wait(10)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "script",
    [Script(hold_admission=True), Script([], hold=True), Script([delta("Hel", 1)], hold=True)],
    ids=["before admission", "before the first token", "after the first token"],
)
def test_a_client_that_leaves_ends_its_request(
    scripted: Scripted, stream: bool, script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    scripted.llm.script = script
    body = json.dumps(text_body(stream=stream)).encode()
    client = connect(scripted.url)
    client.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    if stream and script.deltas and not script.hold_admission:
        read_until(client, b"Hel")
    assert scripted.llm.waiting.wait(10)
    assert not scripted.llm.run_closed.is_set()
    client.close()
    assert scripted.llm.run_closed.wait(10)
    assert len(scripted.llm.closed) == (0 if script.hold_admission else 1)


def test_a_plain_request_id_is_kept_and_another_is_replaced(scripted: Scripted) -> None:
    def answered(request_id: str) -> str:
        headers = {"X-Request-Id": request_id}
        response = scripted.http.post("/v1/chat/completions", json=text_body(), headers=headers)
        return str(response.headers["X-Request-Id"])

    assert answered("order-2026_11") == "order-2026_11"
    for odd in ("short", "a b c d e f g h", "x" * 65, "../../etc/passwd"):
        assert answered(odd) not in (odd, "")


def test_two_requests_with_one_request_id_are_two_to_the_engine(scripted: Scripted) -> None:
    for _ in range(2):
        scripted.http.post("/v1/chat/completions", json=text_body(), headers={"X-Request-Id": "the-same-one"})
    assert len({asked.request_id for asked in scripted.llm.asked}) == 2


def test_the_log_has_one_line_for_a_request_and_nothing_of_its_content(
    scripted: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        body = text_body(model="thorax", messages=[{"role": "user", "content": CONTENT}])
        headers = {"X-Request-Id": "order-4711"}
        scripted.http.post(f"/v1/chat/completions?{CONTENT.replace(' ', '+')}", json=body, headers=headers)
        scripted.http.get(f"/{CONTENT.replace(' ', '-')}")
    (line,) = [record.getMessage() for record in caplog.records if "order-4711" in record.getMessage()]
    for fact in ("/v1/chat/completions", "status=200", "model=thorax", "prompt_tokens=7", "completion_tokens=2"):
        assert fact in line
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("vlm_serve", "uvicorn"))]
    assert not any(separator.join(CONTENT.split()) in text for text in ours for separator in " +-")


def test_metrics_have_vllms_names(scripted: Scripted) -> None:
    scripted.llm.script = Script([delta("a", 1), delta("bc", 3, FinishReason.STOP, tokens=2)])
    before = scripted.http.get("/metrics").text
    scripted.chat(model="thorax")
    after = scripted.http.get("/metrics").text

    def value(text: str, series: str) -> float:
        return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(series + " ")), 0.0)

    def grown(series: str) -> float:
        return value(after, series) - value(before, series)

    labels = '{adapter="thorax",model_name="base",tenant=""}'
    assert grown(f"vlm_serve:prompt_tokens_total{labels}") == 7
    assert grown(f"vlm_serve:generation_tokens_total{labels}") == 3
    success = 'vlm_serve:request_success_total{adapter="thorax",finished_reason="stop",model_name="base",tenant=""}'
    assert grown(success) == 1
    assert grown(f"vlm_serve:time_to_first_token_seconds_count{labels}") == 1
    assert grown(f"vlm_serve:inter_token_latency_seconds_count{labels}") == 2
    assert grown(f"vlm_serve:e2e_request_latency_seconds_count{labels}") == 1
    assert value(after, 'vlm_serve:num_requests_running{model_name="base"}') == 2
    assert value(after, 'vlm_serve:num_requests_waiting{model_name="base"}') == 1
    assert value(after, 'vlm_serve:kv_cache_usage_perc{model_name="base"}') == 0.25
    assert value(after, 'vlm_serve:prefix_cache_hits_total{model_name="base"}') == 60
    assert value(after, 'vlm_serve:mm_cache_queries_total{model_name="base"}') == 8
    assert value(after, 'vlm_serve:num_preemptions_total{model_name="base"}') == 1


def test_health_is_the_engines_own(scripted: Scripted) -> None:
    assert scripted.http.get("/health").status_code == 200
    scripted.llm.health = errors.EngineDeadError("The engine has stopped.")
    response = scripted.http.get("/health")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_unavailable")


def test_the_models_are_the_base_and_its_adapters(scripted: Scripted) -> None:
    base, adapter = scripted.http.get("/v1/models").json()["data"]
    assert (base["id"], base["parent"], base["max_model_len"], base["max_tokens_per_image"]) == ("base", None, 512, 16)
    assert (adapter["id"], adapter["parent"], adapter["root"]) == ("thorax", "base", "base")
    assert scripted.http.get("/v1/models/thorax").json() == adapter


def test_version_is_the_packages(scripted: Scripted) -> None:
    assert scripted.http.get("/version").json() == {"version": "0.1.0"}


def test_the_official_client_raises_its_own_errors(scripted: Scripted) -> None:
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0) as client:
        messages: Any = [{"role": "user", "content": "Hello"}]
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=messages)
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(model="base", messages=messages, temperature=9)
        scripted.llm.script = Script([delta("Hel", 1), errors.RequestFailedError("It failed.")])
        with pytest.raises(openai.APIError, match=r"It failed\."):
            list(client.chat.completions.create(model="base", messages=messages, stream=True))


def test_a_burst_of_the_official_async_clients_requests_is_answered(scripted: Scripted) -> None:
    async def burst() -> list[int]:
        async with openai.AsyncOpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0) as client:
            messages: Any = [{"role": "user", "content": "x" * 100_000}]
            calls = [client.chat.completions.create(model="base", messages=messages) for _ in range(8)]
            return [len(answer.choices) for answer in await asyncio.gather(*calls)]

    assert asyncio.run(burst()) == [1] * 8
