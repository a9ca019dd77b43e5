"""The forms of an answer beyond a chat's plain one: several, log-probabilities, completions, embeddings, tokens."""

import base64
import json
import math
import struct
from typing import Any

import pytest

from tests.api.conftest import Scripted, streamed, text_body
from tests.api.running import connect
from tests.api.scripted import Script, delta
from vlm_serve.errors import ContextLengthError, EngineDeadError
from vlm_serve.types import FinishReason, TokenLogprobs

STOP = FinishReason.STOP
CHAT = "/v1/chat/completions"


def test_each_of_several_answers_streams_under_its_index(scripted: Scripted) -> None:
    scripted.llm.script = Script(
        [
            delta("a", 1, index=1),
            delta("b", 2, index=0),
            delta("c", 3, STOP, index=1),
            delta("d", 4, FinishReason.LENGTH, index=0),
        ]
    )
    *chunks, done = streamed(scripted, "/v1/chat/completions", text_body(n=2))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["delta"].get("role") for choice in choices[:2]] == ["assistant", "assistant"]
    texts = {0: "", 1: ""}
    for choice in choices:
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: "bd", 1: "ac"}
    ends = {choice["index"]: choice["finish_reason"] for choice in choices if choice["finish_reason"]}
    assert ends == {0: "length", 1: "stop"}
    assert done == "[DONE]"


def test_an_answer_missing_at_the_end_is_an_error(scripted: Scripted) -> None:
    scripted.llm.script = Script([delta("a", 1, STOP, index=1)])
    assert scripted.chat(n=2).status_code == 500


def logprobs(*tokens: tuple[int, float], rank: int = 1) -> TokenLogprobs:
    return TokenLogprobs(tuple(token for token, _ in tokens), tuple(value for _, value in tokens), rank)


EURO = (logprobs((7, -0.5), (7, -0.5), (9, -1.0)), logprobs((8, -math.inf), (9, -0.1), (7, -2.0), rank=300))


def test_logprobs_give_the_bytes_of_a_character_cut_in_two(scripted: Scripted) -> None:
    scripted.llm.script = Script([delta("€", 2, STOP, tokens=2, logprobs=EURO)])
    body = scripted.chat(logprobs=True, top_logprobs=1).json()
    first, second = body["choices"][0]["logprobs"]["content"]
    assert bytes(first["bytes"] + second["bytes"]).decode() == "€"
    assert first["token"] == "\ufffd"
    assert [top["logprob"] for top in first["top_logprobs"]] == [-0.5]
    assert second["logprob"] == -9999.0  # JSON knows no infinity
    assert second["top_logprobs"][0]["token"] == "j"


def test_logprobs_of_tokens_whose_text_is_held_back_are_streamed_all_the_same(scripted: Scripted) -> None:
    scripted.llm.script = Script([delta("", 1, logprobs=EURO[:1]), delta("€", 2, STOP, logprobs=EURO[1:])])
    *chunks, _ = streamed(scripted, "/v1/chat/completions", text_body(logprobs=True))
    told = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [entry["bytes"] for entry in told] == [[0xE2, 0x82], [0xAC]]


def test_prompt_logprobs_have_vllms_form(scripted: Scripted) -> None:
    found = (logprobs((1, -3.0), (2, -0.5), (3, -1.0), rank=9), logprobs((2, -0.5), (2, -0.5), (3, -1.0)))
    scripted.llm.script = Script(prompt_logprobs=found)
    expected = [
        None,
        {
            "1": {"logprob": -3.0, "rank": 9, "decoded_token": "b"},
            "2": {"logprob": -0.5, "rank": 1, "decoded_token": "c"},
            "3": {"logprob": -1.0, "rank": 2, "decoded_token": "d"},
        },
        {
            "2": {"logprob": -0.5, "rank": 1, "decoded_token": "c"},
            "3": {"logprob": -1.0, "rank": 2, "decoded_token": "d"},
        },
    ]
    assert scripted.chat(prompt_logprobs=2).json()["prompt_logprobs"] == expected
    body = {"model": "base", "prompt": "x", "prompt_logprobs": 2}
    assert scripted.http.post("/v1/completions", json=body).json()["choices"][0]["prompt_logprobs"] == expected


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_token_of_no_probability_has_openais_number_for_it(scripted: Scripted, stream: bool) -> None:
    """As an image's placeholder may be, which is no word of the model's."""
    scripted.llm.script = Script(prompt_logprobs=(logprobs((9, -math.inf), (2, -0.5), rank=301),) * 6)
    body: dict[str, Any] = {"model": "base", "prompt": "abcdefg", "echo": True, "logprobs": 1, "prompt_logprobs": 1}
    if stream:
        chat_part = next(
            part for part in streamed(scripted, CHAT, text_body(prompt_logprobs=1)) if "prompt_logprobs" in part
        )
        choice = streamed(scripted, "/v1/completions", body)[0]["choices"][0]
    else:
        chat_part = scripted.chat(prompt_logprobs=1).json()
        choice = complete(scripted, **body).json()["choices"][0]
    for found in (chat_part["prompt_logprobs"], choice["prompt_logprobs"]):
        assert found[1]["9"] == {"logprob": -9999.0, "rank": 301, "decoded_token": "j"}
    assert choice["logprobs"]["token_logprobs"][1] == choice["logprobs"]["top_logprobs"][1]["j"] == -9999.0


def test_the_stop_string_that_ended_an_answer_is_told(scripted: Scripted) -> None:
    scripted.llm.script = Script([delta("a", 1, STOP, stop_reason="END")])
    assert scripted.chat().json()["choices"][0]["stop_reason"] == "END"


def complete(scripted: Scripted, **fields: Any) -> Any:
    return scripted.http.post("/v1/completions", json={"model": "base", "prompt": "x"} | fields)


def test_a_completion_has_openais_older_form(scripted: Scripted) -> None:
    body = complete(scripted).json()
    assert (body["object"], body["id"][:5]) == ("text_completion", "cmpl-")
    assert body["choices"] == [
        {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert scripted.llm.asked[0].params.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("x", ["x"]),
        (["x", "y"], ["x", "y"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
    ids=["text", "texts", "ids", "lists of ids"],
)
def test_prompts_come_in_four_forms(scripted: Scripted, prompt: Any, asked: list[Any]) -> None:
    body = complete(scripted, prompt=prompt, n=2).json()
    assert [one.prompt for one in scripted.llm.asked] == asked
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(asked)))
    assert body["usage"]["prompt_tokens"] == 7 * len(asked)
    assert body["usage"]["completion_tokens"] == 4 * len(asked)
    *chunks, _ = streamed(scripted, "/v1/completions", {"model": "base", "prompt": prompt, "n": 2})
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == dict.fromkeys(range(2 * len(asked)), "Hello")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "y"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, None),
        ({"prompt": [-1]}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"messages": []}, "messages"),
    ],
    ids=str,
)
def test_what_a_completion_cannot_have_is_a_400(scripted: Scripted, fields: Any, param: str | None) -> None:
    response = complete(scripted, **fields)
    if param is None:
        assert response.status_code == 200  # the engine's tokenizer judges it
        return
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)


def test_an_echo_with_logprobs_begins_with_the_prompts_own(scripted: Scripted) -> None:
    prompt = tuple(logprobs((token, -0.25), (0, -0.125)) for token in range(1, 7))
    answer = (logprobs((3, -1.0), (4, -0.5)),)
    scripted.llm.script = Script([delta("d", 1, STOP, logprobs=answer)], prompt_logprobs=prompt)
    (choice,) = complete(scripted, prompt="abcdefg", echo=True, logprobs=1).json()["choices"]
    assert choice["text"] == "abcdefgd"
    shown = choice["logprobs"]
    assert "".join(shown["tokens"]) == "abcdefgd"
    assert shown["token_logprobs"] == [None, *[-0.25] * 6, -1.0]
    assert shown["text_offset"] == list(range(8))
    assert shown["top_logprobs"][0] is None
    assert shown["top_logprobs"][-1] == {"e": -0.5, "d": -1.0}
    assert scripted.llm.asked[0].params.prompt_logprobs == 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_offsets_count_the_characters_of_the_text_before_each_token(scripted: Scripted, stream: bool) -> None:
    """A euro sign is of two tokens here, and token 25 is a special one, which is no text."""
    tokens = [(25, "z"), (7, ""), (8, "€"), (3, "d"), (25, ""), (4, "e")]
    deltas: list[Any] = [delta("", 0, tokens=0)]
    for count, (token, text) in enumerate(tokens[1:], 1):
        deltas.append(delta(text, count, STOP if count == 5 else None, logprobs=(logprobs((token, -1.0)),)))
    prompt = tuple(logprobs((token, -0.25)) for token in range(1, 7))
    scripted.llm.script = Script(deltas, prompt_logprobs=prompt)
    body = {"model": "base", "prompt": "bcdefg", "echo": True, "logprobs": 0}
    shown: list[int] = []
    text = ""
    bodies = streamed(scripted, "/v1/completions", body)[:-1] if stream else [complete(scripted, **body).json()]
    for part in bodies:
        text += part["choices"][0]["text"]
        shown += part["choices"][0]["logprobs"]["text_offset"]
    assert text == "bcdefg€de"
    assert shown == [0, *range(6), 6, 6, 7, 8, 8]  # the prompt's first token is none of its text, as `<s>`


@pytest.mark.parametrize("prompt", ["xyzabcdefg", list(range(20, 30))], ids=["text", "ids"])
def test_an_echo_of_a_cut_prompt_is_of_the_tokens_that_were_kept(scripted: Scripted, prompt: Any) -> None:
    kept = tuple(logprobs((token, -0.25)) for token in range(1, 7))
    scripted.llm.script = Script([delta("d", 1, STOP, logprobs=(logprobs((3, -1.0)),))], prompt_logprobs=kept)
    asked = {"prompt": prompt, "echo": True, "logprobs": 0, "truncate_prompt_tokens": 7}
    (choice,) = complete(scripted, **asked).json()["choices"]
    assert choice["text"] == "".join(choice["logprobs"]["tokens"]) == "abcdefgd"
    assert choice["logprobs"]["text_offset"] == list(range(8))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_no_tokens_and_an_echo_give_the_prompt_alone(scripted: Scripted, stream: bool) -> None:
    kept = tuple(logprobs((token, -0.25)) for token in range(1, 7))
    scripted.llm.script = Script([delta("d", 1, STOP, logprobs=(logprobs((3, -1.0)),))], prompt_logprobs=kept)
    body: dict[str, Any] = {"model": "base", "prompt": "abcdefg", "echo": True, "logprobs": 0, "max_tokens": 0}
    if stream:
        *parts, usage = streamed(scripted, "/v1/completions", body | {"stream_options": {"include_usage": True}})[:-1]
        assert len(parts) == 1
        choice, used = parts[0]["choices"][0], usage["usage"]
    else:
        whole = complete(scripted, **body).json()
        choice, used = whole["choices"][0], whole["usage"]
    assert (choice["text"], choice["finish_reason"], used["completion_tokens"]) == ("abcdefg", "length", 0)
    assert choice["logprobs"]["token_logprobs"] == [None, *[-0.25] * 6]
    assert scripted.llm.asked[0].params.max_tokens == 1


def test_no_tokens_without_an_echo_are_a_400(scripted: Scripted) -> None:
    refused = complete(scripted, max_tokens=0)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")


@pytest.mark.parametrize(
    ("path", "fields", "engines", "named"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 9}, "max_tokens", None),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9}, "max_tokens", "max_tokens"),
        ("/v1/completions", {"prompt": "x"}, "messages", "prompt"),
        ("/v1/embeddings", {"input": "x"}, "messages", "input"),
        ("/v1/embeddings", {"input": "x"}, "prompt", "input"),
        ("/v1/responses", {"input": "x", "max_output_tokens": 9}, "max_tokens", "max_output_tokens"),
        ("/v1/responses", {"input": "x"}, "messages", "input"),
        ("/v1/responses", {"input": "x"}, "messages[0].content[2]", "input[0].content[2]"),
        ("/v1/responses", {"input": "x"}, "temperature", "temperature"),
    ],
)
def test_an_error_names_the_field_that_the_request_has(
    scripted: Scripted, path: str, fields: dict[str, Any], engines: str, named: str | None
) -> None:
    scripted.llm.script = Script(refuse=ContextLengthError("Too long.", param=engines))
    refused = scripted.http.post(path, json={"model": "base"} | fields)
    assert refused.json()["error"]["param"] == (named or next(name for name in fields if name != "messages"))


def test_the_texts_of_a_prompts_tokens_are_one_task_that_ends_with_its_client(scripted: Scripted) -> None:
    scripted.llm.hold_texts = True
    body = json.dumps({"prompt": "x", "return_token_strs": True}).encode()
    client = connect(scripted.url)
    head = "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    client.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
    assert scripted.llm.waiting.wait(10)
    client.close()
    assert scripted.llm.run_closed.wait(10)
    assert scripted.llm.texts_asked == [(1, 2, 3)]


def test_a_prompt_refused_ends_the_ones_before_it(scripted: Scripted) -> None:
    scripted.llm.script = Script(hold=True, deltas=[])
    scripted.llm.refuse_after = 2
    response = complete(scripted, prompt=["a", "b", "c"])
    assert response.status_code == 500
    assert len(scripted.llm.closed) == 2


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("is_admitted", [False, True], ids=["before admission", "after it"])
def test_a_client_that_leaves_ends_its_request(scripted: Scripted, path: str, stream: bool, is_admitted: bool) -> None:
    scripted.llm.script = Script([], hold=True) if is_admitted else Script(hold_admission=True)
    prompts = {"prompt": ["a", "b"]} if path == "/v1/completions" else {"input": "a"}
    body = json.dumps({"model": "base", "stream": stream} | prompts).encode()
    client = connect(scripted.url)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    client.sendall(head.encode() + b"\r\n\r\n" + body)
    assert scripted.llm.waiting.wait(10)
    assert not scripted.llm.run_closed.is_set()
    client.close()
    assert scripted.llm.run_closed.wait(10)


def embed(scripted: Scripted, **fields: Any) -> Any:
    return scripted.http.post("/v1/embeddings", json={"model": "base", "input": "ab"} | fields)


def test_embeddings_are_floats_or_the_same_in_base64(scripted: Scripted) -> None:
    body = embed(scripted, input=["a", "abc"]).json()
    assert [entry["index"] for entry in body["data"]] == [0, 1]
    assert body["data"][1]["embedding"] == pytest.approx([0.6, 3, -0.8])
    assert body["usage"] == {"prompt_tokens": 14, "total_tokens": 14}
    packed = embed(scripted, input=["a", "abc"], encoding_format="base64").json()["data"][1]["embedding"]
    assert struct.unpack("<3f", base64.b64decode(packed)) == pytest.approx((0.6, 3, -0.8))


def test_dimensions_may_only_say_what_there_is(scripted: Scripted) -> None:
    assert embed(scripted, dimensions=3).status_code == 200
    refused = embed(scripted, dimensions=2)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "dimensions")


def test_tokenize_and_detokenize_have_vllms_bodies(scripted: Scripted) -> None:
    expected = {"count": 3, "max_model_len": 512, "tokens": [1, 2, 3], "token_strs": None}
    assert scripted.http.post("/tokenize", json={"prompt": "x"}).json() == expected
    asked = {"model": "thorax", "messages": [{"role": "user", "content": "x"}], "return_token_strs": True}
    assert scripted.http.post("/tokenize", json=asked).json() == expected | {"token_strs": ["b", "c", "d"]}
    assert scripted.http.post("/detokenize", json={"tokens": [0, 1]}).json() == {"prompt": "ab"}
    for bad in ({}, {"prompt": "x", "messages": []}, {"prompt": "x", "add_special_tokens": False}):
        assert scripted.http.post("/tokenize", json=bad).status_code == 400


def test_ready_is_no_while_the_engine_is_being_started_again(scripted: Scripted) -> None:
    assert scripted.http.get("/ready").status_code == 200
    scripted.llm.is_ready = False
    scripted.llm.health = EngineDeadError("The engine is being started again.")
    for path in ("/ready", "/health"):
        response = scripted.http.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_unavailable")
