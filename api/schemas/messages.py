"""Messages of a chat and their parts: text, images, DICOM files, calls of tools and their results."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict, StrictStr, model_validator

from api.schemas.fields import WireModel

FunctionName = Annotated[str, Strict(), Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]

EMPTY_IN_A_MESSAGE = ("refusal", "function_call", "audio", "annotations", "reasoning_content")
"""What a client sends back with an earlier answer of ours: accepted as long as it is null or empty."""


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


def as_parts(kind: str) -> BeforeValidator:
    """A string stands for one part of text, null for none."""

    def parts(content: Any) -> Any:
        if isinstance(content, str):
            return [{"type": kind, "text": content}]
        return [] if content is None else content

    return BeforeValidator(parts)


def or_text(schema: dict[str, Any]) -> None:
    """For the document of the API: a list of parts may be a string or null, too."""
    parts = {key: schema.pop(key) for key in ("items", "maxItems", "type") if key in schema}
    schema["anyOf"] = [{"type": "string"}, parts, {"type": "null"}]


class CalledFunction(WireModel):
    """`arguments` is a JSON object as text."""

    name: FunctionName
    arguments: Annotated[str, Strict(), Field(max_length=65_536)] = "{}"


class ToolCall(WireModel):
    id: Annotated[str, Strict(), Field(max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatCompletionMessage(WireModel):
    """`content` is a string or a list of parts; null stands for an empty answer of the assistant."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[ContentPart], Field(max_length=4096, json_schema_extra=or_text), as_parts("text")] = Field(
        default_factory=list
    )
    name: StrictStr | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: Annotated[str, Strict(), Field(max_length=256)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_is_empty(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name in EMPTY_IN_A_MESSAGE:
            if value.get(name):
                raise ValueError(f"'{name}' is not supported in a message.")
        return {key: item for key, item in value.items() if key not in EMPTY_IN_A_MESSAGE}

    @model_validator(mode="after")
    def _consistent(self) -> "ChatCompletionMessage":
        if self.tool_calls and self.role != "assistant":
            raise ValueError("'tool_calls' belong to a message of the assistant.")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("'tool_call_id' belongs to a message of the role tool, and to each of them.")
        return self
