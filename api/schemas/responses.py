"""`POST /v1/responses`: OpenAI's newer form of a chat, without what would need a memory of the server."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Strict, StrictBool, StrictStr, model_validator

from api.schemas.fields import Count, GenerationRequest, LogprobCount, Schema, WireModel
from api.schemas.messages import DicomContent, as_parts, or_text


class InputText(WireModel):
    """`output_text` is that of an earlier answer, sent back."""

    IGNORED = frozenset({"annotations", "logprobs"})

    type: Literal["input_text", "output_text"]
    text: StrictStr


class InputImage(WireModel):
    """`image_url` is a `data:` URL of an image or of a DICOM file."""

    NEUTRAL: ClassVar = {"file_id": ()}

    type: Literal["input_image"]
    image_url: StrictStr
    detail: Literal["auto", "low", "high"] | None = None


InputPart = Annotated[InputText | InputImage | DicomContent, Field(discriminator="type")]


class InputMessage(WireModel):
    """A message of the conversation; an item of an earlier answer's `output` is one, too."""

    IGNORED = frozenset({"id", "status"})

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[InputPart], Field(max_length=4096, json_schema_extra=or_text), as_parts("input_text")]


class TextFormat(WireModel):
    type: Literal["text", "json_object", "json_schema"]
    name: StrictStr | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    description: StrictStr | None = None
    strict: StrictBool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "TextFormat":
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("'schema' belongs to the format json_schema, and to it alone.")
        return self


class TextOptions(WireModel):
    NEUTRAL: ClassVar = {"verbosity": ("medium",)}

    format: TextFormat | None = None


Metadata = Annotated[
    dict[Annotated[str, Strict(), Field(max_length=64)], Annotated[str, Strict(), Field(max_length=512)]],
    Field(max_length=16),
]
"""Comes back with the response."""


class ResponsesRequest(GenerationRequest):
    """OpenAI's fields, with vLLM's of sampling."""

    IGNORED = GenerationRequest.IGNORED - {"store", "metadata"}
    NEUTRAL: ClassVar = {
        "store": (False,),
        "previous_response_id": (),
        "conversation": (),
        "prompt": (),
        "background": (False,),
        "include": ([], ["message.output_text.logprobs"]),
        "reasoning": ({}, {"effort": "none"}),
        "tools": ([],),
        "tool_choice": ("auto", "none"),
        "max_tool_calls": (),
        "truncation": ("disabled",),
        "stream_options": ({}, {"include_obfuscation": False}),
    }

    input: Annotated[
        list[InputMessage],
        Field(min_length=1, max_length=4096, json_schema_extra=or_text),
    ]
    instructions: StrictStr | None = None
    max_output_tokens: Count | None = None
    top_logprobs: LogprobCount | None = None
    text: TextOptions | None = None
    metadata: Metadata | None = None

    @model_validator(mode="before")
    @classmethod
    def _has_no_tools(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("tools"):
            raise ValueError("'tools' are not served here. Send functions to /v1/chat/completions.")
        return value

    @model_validator(mode="before")
    @classmethod
    def _text_is_a_message(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("input"), str):
            return value | {"input": [{"role": "user", "content": value["input"]}]}
        return value
