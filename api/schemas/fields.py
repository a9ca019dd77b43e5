"""What the requests for text share: the fields of sampling and of structured outputs, under vLLM's names."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    Strict,
    StrictBool,
    StrictStr,
    model_validator,
)

Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Integer = Annotated[int, Strict(), Field(ge=-(2**31), lt=2**31)]
Count = Annotated[int, Strict(), Field(ge=1, lt=2**31)]
TokenId = Annotated[int, Strict(), Field(ge=0, lt=2**31)]
ModelName = Annotated[str, Strict(), Field(min_length=1, max_length=256)]
RequestId = Annotated[str, Strict(), Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{7,63}$")]

MAX_LOGPROBS = 20
LogprobCount = Annotated[int, Strict(), Field(ge=0, le=MAX_LOGPROBS)]

OBJECT_BYTES = 64 * 1024
OBJECT_DEPTH = 32


def check_object(value: dict[str, Any], name: str) -> dict[str, Any]:
    """A JSON object that a template or a grammar is going to walk: bounded in depth, so that nobody's stack is.

    Raises:
        ValueError: it nests deeper.
    """
    level: list[Any] = [value]
    for _ in range(OBJECT_DEPTH):
        level = [
            item
            for node in level
            if isinstance(node, dict | list)
            for item in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return value
    raise ValueError(f"'{name}' nests more than {OBJECT_DEPTH} levels deep.")


def _token_bias(value: Any) -> Any:
    """JSON's keys are text; a token's id is a number."""
    if value is None:
        return None
    try:
        if not isinstance(value, dict) or any(isinstance(item, bool | str) for item in value.values()):
            raise TypeError
        return {int(key): float(item) for key, item in value.items() if str(key).isdecimal() or _refuse()}
    except (TypeError, ValueError, OverflowError):
        raise ValueError("'logit_bias' must map token ids to numbers.") from None


def _refuse() -> bool:
    raise TypeError


Schema = Annotated[dict[str, JsonValue], AfterValidator(lambda value: check_object(value, "schema"))]


class WireModel(BaseModel):
    """A part of a request. No field but those that are named, and no value of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    IGNORED: ClassVar[frozenset[str]] = frozenset()
    """Known to OpenAI, without influence on an answer."""

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Known fields that are not supported, with the values that ask for nothing; null always does."""

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_served(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not (cls.IGNORED or cls.NEUTRAL):
            return value
        unserved = [
            name
            for name, neutral in cls.NEUTRAL.items()
            if name in value and value[name] is not None and value[name] not in neutral
        ]
        if unserved:
            names = ", ".join(f"'{name}'" for name in unserved)
            raise ValueError(f"Not supported here, and it would change the answer: {names}. Leave it out.")
        return {key: item for key, item in value.items() if key not in cls.NEUTRAL and key not in cls.IGNORED}


class JsonSchemaFormat(WireModel):
    """`json_schema` of a `response_format`."""

    name: Annotated[str, Strict(), Field(min_length=1, max_length=64)] = "answer"
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    description: StrictStr | None = None
    strict: StrictBool | None = None


class ResponseFormat(WireModel):
    """What the answer must be: any text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ResponseFormat":
        has_schema = self.json_schema is not None and self.json_schema.schema_ is not None
        if (self.type == "json_schema") != (self.json_schema is not None) or (self.json_schema and not has_schema):
            raise ValueError("'json_schema' with its 'schema' belongs to the type json_schema, and to it alone.")
        return self


Choices = Annotated[list[StrictStr], Field(min_length=1, max_length=1024)]


class StructuredOutputsField(WireModel):
    """Exactly one of the fields says what the whole answer must match."""

    json_: Annotated[StrictStr | Schema | None, Field(alias="json")] = None
    json_object: StrictBool | None = None
    regex: StrictStr | None = None
    choice: Choices | None = None
    grammar: StrictStr | None = None


class GenerationRequest(WireModel):
    """What every request for text may say."""

    IGNORED = frozenset(
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

    model: ModelName
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Annotated[int, Strict(), Field(ge=-1, lt=2**31)] | None = None
    min_p: Number | None = None
    seed: Annotated[int, Strict(), Field(ge=-(2**63), lt=2**64)] | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: Annotated[dict[int, float] | None, BeforeValidator(_token_bias)] = None
    allowed_token_ids: list[TokenId] | None = None
    bad_words: list[StrictStr] | None = None
    min_tokens: Annotated[int, Strict(), Field(ge=0, lt=2**31)] | None = None
    stop: StrictStr | list[StrictStr] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: StrictBool | None = None
    include_stop_str_in_output: StrictBool | None = None
    skip_special_tokens: StrictBool | None = None
    prompt_logprobs: LogprobCount | None = None
    truncate_prompt_tokens: Count | None = None
    structured_outputs: StructuredOutputsField | None = None
    priority: Literal["stat", "routine"] | Integer | None = None
    request_id: RequestId | None = None
    stream: StrictBool | None = None


class StreamOptions(WireModel):
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False


class CompletionFields(GenerationRequest):
    """What chats and plain completions share beyond that."""

    n: Count | None = None
    max_tokens: Count | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    guided_json: StrictStr | Schema | None = None
    guided_regex: StrictStr | None = None
    guided_choice: Choices | None = None
    guided_grammar: StrictStr | None = None

    @model_validator(mode="after")
    def _stream_is_consistent(self) -> "CompletionFields":
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' needs 'stream': true.")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage
