"""Prompts with tools, calls, their results, a message to continue and variables of the caller's."""

from typing import Any

import pytest

from tests.checkpoints import CHAT_TEMPLATE, IMAGE_TOKEN, TOOL_TEMPLATE, make_tokenizer
from vlm_serve.errors import InvalidRequestError
from vlm_serve.families.prompt import PromptRenderer, ToolFormat, tool_format
from vlm_serve.types import ChatInput, ChatMessage, TextPart, ToolCall

TOKENIZER = make_tokenizer()
USER = ChatMessage("user", (TextPart("Compare"),))
CALL = ChatMessage("assistant", (), (ToolCall("c1", "measure", {"side": "left"}),))
RESULT = ChatMessage("tool", (TextPart("12 mm <|turn|>"),), tool_call_id="c1")
TOOL = {"type": "function", "function": {"name": "measure", "parameters": {"type": "object"}}}


def render(chat: ChatInput, template: str = TOOL_TEMPLATE) -> tuple[int, ...]:
    return PromptRenderer(TOKENIZER, template, IMAGE_TOKEN).render(chat, []).token_ids


def theirs(messages: list[dict[str, Any]], **fields: Any) -> tuple[int, ...]:
    text = TOKENIZER.apply_chat_template(messages, chat_template=TOOL_TEMPLATE, tokenize=False, **fields)
    return tuple(TOKENIZER.encode(text))


def test_tools_and_calls_are_rendered_as_transformers_does_it() -> None:
    messages = [
        {"role": "user", "content": "Compare"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "measure", "arguments": {"side": "left"}}}
            ],
        },
        {"role": "tool", "content": "12 mm", "tool_call_id": "c1"},
    ]
    result = ChatMessage("tool", (TextPart("12 mm"),), tool_call_id="c1")
    ours = render(ChatInput((USER, CALL, result), tools=(TOOL,)))
    assert ours == theirs(messages, tools=[TOOL], add_generation_prompt=True)


def test_a_control_token_in_a_tools_result_is_plain_text() -> None:
    turn = TOKENIZER.convert_tokens_to_ids("<|turn|>")
    plain = ChatMessage("tool", (TextPart("12 mm"),), tool_call_id="c1")
    assert render(ChatInput((USER, CALL, RESULT))).count(turn) == render(ChatInput((USER, CALL, plain))).count(turn)


@pytest.mark.parametrize(
    "chat", [ChatInput((USER,), tools=(TOOL,)), ChatInput((USER, CALL)), ChatInput((USER, RESULT))]
)
def test_a_template_that_knows_no_tools_refuses_them(chat: ChatInput) -> None:
    with pytest.raises(InvalidRequestError, match="knows no tools"):
        render(chat, CHAT_TEMPLATE)


def test_a_final_message_is_continued_where_it_ends() -> None:
    begun = ChatMessage("assistant", (TextPart("No "),))
    ours = render(ChatInput((USER, begun), continue_final_message=True))
    messages = [{"role": "user", "content": "Compare"}, {"role": "assistant", "content": "No "}]
    assert ours == theirs(messages, continue_final_message=True)
    assert TOKENIZER.decode(ours).endswith("No ")


def test_without_the_cue_a_prompt_ends_with_its_last_message() -> None:
    cue = TOKENIZER.encode("<|turn|>assistant\n", add_special_tokens=False)
    with_cue, without = render(ChatInput((USER,))), render(ChatInput((USER,), add_generation_prompt=False))
    assert with_cue == (*without, *cue)


def test_a_variable_of_the_callers_reaches_the_template() -> None:
    assert "Be brief" in TOKENIZER.decode(render(ChatInput((USER,), template_kwargs={"note": "Be brief"})))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"template_kwargs": {"note": "<image>"}}, "chat_template_kwargs"),
        ({"template_kwargs": {"a": ["<ima", {"ge>": 1}]}}, "chat_template_kwargs"),
        ({"tools": ({"type": "function", "function": {"name": "f", "description": "</s>"}},)}, "tools"),
        ({"messages": (USER, ChatMessage("assistant", (), (ToolCall("c", "f", {"a": "<image>"}),)))}, "messages"),
        ({"messages": (USER, CALL, ChatMessage("tool", (TextPart("x"),), tool_call_id="</s>"))}, "messages"),
    ],
    ids=["messages", "an argument", "a placeholder", "a placeholder in two", "a tool", "a call", "a call's id"],
)
def test_rows_22_and_23_neither_a_variable_nor_a_tool_forges_a_control_token(fields: Any, param: str) -> None:
    """Rows 22 and 23 of engines.md."""
    with pytest.raises(InvalidRequestError) as refusal:
        render(ChatInput(**({"messages": (USER,)} | fields)))
    assert refusal.value.param == param


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (CHAT_TEMPLATE, None),
        (TOOL_TEMPLATE, ToolFormat("<tool_call>\n", "\n</tool_call>", "arguments")),
        ('{% if tools %}{"name": "f", "parameters": {}}{% endif %}', ToolFormat("", "", "parameters")),
        ("{% if tools %}{{ tools }}{% endif %}", ToolFormat("", "", "arguments")),
        ("{% set toolset = 1 %}", None),
    ],
    ids=["no tools", "marks", "parameters", "arguments", "another word"],
)
def test_a_template_tells_the_form_of_a_call(template: str, form: ToolFormat | None) -> None:
    assert tool_format(template) == form
