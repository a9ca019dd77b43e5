"""Calls of tools: the grammar that makes them, and the parser that finds them however their text is cut."""

import json
from typing import Any

import llguidance.hf
import pytest

from api.schemas import ChatCompletionRequest
from api.tools import CallArguments, CallBegin, CallParser, ToolCalling, tool_calling
from tests.api.conftest import Scripted, text_body
from tests.api.scripted import HERMES, Script, delta
from tests.checkpoints import make_tokenizer
from vlm_serve.errors import InvalidRequestError
from vlm_serve.families.prompt import ToolFormat
from vlm_serve.types import FinishReason

BARE = ToolFormat("", "", "parameters")
SIDE = {"type": "object", "properties": {"side": {"enum": ["left", 'a "}" b']}}, "required": ["side"]}
TOOLS = [
    {"type": "function", "function": {"name": "compare", "parameters": SIDE | {"additionalProperties": False}}},
    {"type": "function", "function": {"name": "stop_all"}},
]
COMPARE = '<tool_call>\n{"name": "compare", "arguments": {"side": "left"}}\n</tool_call>'
STOP = '<tool_call>\n{"name": "stop_all", "arguments": {}}\n</tool_call>'


def calling(form: ToolFormat = HERMES, **fields: Any) -> ToolCalling:
    asked = ChatCompletionRequest.model_validate(text_body(tools=TOOLS) | fields)
    found = tool_calling(asked, form)
    assert found is not None
    return found


def accepts(asked: ToolCalling, answer: str) -> bool:
    """Whether the grammar leaves this answer, and lets it end there."""
    tokenizer = make_tokenizer()
    grammar = llguidance.LLMatcher.grammar_from_lark(asked.structured_outputs().grammar)
    matcher = llguidance.LLMatcher(llguidance.hf.from_tokenizer(tokenizer), grammar)
    assert not matcher.get_error()
    ids = tokenizer.encode(answer, add_special_tokens=False)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


NAMED = {"tool_choice": {"type": "function", "function": {"name": "compare"}}}


@pytest.mark.parametrize(
    ("fields", "answer", "good"),
    [
        ({}, "No effusion.", True),
        ({}, COMPARE, True),
        ({}, f"{COMPARE}\n{STOP}", True),
        ({"parallel_tool_calls": False}, f"{COMPARE}\n{STOP}", False),
        ({}, "See <tool_call> there", False),
        ({}, COMPARE.replace("left", "right"), False),
        ({}, COMPARE.replace("compare", "compere"), False),
        ({"tool_choice": "required"}, COMPARE, True),
        ({"tool_choice": "required"}, "No effusion.", False),
        (NAMED, COMPARE, True),
        (NAMED, STOP, False),
        (NAMED, f"{COMPARE}\n{COMPARE}", False),
    ],
)
def test_the_grammar_leaves_what_the_request_allows(fields: dict[str, Any], answer: str, good: bool) -> None:
    assert accepts(calling(**fields), answer) == good


def test_a_model_whose_calls_are_bare_objects_gives_one() -> None:
    assert accepts(calling(BARE), '{"name": "stop_all", "parameters": {}}')
    assert accepts(calling(BARE), "No effusion.")
    assert not accepts(calling(BARE), "{No effusion.")
    assert not accepts(calling(BARE, tool_choice="required"), "No effusion.")


def parsed(asked: ToolCalling, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls that the parser finds."""
    parser = CallParser(asked)
    text, calls = "", list[list[str]]()
    for place, piece in enumerate(pieces):
        for found in parser.add(piece, is_last=place == len(pieces) - 1):
            if isinstance(found, str):
                text += found
            elif isinstance(found, CallBegin):
                assert found.index == len(calls)
                calls.append([found.name, ""])
            else:
                assert isinstance(found, CallArguments)
                assert found.index == len(calls) - 1
                calls[-1][1] += found.text
    return text, [(name, arguments) for name, arguments in calls]


ODD = COMPARE.replace('"left"', json.dumps('a "}" b'))
ANSWERS = [
    (HERMES, "", "", []),
    (HERMES, "No effusion.", "No effusion.", []),
    (HERMES, "<tool", "<tool", []),
    (HERMES, COMPARE, "", [("compare", '{"side": "left"}')]),
    (HERMES, ODD, "", [("compare", '{"side": "a \\"}\\" b"}')]),
    (HERMES, f"{COMPARE}\n{STOP}", "", [("compare", '{"side": "left"}'), ("stop_all", "{}")]),
    (HERMES, COMPARE.partition("eft")[0], "", [("compare", '{"side": "l')]),
    (BARE, '{"name": "stop_all", "parameters": {"a": [{}, "]"]}}', "", [("stop_all", '{"a": [{}, "]"]}')]),
    (BARE, "No effusion.", "No effusion.", []),
]


@pytest.mark.parametrize(("form", "answer", "text", "calls"), ANSWERS, ids=range(len(ANSWERS)))
def test_calls_are_found_however_the_text_is_cut(
    form: ToolFormat, answer: str, text: str, calls: list[tuple[str, str]]
) -> None:
    asked = calling(form)
    assert parsed(asked, [answer]) == (text, calls)
    assert parsed(asked, [*answer, ""]) == (text, calls)
    for cut in range(len(answer)):
        assert parsed(asked, [answer[:cut], answer[cut:]]) == (text, calls)


def test_a_function_that_takes_no_object_is_refused() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]
    with pytest.raises(InvalidRequestError) as refusal:
        calling(tools=tools)
    assert refusal.value.param == "tools[0].function.parameters"


def test_tool_choice_none_asks_for_plain_text_of_any_model(scripted: Scripted) -> None:
    assert scripted.chat(tools=TOOLS, tool_choice="none").status_code == 200
    (asked,) = scripted.llm.asked
    assert asked.params.structured_outputs is None
    assert asked.prompt.tools == ()


def test_tools_reach_the_template_and_the_grammar(scripted: Scripted) -> None:
    scripted.llm.tool_format = HERMES
    assert scripted.chat(tools=TOOLS).status_code == 200
    (asked,) = scripted.llm.asked
    assert asked.params.structured_outputs == calling().structured_outputs()
    assert asked.prompt.tools == tuple(TOOLS)


@pytest.mark.parametrize(("end", "reason"), [(FinishReason.STOP, "tool_calls"), (FinishReason.LENGTH, "length")])
def test_a_whole_answer_has_its_calls(scripted: Scripted, end: FinishReason, reason: str) -> None:
    scripted.llm.tool_format = HERMES
    scripted.llm.script = Script([delta(COMPARE[:40], 1), delta(COMPARE[40:], 2, end)])
    (choice,) = scripted.chat(tools=TOOLS).json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "compare", "arguments": '{"side": "left"}'}
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, reason)
    assert call["id"].startswith("call_")


def test_calls_are_streamed_as_they_come(scripted: Scripted) -> None:
    scripted.llm.tool_format = HERMES
    answer = f"{COMPARE}\n{STOP}"
    pieces = [delta(letter, place) for place, letter in enumerate(answer, 1)]
    scripted.llm.script = Script([*pieces, delta("", len(answer) + 1, FinishReason.STOP)])
    lines = scripted.chat(tools=TOOLS, stream=True).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    calls: dict[int, dict[str, str]] = {}
    for chunk in chunks:
        for part in chunk["choices"][0]["delta"].get("tool_calls", []):
            call = calls.setdefault(part["index"], {"arguments": ""})
            call |= {key: part[key] for key in ("id", "type") if key in part}
            call |= {"name": part["function"]["name"]} if "name" in part["function"] else {}
            call["arguments"] += part["function"]["arguments"]
    assert [(call["name"], call["arguments"]) for call in calls.values()] == [
        ("compare", '{"side": "left"}'),
        ("stop_all", "{}"),
    ]
    assert len({call["id"] for call in calls.values()}) == 2
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "tool_calls"
    assert sum("tool_calls" in chunk["choices"][0]["delta"] for chunk in chunks) > 4
