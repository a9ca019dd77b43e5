"""The wire's models: what a chat request may say, checked before anything else sees it.

Three kinds of field. Supported ones are typed here. Those that OpenAI knows and that change nothing in an
answer are accepted; those that would change it and are not supported are an error that names them. Any
other field is an error too, so that a misspelt one never silently does nothing.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StrictBool,
    StrictStr,
    model_validator,
)

Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]

Count = Annotated[int, Strict(), Field(ge=1, lt=2**31)]

IGNORED_FIELDS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    }
)
"""Known to OpenAI, without influence on an answer."""

NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "echo": (False,),
    "continue_final_message": (False,),
    "priority": (0,),
}
"""Known fields that are not supported, with the values that ask for nothing; null always does."""

EMPTY_IN_A_MESSAGE = ("refusal", "tool_calls", "function_call", "audio", "annotations", "reasoning_content")
"""What a client sends back with an earlier answer of ours: accepted as long as it is null or empty."""


class WireModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextContent(WireModel):
    type: Literal["text"]
    text: StrictStr


class ImageUrl(WireModel):
    url: StrictStr
    detail: Literal["auto", "low", "high"] | None = None


class ImageUrlContent(WireModel):
    """`image_url.url` is a `data:` URL of an image or of a DICOM file."""

    type: Literal["image_url"]
    image_url: ImageUrl


class DicomData(WireModel):
    data: StrictStr


class DicomContent(WireModel):
    """`dicom.data` is a DICOM file in base64."""

    type: Literal["dicom"]
    dicom: DicomData


ContentPart = Annotated[TextContent | ImageUrlContent | DicomContent, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [] if content is None else content


class ChatCompletionMessage(WireModel):
    """`content` is a string or a list of parts; null stands for an empty answer of the assistant."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[ContentPart], Field(max_length=4096), BeforeValidator(_as_parts)] = Field(
        default_factory=list
    )
    name: StrictStr | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_is_empty(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name in EMPTY_IN_A_MESSAGE:
            if value.get(name):
                raise ValueError(f"'{name}' is not supported in a message.")
        return {key: item for key, item in value.items() if key not in EMPTY_IN_A_MESSAGE}


class StreamOptions(WireModel):
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False


class ChatCompletionRequest(WireModel):
    """`POST /v1/chat/completions`: OpenAI's fields, with vLLM's `top_k` and `ignore_eos`."""

    model: Annotated[str, Strict(), Field(min_length=1, max_length=256)]
    messages: Annotated[list[ChatCompletionMessage], Field(min_length=1, max_length=4096)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Annotated[int, Strict(), Field(ge=-1, lt=2**31)] | None = None
    seed: Annotated[int, Strict(), Field(ge=-(2**63), lt=2**64)] | None = None
    stop: StrictStr | list[StrictStr] | None = None
    ignore_eos: StrictBool | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_served(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        unserved = [
            name
            for name, neutral in NEUTRAL_VALUES.items()
            if name in value and value[name] is not None and value[name] not in neutral
        ]
        if unserved:
            names = ", ".join(f"'{name}'" for name in unserved)
            raise ValueError(f"Not supported here, and it would change the answer: {names}. Leave it out.")
        return {key: item for key, item in value.items() if key not in NEUTRAL_VALUES and key not in IGNORED_FIELDS}

    @model_validator(mode="after")
    def _consistent(self) -> "ChatCompletionRequest":
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("'max_tokens' and 'max_completion_tokens' differ. Send one of them.")
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' needs 'stream': true.")
        return self

    @property
    def token_limit(self) -> int | None:
        """The most tokens of an answer; None for the rest of the context."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage
