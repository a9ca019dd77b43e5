"""`POST /v1/completions`."""

from typing import Annotated, ClassVar, cast

from pydantic import Field, Strict, StrictBool, StrictStr, model_validator

from api.schemas.fields import CompletionFields, LogprobCount, TokenId

MAX_PROMPTS = 128

Prompts = (
    StrictStr
    | Annotated[list[TokenId], Field(min_length=1)]
    | Annotated[list[StrictStr], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
)
"""One prompt or several, as text or as token ids."""


def each_prompt(prompts: Prompts) -> list[str | tuple[int, ...]]:
    """The prompts, one by one."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts[0], int):
        return [tuple(prompts)]
    several = cast(list[str | list[int]], prompts)
    return [prompt if isinstance(prompt, str) else tuple(prompt) for prompt in several]


class CompletionRequest(CompletionFields):
    """OpenAI's fields, with vLLM's. `max_tokens` is 16 unless given, and 0 for the echo of a prompt alone."""

    IGNORED = CompletionFields.IGNORED - {"parallel_tool_calls"}
    NEUTRAL: ClassVar = {"suffix": ("",)}

    prompt: Prompts
    max_tokens: Annotated[int, Strict(), Field(ge=0, lt=2**31)] | None = None
    best_of: Annotated[int, Strict(), Field(ge=1, lt=2**31)] | None = None
    echo: StrictBool | None = None
    logprobs: LogprobCount | None = None
    add_special_tokens: StrictBool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("'best_of' must equal 'n': every answer made is given.")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("'max_tokens' 0 asks for nothing without 'echo': true.")
        if self.add_special_tokens is False:
            raise ValueError("'add_special_tokens' false is not supported. Send token ids.")
        return self

    @property
    def token_limit(self) -> int:
        """The most tokens of an answer. What there is to know of a prompt comes with a first one, asked for or not."""
        return 16 if self.max_tokens is None else max(1, self.max_tokens)
