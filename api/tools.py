"""Calls of tools: the grammar that makes an answer one, and the parser that finds the calls in it as it streams.

The answer is in the form that the model's own chat template shows (`families/prompt.py`); the grammar leaves no
other. So the parser meets only what it knows, and the arguments hold what the function's schema wants.
"""

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from api.schemas.chat import ChatCompletionRequest, FunctionDefinition, NamedTool
from vlm_serve.errors import InvalidRequestError
from vlm_serve.families.prompt import ToolFormat
from vlm_serve.types import JsonObject, StructuredOutputs

MAX_CALLS = 16
"""In one answer."""

_NO_ARGUMENTS: JsonObject = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class ToolCalling:
    """What a request lets the model call.

    `is_free` lets it answer in text instead, `is_named` is for the one function that `tool_choice` names, and
    `is_parallel` allows several calls in an answer, where the model's format does.
    """

    format: ToolFormat
    functions: tuple[FunctionDefinition, ...]
    is_free: bool
    is_named: bool
    is_parallel: bool

    @property
    def head(self) -> str:
        """The beginning of every call, up to the function's name."""
        return self.format.begin + '{"name": "'

    @property
    def neck(self) -> str:
        """What stands between the name and the arguments."""
        return f'", "{self.format.arguments_key}": '

    @property
    def tail(self) -> str:
        return "}" + self.format.end

    def structured_outputs(self) -> StructuredOutputs:
        """The answer's grammar, in Lark's syntax with llguidance's `%json`."""
        several = self.is_parallel and not self.is_named and self.format.begin
        calls = f'call ("\\n" call){{0,{MAX_CALLS - 1}}}' if several else "call"
        rules = [f"start: TEXT? | {calls}" if self.is_free else f"start: {calls}"]
        if self.is_free:
            mark = self.format.begin.strip()
            rules.append(f"TEXT: /(?s:.+)/ & ~/(?s:.*){mark}(?s:.*)/" if mark else "TEXT: /[^{](?s:.*)/")
        rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(self.functions))))
        for number, function in enumerate(self.functions):
            opening = json.dumps(f"{self.head}{function.name}{self.neck}")
            rules.append(f"call_{number}: {opening} arguments_{number} {json.dumps(self.tail)}")
            rules.append(f"arguments_{number}: %json {json.dumps(function.parameters or _NO_ARGUMENTS)}")
        return StructuredOutputs(grammar="\n".join(rules) + "\n")


def tool_calling(asked: ChatCompletionRequest, form: ToolFormat | None) -> ToolCalling | None:
    """What the request lets the model call; None for no tools, or `tool_choice` none.

    Args:
        form: the model's, None if its template knows no tools.

    Raises:
        InvalidRequestError: this model knows no tools, a function takes no object, or the answer's form is given, too.
    """
    if not asked.tools or asked.tool_choice == "none":
        return None
    if form is None:
        raise InvalidRequestError("This model's chat template knows no tools. Leave 'tools' out.", param="tools")
    functions = tuple(tool.function for tool in asked.tools)
    for number, function in enumerate(functions):
        if function.parameters and function.parameters.get("type") != "object":
            raise InvalidRequestError(
                "The parameters of a function must be a JSON schema of the type object.",
                param=f"tools[{number}].function.parameters",
            )
    named = asked.tool_choice.function.name if isinstance(asked.tool_choice, NamedTool) else None
    return ToolCalling(
        format=form,
        functions=tuple(function for function in functions if named in (None, function.name)),
        is_free=asked.tool_choice in (None, "auto"),
        is_named=named is not None,
        is_parallel=asked.parallel_tool_calls is not False,
    )


@dataclass(frozen=True, slots=True)
class CallBegin:
    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, as JSON text."""

    index: int
    text: str


Piece = str | CallBegin | CallArguments
"""What an answer with tools is made of; a string is plain text of it."""


class _State(Enum):
    BEGINNING = auto()
    TEXT = auto()
    NAME = auto()
    ARGUMENTS = auto()
    AFTER = auto()


class CallParser:
    """Finds the calls in one answer as its text comes."""

    def __init__(self, calling: ToolCalling) -> None:
        self._calling = calling
        self._state = _State.BEGINNING
        self._held = ""
        self._index = -1
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    @property
    def num_calls(self) -> int:
        return self._index + 1

    def add(self, text: str, *, is_last: bool) -> Iterator[Piece]:
        """What more text gives. Text that may be the beginning of a mark is held back until it is decided."""
        self._held += text
        while (piece := self._next(is_last=is_last)) is not None:
            if piece != "":
                yield piece

    def _next(self, *, is_last: bool) -> Piece | None:
        """The next piece, "" for one that only changed the state, None where more text is needed."""
        match self._state:
            case _State.BEGINNING:
                if self._held.startswith(self._calling.head):
                    return self._go_on(len(self._calling.head), _State.NAME)
                if is_last or not self._calling.head.startswith(self._held):
                    self._state = _State.TEXT
                    return ""
                return None
            case _State.TEXT:
                text, self._held = self._held, ""
                return text or None
            case _State.NAME:
                name, neck, _ = self._held.partition(self._calling.neck)
                if not neck:
                    return None
                self._go_on(len(name + neck), _State.ARGUMENTS)
                self._index += 1
                return CallBegin(self._index, f"call_{uuid.uuid4().hex[:24]}", name)
            case _State.ARGUMENTS:
                length = self._object_end()
                text, self._held = self._held[:length], self._held[length:]
                return CallArguments(self._index, text) if text else None
            case _State.AFTER:
                between = f"{self._calling.tail}\n{self._calling.head}"
                return self._go_on(len(between), _State.NAME) if self._held.startswith(between) else None

    def _go_on(self, length: int, state: _State) -> str:
        self._held = self._held[length:]
        self._state = state
        return ""

    def _object_end(self) -> int:
        """How much of the held text belongs to the arguments; past their last brace the state changes."""
        for place, letter in enumerate(self._held):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = letter == "\\"
                self._in_string = letter != '"'
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._state = _State.AFTER
                    return place + 1
        return len(self._held)
