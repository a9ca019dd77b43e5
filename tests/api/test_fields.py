"""Every field that changes an answer, over HTTP with the official client: a real tiny model in its engine process."""

import json
import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from tests.api.conftest import Served
from tests.api.test_served import asking, image_part, png

PROMPT = "Is there a mass in the left upper lobe?"
MESSAGES: Any = [{"role": "user", "content": PROMPT}]

SIDES: Any = {
    "type": "object",
    "properties": {"side": {"enum": ["left", "right"]}},
    "required": ["side"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "compare", "parameters": SIDES}},
    {"type": "function", "function": {"name": "measure", "parameters": SIDES}},
]


def chat(served: Served, *, stream: bool = False, **fields: Any) -> Any:
    """A greedy answer of up to eight tokens, unless the fields say otherwise; a stream put together."""
    body: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 0} | fields
    known = {name: body.pop(name) for name in list(body) if name not in EXTRA}
    if not stream:
        return served.client.chat.completions.create(**known, extra_body=body)
    return put_together(served.client.chat.completions.create(**known, extra_body=body, stream=True))


def put_together(chunks: Iterable[Any]) -> SimpleNamespace:
    """What a client makes of a stream: the choices of the whole answer."""
    choices: dict[int, SimpleNamespace] = {}
    for chunk in chunks:
        for part in chunk.choices:
            message = SimpleNamespace(content="", tool_calls=[])
            fresh = SimpleNamespace(message=message, logprobs=SimpleNamespace(content=[]), finish_reason=None)
            choice = choices.setdefault(part.index, fresh)
            choice.message.content += part.delta.content or ""
            choice.finish_reason = choice.finish_reason or part.finish_reason
            if part.logprobs:
                choice.logprobs.content += part.logprobs.content
            for call in part.delta.tool_calls or []:
                if call.function.name:
                    choice.message.tool_calls.append(SimpleNamespace(id=call.id, function=call.function))
                else:
                    choice.message.tool_calls[call.index].function.arguments += call.function.arguments
    return SimpleNamespace(choices=[choices[index] for index in sorted(choices)])


EXTRA = frozenset(
    "top_k min_p repetition_penalty min_tokens stop_token_ids bad_words allowed_token_ids prompt_logprobs "
    "ignore_eos truncate_prompt_tokens priority request_id structured_outputs guided_choice guided_regex "
    "guided_grammar guided_json include_stop_str_in_output skip_special_tokens add_generation_prompt "
    "continue_final_message chat_template_kwargs".split()
)
"""Fields that are not OpenAI's own."""

both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


def text(answer: Any, index: int = 0) -> str:
    return str(answer.choices[index].message.content)


def ids_of(served: Served, prompt: str) -> list[int]:
    body = {"model": "tiny", "prompt": prompt}
    return list(served.client.post("/../tokenize", body=body, cast_to=httpx.Response).json()["tokens"])


@both
def test_n_answers_share_a_prompt_and_each_is_the_one_of_its_seed(served: Served, stream: bool) -> None:
    fields: dict[str, Any] = {"temperature": 1.5, "ignore_eos": True}
    answer = chat(served, n=3, seed=5, stream=stream, **fields)
    alone = [text(chat(served, seed=5 + index, **fields)) for index in range(3)]
    assert [text(answer, index) for index in range(3)] == alone
    assert len(set(alone)) > 1


def test_usage_counts_the_tokens_of_all_answers(served: Served) -> None:
    answer = chat(served, n=3, ignore_eos=True)
    assert answer.usage.completion_tokens == 24


@both
def test_logprobs_say_each_token_with_its_bytes_and_the_likeliest(served: Served, stream: bool) -> None:
    answer = chat(served, logprobs=True, top_logprobs=3, ignore_eos=True, stream=stream, skip_special_tokens=False)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 8
    told = b"".join(bytes(entry.bytes) for entry in entries)
    assert told.decode("utf-8", "replace") == text(answer)
    for entry in entries:
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert entry.top_logprobs[0].logprob == entry.logprob
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1.0001


@both
def test_prompt_logprobs_have_an_entry_for_each_token_but_the_first(served: Served, stream: bool) -> None:
    if stream:
        parts = served.ask(MESSAGES, stream=True, extra_body={"prompt_logprobs": 2})
        (found,) = [part.model_extra["prompt_logprobs"] for part in parts if "prompt_logprobs" in part.model_extra]
    else:
        answer = chat(served, prompt_logprobs=2)
        found = answer.model_extra["prompt_logprobs"]
        assert len(found) == answer.usage.prompt_tokens
    assert found[0] is None
    for entry in found[1:]:
        assert len(entry) in (2, 3)
        assert {"logprob", "rank", "decoded_token"} == set(next(iter(entry.values())))


@both
def test_the_logprobs_of_an_image_request_are_sound_json(served: Served, stream: bool) -> None:
    """An entry for each of the image's placeholders, too."""
    messages = asking(image_part(png(), "image/png"))
    body = {"model": "tiny", "messages": messages, "prompt_logprobs": 1, "logprobs": True, "max_tokens": 2}
    body |= {"stream": stream, "temperature": 0}
    told = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60).text
    texts = [line.removeprefix("data: ") for line in told.split("\n\n") if "{" in line] if stream else [told]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    parts = [json.loads(text, parse_constant=refuse) for text in texts]
    (found,) = [part["prompt_logprobs"] for part in parts if "prompt_logprobs" in part]
    (usage,) = {part["usage"]["prompt_tokens"] for part in parts if part.get("usage")} or {len(found)}
    assert len(found) == usage
    entries = [entry for position in found[1:] for entry in position.values()]
    assert all(-9999 <= entry["logprob"] <= 0 and entry["rank"] >= 1 for entry in entries)
    placeholders = [
        position for position in found[1:] if "<image>" in {one["decoded_token"] for one in position.values()}
    ]
    assert len(placeholders) == 16


@both
def test_a_token_that_bias_forbids_does_not_come(served: Served, stream: bool) -> None:
    plain = chat(served, logprobs=True, ignore_eos=True)
    first = ids_of(served, plain.choices[0].logprobs.content[0].token)[-1]
    bent = chat(served, logprobs=True, ignore_eos=True, logit_bias={str(first): -100}, stream=stream)
    assert bent.choices[0].logprobs.content[0].token != plain.choices[0].logprobs.content[0].token


def test_only_allowed_tokens_come(served: Served) -> None:
    allowed = ids_of(served, "chest lungs")[1:]
    answer = chat(served, allowed_token_ids=allowed, temperature=1, seed=1, logprobs=True, ignore_eos=True)
    tokens = {ids_of(served, entry.token)[-1] for entry in answer.choices[0].logprobs.content}
    assert tokens <= set(allowed)


def test_a_bad_word_does_not_come(served: Served) -> None:
    (eight,), (nine,) = ids_of(served, "8")[1:], ids_of(served, "9")[1:]
    fields = {"allowed_token_ids": [eight, nine], "logit_bias": {str(nine): 100}, "ignore_eos": True}
    assert text(chat(served, **fields)) == "99999999"
    assert text(chat(served, **fields, bad_words=["9"])) == "88888888"
    assert text(chat(served, **fields, bad_words=["99"])) == "98989898"


@pytest.mark.parametrize(
    "fields",
    [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 2.0}],
    ids=lambda fields: next(iter(fields)),
)
def test_a_penalty_changes_what_repeats(served: Served, fields: dict[str, float]) -> None:
    few = {"allowed_token_ids": list(range(40, 60)), "ignore_eos": True, "max_tokens": 24}  # 20 for 24 places
    plain, bent = text(chat(served, **few)), text(chat(served, **few, **fields))
    assert plain != bent


def test_min_p_of_one_is_greedy(served: Served) -> None:
    same: dict[str, Any] = {"seed": 3, "ignore_eos": True}
    assert text(chat(served, temperature=1.5, min_p=1.0, **same)) == text(chat(served, **same))
    assert text(chat(served, temperature=1.5, top_k=1, **same)) == text(chat(served, **same))
    assert text(chat(served, temperature=1.5, top_p=1e-9, **same)) == text(chat(served, **same))


def test_either_name_limits_an_answer(served: Served) -> None:
    for limit in ("max_tokens", "max_completion_tokens"):
        answer = served.client.chat.completions.create(
            model="tiny", messages=MESSAGES, extra_body={limit: 5, "ignore_eos": True}
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5


@both
def test_a_stop_token_ends_an_answer_after_min_tokens_and_is_told(served: Served, stream: bool) -> None:
    (stop,) = ids_of(served, "9")[1:]
    fields: dict[str, Any] = {"allowed_token_ids": [stop], "stop_token_ids": [stop]}
    if stream:
        body = {"max_tokens": 8, "extra_body": fields}
        last = next(part for part in served.ask(MESSAGES, stream=True, **body) if part.choices[0].finish_reason)
        assert (last.choices[0].finish_reason, last.choices[0].model_extra["stop_reason"]) == ("stop", stop)
        return
    answer = chat(served, **fields)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", 1)
    assert answer.choices[0].model_extra["stop_reason"] == stop


def test_a_stop_string_is_kept_only_where_it_is_asked_for(served: Served) -> None:
    nine = {"allowed_token_ids": ids_of(served, "9")[1:], "stop": "999", "ignore_eos": True}
    answer = chat(served, **nine)
    assert (text(answer), answer.choices[0].finish_reason) == ("", "stop")
    assert answer.choices[0].model_extra["stop_reason"] == "999"
    assert answer.usage.completion_tokens == 3
    assert text(chat(served, **nine, include_stop_str_in_output=True)) == "999"


def test_min_tokens_puts_the_end_off(served: Served) -> None:
    bias = {"2": 100}  # the end of a sequence
    assert chat(served, logit_bias=bias).usage.completion_tokens == 1
    assert chat(served, logit_bias=bias, min_tokens=4).usage.completion_tokens == 5


def test_truncation_keeps_the_last_tokens(served: Served) -> None:
    assert chat(served, truncate_prompt_tokens=5).usage.prompt_tokens == 5


class Finding(pydantic.BaseModel):
    side: Literal["left", "right"]
    present: bool


def test_a_pydantic_model_of_the_official_client_is_filled(served: Served) -> None:
    answer = served.client.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Finding, max_tokens=512, temperature=0
    )
    parsed = answer.choices[0].message.parsed
    assert isinstance(parsed, Finding)
    with served.client.chat.completions.stream(
        model="tiny", messages=MESSAGES, response_format=Finding, max_tokens=512, temperature=0
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed


@both
@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "side", "schema": SIDES}}},
        {"structured_outputs": {"json": SIDES}},
        {"structured_outputs": {"json": json.dumps(SIDES)}},
    ],
    ids=["response_format", "structured_outputs", "a schema as text"],
)
def test_an_answer_follows_its_schema(served: Served, fields: dict[str, Any], stream: bool) -> None:
    assert json.loads(text(chat(served, **fields, max_tokens=512, stream=stream)))["side"] in ("left", "right")


@pytest.mark.parametrize(
    ("fields", "good"),
    [
        ({"structured_outputs": {"choice": ["mass", "no mass"]}}, {"mass", "no mass"}),
        ({"structured_outputs": {"regex": "(ab){2}"}}, {"abab"}),
        ({"structured_outputs": {"grammar": 'start: "left" | "right"'}}, {"left", "right"}),
        ({"guided_choice": ["mass", "no mass"]}, {"mass", "no mass"}),
        ({"guided_regex": "(ab){2}"}, {"abab"}),
        ({"guided_grammar": 'start: "left" | "right"'}, {"left", "right"}),
        ({"guided_json": {"const": 7}}, {"7"}),
    ],
    ids=["choice", "regex", "grammar", "guided_choice", "guided_regex", "guided_grammar", "guided_json"],
)
def test_an_answer_follows_its_structure(served: Served, fields: dict[str, Any], good: set[str]) -> None:
    assert text(chat(served, **fields, max_tokens=32)) in good


@pytest.mark.parametrize(
    "fields", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}], ids=str
)
def test_json_object_gives_an_object(served: Served, fields: dict[str, Any]) -> None:
    assert text(chat(served, **fields, max_tokens=8)).lstrip().startswith("{")


DOUBLING = "start: t40\n" + "".join(f"t{i}: t{i - 1} t{i - 1}\n" for i in range(1, 41)) + 't0: "a"'
"""Every letter doubles what is still possible: it fails on the way."""

BAD_STRUCTURES: list[dict[str, Any]] = [
    {"structured_outputs": {"json": {"type": "no such type"}}},
    {"structured_outputs": {"json": r'{"enum": ["\ud800"]}'}},
    {"structured_outputs": {"regex": "("}},
    {"structured_outputs": {"regex": r"[^\s\S]"}},
    {"structured_outputs": {"choice": ["yes", "no"]}, "allowed_token_ids": [70]},
    {"structured_outputs": {"grammar": "start: nothing"}},
    {"structured_outputs": {"grammar": DOUBLING}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 7}}}},
    {"guided_json": {"type": "array", "uniqueItems": True}},
    {"guided_regex": "("},
    {"guided_choice": ["yes", ""]},
    {"guided_grammar": DOUBLING},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}]},
]


@both
@pytest.mark.parametrize("fields", BAD_STRUCTURES, ids=lambda fields: str(fields)[:60])
def test_a_structure_that_no_answer_can_have_is_a_400_that_names_its_field(
    served: Served, fields: dict[str, Any], stream: bool
) -> None:
    with pytest.raises(openai.APIError) as refusal:
        chat(served, **fields, stream=stream)
    assert (refusal.value.type, refusal.value.param) == ("invalid_request_error", next(iter(fields)))
    if not stream or "t40" not in str(fields):  # a stream has begun by then
        assert isinstance(refusal.value, openai.BadRequestError)


def test_a_responses_format_that_cannot_be_used_is_named(served: Served) -> None:
    bad: Any = {"format": {"type": "json_schema", "name": "x", "schema": {"type": 7}}}
    with pytest.raises(openai.BadRequestError) as refusal:
        served.client.responses.create(model="tiny", input=PROMPT, text=bad)
    assert refusal.value.param == "text.format"


def test_an_object_of_a_thousand_properties_is_answered(served: Served) -> None:
    properties = {f"p{number}": {"type": "string"} for number in range(1000)}
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    brace, quote = (ids_of(served, letter)[-1] for letter in '{"')
    wishes = {"logit_bias": {str(brace): 50, str(quote): 100}}
    answer = chat(served, structured_outputs={"json": schema}, max_tokens=16, **wishes)
    assert text(answer).startswith('{"p')


@both
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "measure"}}], ids=str)
def test_a_required_call_is_one_of_a_function_with_arguments_of_its_schema(
    served: Served, choice: Any, stream: bool
) -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 512, "parallel_tool_calls": False}
    (one,) = chat(served, stream=stream, **fields).choices
    (call,) = one.message.tool_calls
    assert call.function.name in (["measure"] if isinstance(choice, dict) else ["compare", "measure"])
    assert json.loads(call.function.arguments)["side"] in ("left", "right")
    assert one.finish_reason == ("stop" if isinstance(choice, dict) else "tool_calls")
    assert not one.message.content


@both
def test_auto_leaves_the_model_free(served: Served, stream: bool) -> None:
    text_alone: dict[str, Any] = {"allowed_token_ids": ids_of(served, "9")[1:], "ignore_eos": True}
    (one,) = chat(served, tools=TOOLS, tool_choice="auto", stream=stream, **text_alone).choices
    assert (one.message.content, one.message.tool_calls or []) == ("99999999", [])
    with pytest.raises(openai.BadRequestError) as refusal:
        chat(served, tools=TOOLS, tool_choice="required", stream=stream, **text_alone)
    assert refusal.value.param == "tools"


def test_a_call_and_its_result_are_shown_to_the_model(served: Served) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "measure", "arguments": '{"side": "left"}'}}
    asked = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]
    result = [*asked, {"role": "tool", "tool_call_id": "call_1", "content": "12 mm"}]
    first, second, third = (chat(served, messages=messages, tools=TOOLS) for messages in (MESSAGES, asked, result))
    assert first.usage.prompt_tokens < second.usage.prompt_tokens < third.usage.prompt_tokens


def test_a_final_message_is_continued(served: Served) -> None:
    def tokens(**fields: Any) -> list[int]:
        body = {"model": "tiny", "messages": [*MESSAGES, {"role": "assistant", "content": "No "}]} | fields
        return list(served.client.post("/../tokenize", body=body, cast_to=httpx.Response).json()["tokens"])

    open_ended = tokens(continue_final_message=True, add_generation_prompt=False)
    without_cue = tokens(add_generation_prompt=False)
    assert len(open_ended) < len(without_cue) < len(tokens())
    messages = [*MESSAGES, {"role": "assistant", "content": "No "}]
    answer = chat(served, messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert answer.usage.prompt_tokens == len(open_ended)


def test_a_variable_of_the_template_arrives(served: Served) -> None:
    plain = chat(served).usage.prompt_tokens
    assert chat(served, chat_template_kwargs={"note": "Compare with the study."}).usage.prompt_tokens > plain


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"note": "<image>"}}, "chat_template_kwargs"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": "<|turn|>"}}]}, "tools"),
    ],
    ids=["messages", "a template", "a placeholder", "a control token in a tool"],
)
def test_rows_22_and_23_a_variable_of_the_template_can_neither_replace_nor_forge(
    served: Served, fields: dict[str, Any], param: str
) -> None:
    """Rows 22 and 23 of engines.md."""
    with pytest.raises(openai.BadRequestError) as refusal:
        chat(served, **fields)
    assert refusal.value.param == param


def test_a_request_id_of_the_body_comes_back(served: Served) -> None:
    raw = served.client.chat.completions.with_raw_response.create(
        model="tiny", messages=MESSAGES, max_tokens=1, extra_body={"request_id": "order-2026-11", "priority": "stat"}
    )
    assert raw.headers["X-Request-Id"] == "order-2026-11"
