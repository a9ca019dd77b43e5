"""The endpoints beside chat over HTTP with the official client: a real tiny model in its engine process."""

from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.api.conftest import Served
from tests.api.test_fields import PROMPT, Finding, both, ids_of
from tests.api.test_served import data_url, png


@both
def test_completions_of_several_prompts_are_each_that_of_its_own(served: Served, stream: bool) -> None:
    def completed(prompt: Any, *, stream: bool = False, **fields: Any) -> dict[int, str]:
        found: dict[int, str] = {}
        made = served.client.completions.create(
            model="tiny", prompt=prompt, max_tokens=6, temperature=0, stream=stream, **fields
        )
        for part in made if stream else [made]:
            for choice in part.choices:
                found[choice.index] = found.get(choice.index, "") + choice.text
        return found

    prompts = ["The chest radiograph", "No effusion"]
    alone = [completed(prompt)[0] for prompt in prompts]
    assert completed(prompts, stream=stream) == dict(enumerate(alone))
    assert completed([ids_of(served, prompt) for prompt in prompts], stream=stream) == dict(enumerate(alone))
    assert completed(ids_of(served, prompts[0]), stream=stream) == {0: alone[0]}
    echoed = completed(prompts[1], stream=stream, echo=True)
    assert echoed == {0: prompts[1] + alone[1]}


@both
def test_completions_logprobs_cover_the_echoed_prompt(served: Served, stream: bool) -> None:
    made = served.client.completions.create(
        model="tiny", prompt="No effusion", max_tokens=3, temperature=0, echo=True, logprobs=2, stream=stream,
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )  # fmt: skip
    text, tokens, values, offsets, tops = "", [], [], [], []
    for part in made if stream else [made]:
        text += part.choices[0].text
        logprobs = part.choices[0].logprobs
        tokens += logprobs.tokens
        values += logprobs.token_logprobs
        offsets += logprobs.text_offset
        tops += logprobs.top_logprobs
    assert len(tokens) == len(ids_of(served, "No effusion")) + 3
    assert values[0] is None
    assert all(value <= 0 for value in values[1:])
    assert (tokens[0], offsets[0]) == ("<s>", 0)  # it is no text of the prompt's
    assert all(text.startswith(token.strip("\ufffd"), at) for token, at in zip(tokens[1:], offsets[1:], strict=True))
    assert "".join(tokens[1:-3]) == text[: offsets[-3]] == "No effusion"
    assert all(1 <= len(top) <= 3 for top in tops[1:])  # two tokens may be written alike


@both
def test_completions_take_the_fields_of_a_chat(served: Served, stream: bool) -> None:
    def completed(**fields: Any) -> tuple[list[str], Any]:
        """The text of each answer, and the usage."""
        asked: dict[str, Any] = {"model": "tiny", "prompt": "No effusion", "max_tokens": 6} | fields
        if not stream:
            whole = served.client.completions.create(**asked)
            return [choice.text for choice in whole.choices], whole.usage
        texts, usage = {}, None
        for part in served.client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
            usage = part.usage or usage
            for choice in part.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
        return [texts[index] for index in sorted(texts)], usage

    further: dict[str, Any] = {"ignore_eos": True, "priority": "stat", "request_id": "order-2026-12"}
    several, usage = completed(n=2, best_of=2, seed=5, temperature=1.5, extra_body=further)
    alone = [completed(seed=5 + index, temperature=1.5, extra_body=further)[0][0] for index in range(2)]
    assert several == alone
    assert usage.completion_tokens == 12
    nine = {"allowed_token_ids": ids_of(served, "9")[1:], "ignore_eos": True}
    assert completed(stop="999", extra_body=nine)[0] == [""]
    assert completed(extra_body={"guided_choice": ["mass"], "priority": 3})[0] == ["mass"]
    assert completed(extra_body={"response_format": {"type": "json_object"}})[0][0].lstrip().startswith("{")
    assert completed(extra_body={"truncate_prompt_tokens": 2})[1].prompt_tokens == 2


def test_embeddings_have_norm_one_in_both_formats(served: Served) -> None:
    inputs = ["No effusion", "The chest radiograph"]
    plain = served.client.embeddings.create(model="tiny", input=inputs, encoding_format="float")
    packed = served.client.embeddings.create(model="tiny", input=inputs)
    assert len(plain.data) == 2
    for one, other in zip(plain.data, packed.data, strict=True):
        np.testing.assert_allclose(np.linalg.norm(one.embedding), 1, atol=1e-5)
        np.testing.assert_allclose(one.embedding, other.embedding, atol=1e-6)
    as_ids = served.client.embeddings.create(model="tiny", input=ids_of(served, inputs[1]))
    np.testing.assert_allclose(as_ids.data[0].embedding, plain.data[1].embedding, atol=1e-5)
    size = len(plain.data[0].embedding)
    assert served.client.embeddings.create(model="tiny", input="x", dimensions=size).data
    with pytest.raises(openai.BadRequestError, match=str(size)):
        served.client.embeddings.create(model="tiny", input="x", dimensions=size + 1)


def test_a_response_streamed_is_the_whole_response(served: Served) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "input": PROMPT, "instructions": "Be brief.", "max_output_tokens": 6, "temperature": 0,
    }  # fmt: skip
    whole = served.client.responses.create(**asked)
    events = list(served.client.responses.create(**asked, stream=True))
    kinds, final = [event.type for event in events], events[-1].response
    assert final.output_text == whole.output_text
    assert final.usage.total_tokens == whole.usage.total_tokens
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{whole.status}",
    ]


def test_a_response_is_parsed_into_a_model(served: Served) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": PROMPT, "text_format": Finding, "temperature": 0}
    found = served.client.responses.parse(**asked)
    assert isinstance(found.output_parsed, Finding)
    with served.client.responses.stream(**asked) as stream:
        assert stream.get_final_response().output_parsed == found.output_parsed


@both
def test_a_response_takes_an_image_and_tells_its_logprobs(served: Served, stream: bool) -> None:
    part = {"type": "input_image", "image_url": data_url(png(), "image/png")}
    asked: dict[str, Any] = {
        "model": "tiny",
        "input": [{"role": "user", "content": [{"type": "input_text", "text": PROMPT}, part]}],
        "max_output_tokens": 4,
        "top_logprobs": 2,
        "include": ["message.output_text.logprobs"],
        "extra_body": {"ignore_eos": True, "priority": "stat"},
    }
    if stream:
        *_, last = served.client.responses.create(**asked, stream=True)
        response = last.response
    else:
        response = served.client.responses.create(**asked)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.model_extra["x_vlm_serve"]["images"][0]["media_type"] == "image/png"
    logprobs = response.output[0].content[0].logprobs
    assert [len(entry.top_logprobs) for entry in logprobs] == [2] * 4


def test_a_response_is_json_where_that_is_asked_for(served: Served) -> None:
    response = served.client.responses.create(
        model="tiny", input=PROMPT, text={"format": {"type": "json_object"}}, max_output_tokens=4
    )
    assert response.output_text.lstrip().startswith("{")


def test_tokens_there_and_back(served: Served) -> None:
    tokens = ids_of(served, PROMPT)
    body = {"model": "tiny", "tokens": tokens[1:]}
    assert served.client.post("/../detokenize", body=body, cast_to=httpx.Response).json() == {"prompt": PROMPT}
