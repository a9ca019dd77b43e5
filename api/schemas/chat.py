"""`POST /v1/chat/completions`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, JsonValue, StrictBool, StrictStr, model_validator

from api.schemas.fields import OBJECT_BYTES, CompletionFields, Count, LogprobCount, Schema, WireModel, check_object
from api.schemas.messages import ChatCompletionMessage, FunctionName

MAX_TEMPLATE_KWARGS = 32


class FunctionDefinition(WireModel):
    """`parameters` is a JSON schema of an object; without it the function takes none."""

    name: FunctionName
    description: StrictStr | None = None
    parameters: Schema | None = None
    strict: StrictBool | None = None


class Tool(WireModel):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(WireModel):
    name: FunctionName


class NamedTool(WireModel):
    type: Literal["function"]
    function: NamedFunction


def _template_kwargs(value: dict[str, Any]) -> dict[str, Any]:
    if len(value) > MAX_TEMPLATE_KWARGS or not all(key.isidentifier() and len(key) <= 64 for key in value):
        raise ValueError(f"'chat_template_kwargs' takes at most {MAX_TEMPLATE_KWARGS} names of variables.")
    if len(repr(value)) > OBJECT_BYTES:
        raise ValueError("'chat_template_kwargs' is too large.")
    return check_object(value, "chat_template_kwargs")


TemplateKwargs = Annotated[dict[str, JsonValue], AfterValidator(_template_kwargs)]
Messages = Annotated[list[ChatCompletionMessage], Field(min_length=1, max_length=4096)]
Tools = Annotated[list[Tool], Field(max_length=128)]


class ChatCompletionRequest(CompletionFields):
    """OpenAI's fields, with vLLM's."""

    IGNORED = CompletionFields.IGNORED - {"parallel_tool_calls"}
    NEUTRAL: ClassVar = {
        "best_of": (1,),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "verbosity": (),
        "web_search_options": (),
        "echo": (False,),
    }

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: LogprobCount | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    chat_template_kwargs: TemplateKwargs | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatCompletionRequest":
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("'max_tokens' and 'max_completion_tokens' differ. Send one of them.")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs': true.")
        check_continuation(self.add_generation_prompt, self.continue_final_message)
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("'tools' has two functions of one name.")
        if self.tool_choice == "required" and not names:
            raise ValueError("'tool_choice' required needs 'tools'.")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError("'tool_choice' names a function that 'tools' does not have.")
        return self

    @property
    def token_limit(self) -> int | None:
        """The most tokens of an answer; None for the rest of the context."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


def check_continuation(add_generation_prompt: bool | None, continue_final_message: bool | None) -> None:
    """Whether the prompt ends in the cue for a new message or inside the last one: not both.

    Raises:
        ValueError: both are asked for.
    """
    if add_generation_prompt and continue_final_message:
        raise ValueError("'continue_final_message' needs 'add_generation_prompt': false.")
