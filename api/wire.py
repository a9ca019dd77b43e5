"""From the wire to the engine's nouns: a checked request becomes a `ChatInput` or prompts, and `SamplingParams`."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from api.gateway.keys import Identity
from api.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    DicomContent,
    EmbeddingRequest,
    ImageUrlContent,
    ResponsesRequest,
    TextContent,
    TokenizeRequest,
)
from api.schemas.fields import CompletionFields, GenerationRequest, ResponseFormat
from api.schemas.messages import ChatCompletionMessage
from api.schemas.responses import InputImage, InputText
from vlm_serve.errors import InputError, InvalidRequestError, PermissionDeniedError
from vlm_serve.serving.media import DICOM, from_base64, from_data_url
from vlm_serve.types import (
    ChatInput,
    ChatMessage,
    ImagePart,
    JsonObject,
    SamplingParams,
    StructuredOutputs,
    TextPart,
    ToolCall,
)

BAD_TOOLS = (
    "No answer can be held to what these functions take: their parameters are no valid JSON schemas, use what is not "
    "supported, or are too large or too complex together. Send fewer functions, or simpler ones."
)

STAT = -1
"""The priority of a request that goes before the routine ones."""

_AS_THEY_ARE = (
    "temperature top_p top_k min_p seed presence_penalty frequency_penalty repetition_penalty logit_bias "
    "allowed_token_ids bad_words min_tokens stop stop_token_ids ignore_eos include_stop_str_in_output "
    "skip_special_tokens prompt_logprobs truncate_prompt_tokens"
).split()
"""Fields of a request that sampling takes under their own names; null is its default, which is OpenAI's."""


def sampling_params(
    asked: ChatCompletionRequest | CompletionRequest | ResponsesRequest, structure: StructuredOutputs | None = None
) -> SamplingParams:
    """OpenAI's defaults: temperature 1, and for a chat as many tokens as the context holds.

    Args:
        structure: what the answer must match, where the request's own fields do not say it: a call of a tool.

    Raises:
        InvalidRequestError: a value is out of its range, or the answer's form is given twice.
    """
    given = {name: getattr(asked, name) for name in _AS_THEY_ARE if getattr(asked, name) is not None}
    given["structured_outputs"] = _only(_structures(asked) | ({"tools": structure} if structure else {}))
    match asked:
        case ChatCompletionRequest():
            given |= {"n": asked.n or 1, "max_tokens": asked.token_limit}
            given["logprobs"] = (asked.top_logprobs or 0) if asked.logprobs else None
        case CompletionRequest():
            given |= {"n": asked.n or 1, "max_tokens": asked.token_limit, "logprobs": asked.logprobs}
            if asked.echo and asked.logprobs is not None:
                given["prompt_logprobs"] = max(asked.logprobs, asked.prompt_logprobs or 0)
        case ResponsesRequest():
            given |= {"max_tokens": asked.max_output_tokens, "logprobs": asked.top_logprobs}
    return SamplingParams(**given)


def _only(structures: Mapping[str, StructuredOutputs]) -> StructuredOutputs | None:
    if len(structures) > 1:
        raise InvalidRequestError(
            f"Say in one way what the answer must match, not in {' and '.join(structures)}.",
            param=next(iter(structures)),
        )
    return next(iter(structures.values()), None)


def _structures(asked: GenerationRequest) -> dict[str, StructuredOutputs]:
    """Everything in a request that says what the answer must match, by its field."""
    found = {}
    if (field := asked.structured_outputs) is not None:
        found["structured_outputs"] = StructuredOutputs(
            field.json_, bool(field.json_object), field.regex, field.choice, field.grammar
        )
    if isinstance(asked, ResponsesRequest) and asked.text is not None and (text := asked.text.format) is not None:
        found |= _format("text.format", text.type, text.schema_)
    if isinstance(asked, CompletionFields):
        if (form := asked.response_format) is not None:
            found |= _format("response_format", form.type, _schema_of(form))
        guided: dict[str, Any] = {
            "json": asked.guided_json,
            "regex": asked.guided_regex,
            "choice": asked.guided_choice,
            "grammar": asked.guided_grammar,
        }
        found |= {
            f"guided_{name}": StructuredOutputs(**{name: value}) for name, value in guided.items() if value is not None
        }
    return found


def _schema_of(form: ResponseFormat) -> JsonObject | None:
    return form.json_schema.schema_ if form.json_schema is not None else None


def _format(name: str, kind: str, schema: JsonObject | None) -> dict[str, StructuredOutputs]:
    if kind == "text":
        return {}
    return {name: StructuredOutputs(json_object=True) if schema is None else StructuredOutputs(json=schema)}


def priority(asked: str | int | None, identity: Identity) -> int:
    """vLLM's numbers: a lower one goes first, 0 is routine.

    Raises:
        PermissionDeniedError: it would go before routine ones, which this key may not.
    """
    number = asked if isinstance(asked, int) else STAT if asked == "stat" else 0
    if number < 0 and not identity.stat:
        raise PermissionDeniedError(
            "This key may not go before routine requests. Ask the operator for one that may.", param="priority"
        )
    return number


class _Parts:
    """Makes parts out of a request's, within its limit of images."""

    def __init__(self, max_images: int) -> None:
        self._max_images = max_images
        self._images = 0

    def make(self, part: Any, role: str, param: str) -> TextPart | ImagePart:
        if isinstance(part, TextContent | InputText):
            return TextPart(part.text)
        if role != "user":
            raise InvalidRequestError("An image belongs in a message of the user.", param=param)
        self._images += 1
        if self._images > self._max_images:
            raise InvalidRequestError(
                f"At most {self._max_images} images are allowed in a request.", param=param.partition("[")[0]
            )
        match part:
            case DicomContent():
                return ImagePart(from_base64(part.dicom.data, f"{param}.dicom.data"), DICOM)
            case ImageUrlContent():
                return from_data_url(part.image_url.url, f"{param}.image_url.url")
            case InputImage():
                return from_data_url(part.image_url, f"{param}.image_url")
        raise AssertionError(part)


def chat_input(asked: ChatCompletionRequest | TokenizeRequest, *, max_images: int) -> ChatInput:
    """The conversation with its files as bytes.

    Raises:
        InvalidRequestError: too many images, an image outside a user's message, a message without content, a call
            whose arguments are no JSON object, or a file that is not sent as base64 under a media type that is served.
    """
    parts = _Parts(max_images)
    messages = []
    for index, message in enumerate(asked.messages or ()):
        place = f"messages[{index}]"
        content = tuple(
            parts.make(part, message.role, f"{place}.content[{number}]") for number, part in enumerate(message.content)
        )
        if not content and message.role != "assistant":
            raise InvalidRequestError(f"A {message.role} message needs content.", param=f"{place}.content")
        messages.append(ChatMessage(_role(message.role), content, _tool_calls(message, place), message.tool_call_id))
    has_tools = not (isinstance(asked, ChatCompletionRequest) and asked.tool_choice == "none")
    return ChatInput(
        messages=tuple(messages),
        tools=tuple(tool.model_dump(exclude_none=True) for tool in asked.tools or ()) if has_tools else (),
        add_generation_prompt=asked.add_generation_prompt is not False,
        continue_final_message=bool(asked.continue_final_message),
        template_kwargs=asked.chat_template_kwargs or {},
    )


def _tool_calls(message: ChatCompletionMessage, place: str) -> tuple[ToolCall, ...]:
    calls = []
    for number, call in enumerate(message.tool_calls or ()):
        try:
            arguments = json.loads(call.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise InvalidRequestError(
                "The arguments of a call must be a JSON object as text.",
                param=f"{place}.tool_calls[{number}].function.arguments",
            )
        calls.append(ToolCall(call.id, call.function.name, arguments))
    return tuple(calls)


def responses_input(asked: ResponsesRequest, *, max_images: int) -> ChatInput:
    """As `chat_input` does it; `instructions` are a system message at the front."""
    parts = _Parts(max_images)
    messages = []
    if asked.instructions is not None:
        messages.append(ChatMessage("system", (TextPart(asked.instructions),)))
    for index, message in enumerate(asked.input):
        place = f"input[{index}].content"
        content = tuple(
            parts.make(part, message.role, f"{place}[{number}]") for number, part in enumerate(message.content)
        )
        if not content and message.role != "assistant":
            raise InvalidRequestError(f"A {message.role} message needs content.", param=place)
        messages.append(ChatMessage(_role(message.role), content))
    return ChatInput(tuple(messages))


Asked = ChatCompletionRequest | CompletionRequest | ResponsesRequest | EmbeddingRequest | TokenizeRequest


@contextmanager
def naming_fields(asked: Asked) -> Iterator[None]:
    """An error on its way out names the field as the request has it."""
    try:
        yield
    except InputError as error:
        name_field(error, asked)
        raise


def name_field(error: InputError, asked: Asked) -> None:
    """`param` is the engine's word for what is wrong; here it becomes the request's own. Once done, it changes nothing
    more.
    """
    param = error.param or ""
    match asked:
        case ResponsesRequest():
            # The engine's messages have the instructions at their front.
            before = 1 if asked.instructions is not None else 0
            param = re.sub(r"^messages\[(\d+)\]", lambda match: f"input[{int(match[1]) - before}]", param)
            names = {"messages": "input", "max_tokens": "max_output_tokens", "logprobs": "top_logprobs"}
        case CompletionRequest():
            names = {"messages": "prompt"}
        case EmbeddingRequest():
            names = {"messages": "input", "prompt": "input"}
        case TokenizeRequest():
            names = {"messages": "prompt"} if asked.prompt is not None else {}
        case ChatCompletionRequest():
            names = {"max_tokens": "max_completion_tokens"} if asked.max_completion_tokens is not None else {}
    if isinstance(asked, GenerationRequest) and param == "structured_outputs":
        if structures := _structures(asked):
            param = next(iter(structures))
        else:
            param, error.args = "tools", (BAD_TOOLS,)
    error.param = names.get(param, param) or None


def _role(role: str) -> str:
    return "system" if role == "developer" else role
