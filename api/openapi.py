"""`/openapi.json`: the wire's models as components, and what an answer looks like, for those who generate clients.

Answers are written by `api.answers`, not by pydantic; their schemas are stated here.
"""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from api.schemas.fields import WireModel
from vlm_serve.types import JsonObject

COMPONENTS = "#/components/schemas/"


def reference(name: str) -> JsonObject:
    return {"$ref": f"{COMPONENTS}{name}"}


def _object(required: JsonObject, **optional: JsonObject) -> JsonObject:
    return {"type": "object", "properties": required | optional, "required": list(required)}


def _nullable(schema: JsonObject) -> JsonObject:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(schema: JsonObject) -> JsonObject:
    return {"type": "array", "items": schema}


_STRING: JsonObject = {"type": "string"}
_INTEGER: JsonObject = {"type": "integer"}
_NUMBER: JsonObject = {"type": "number"}
_ANY: JsonObject = {}
_NULL: JsonObject = {"type": "null"}
_ROLE: JsonObject = {"const": "assistant"}
_REASON: JsonObject = {"enum": ["stop", "length", "tool_calls"]}
_STOP_REASON: JsonObject = _nullable({"anyOf": [_STRING, _INTEGER]})


def _head(kind: str) -> JsonObject:
    return {
        "id": _STRING,
        "object": {"const": kind},
        "created": _INTEGER,
        "model": _STRING,
        "system_fingerprint": _STRING,
    }


def _choices(logprobs: JsonObject, *, optional: JsonObject | None = None, **content: JsonObject) -> JsonObject:
    required = {"index": _INTEGER, **content, "logprobs": _nullable(logprobs), "stop_reason": _STOP_REASON}
    return _list(_object(required, **(optional or {})))


_TOKEN_LOGPROB = {"token": _STRING, "logprob": _NUMBER, "bytes": _list(_INTEGER)}
_TOOL_CALL = _object(
    {"function": _object({"arguments": _STRING}, name=_STRING)},
    index=_INTEGER,
    id=_STRING,
    type={"const": "function"},
)

ANSWERS: JsonObject = {
    "Usage": _object(
        {
            "prompt_tokens": _INTEGER,
            "completion_tokens": _INTEGER,
            "total_tokens": _INTEGER,
            "prompt_tokens_details": _object({"cached_tokens": _INTEGER}),
        }
    ),
    "AboutImages": _object(
        {
            "notice": _STRING,
            "model_notice": _nullable(_STRING),
            "images": _list({"type": "object"}),
            "model": _object({"id": _STRING, "digest": _STRING}),
            "adapter": _nullable(_object({"id": _STRING, "digest": _STRING})),
        }
    ),
    "ChatLogprobs": _object(
        {
            "content": _list(_object(_TOKEN_LOGPROB | {"top_logprobs": _list(_object(_TOKEN_LOGPROB))})),
            "refusal": _NULL,
        }
    ),
    "PromptLogprobs": _list(
        _nullable(
            {
                "type": "object",
                "additionalProperties": _object({"logprob": _NUMBER, "rank": _INTEGER, "decoded_token": _STRING}),
            }
        )
    ),
    "ChatCompletion": _object(
        _head("chat.completion")
        | {
            "choices": _choices(
                reference("ChatLogprobs"),
                message=_object(
                    {"role": _ROLE, "content": _nullable(_STRING), "refusal": _NULL}, tool_calls=_list(_TOOL_CALL)
                ),
                finish_reason=_REASON,
            ),
            "usage": reference("Usage"),
        },
        prompt_logprobs=reference("PromptLogprobs"),
        x_vlm_serve=reference("AboutImages"),
    ),
    "ChatCompletionChunk": _object(
        _head("chat.completion.chunk")
        | {
            "choices": _choices(
                reference("ChatLogprobs"),
                delta=_object({}, role=_ROLE, content=_STRING, tool_calls=_list(_TOOL_CALL)),
                finish_reason=_nullable(_REASON),
            )
        },
        usage=_nullable(reference("Usage")),
        prompt_logprobs=reference("PromptLogprobs"),
        x_vlm_serve=reference("AboutImages"),
    ),
    "Completion": _object(
        _head("text_completion")
        | {
            "choices": _choices(
                _object(
                    {
                        "tokens": _list(_STRING),
                        "token_logprobs": _list(_nullable(_NUMBER)),
                        "top_logprobs": _nullable(
                            _list(_nullable({"type": "object", "additionalProperties": _NUMBER}))
                        ),
                        "text_offset": _list(_INTEGER),
                    }
                ),
                optional={"prompt_logprobs": reference("PromptLogprobs")},
                text=_STRING,
                finish_reason=_nullable(_REASON),
            )
        },
        usage=_nullable(reference("Usage")),
    ),
    "Response": _object(
        {
            "id": _STRING,
            "object": {"const": "response"},
            "created_at": _INTEGER,
            "model": _STRING,
            "status": {"enum": ["in_progress", "completed", "incomplete", "failed"]},
            "output": _list({"type": "object"}),
            "usage": _nullable({"type": "object"}),
        },
        x_vlm_serve=reference("AboutImages"),
    ),
    "ResponseEvent": _object({"type": _STRING, "sequence_number": _INTEGER}),
    "Embeddings": _object(
        {
            "object": {"const": "list"},
            "model": _STRING,
            "data": _list(
                _object(
                    {
                        "object": {"const": "embedding"},
                        "index": _INTEGER,
                        "embedding": {"anyOf": [_list(_NUMBER), _STRING]},
                    }
                )
            ),
            "usage": _object({"prompt_tokens": _INTEGER, "total_tokens": _INTEGER}),
        }
    ),
    "Tokens": _object(
        {
            "count": _INTEGER,
            "max_model_len": _INTEGER,
            "tokens": _list(_INTEGER),
            "token_strs": _nullable(_list(_STRING)),
        }
    ),
    "Text": _object({"prompt": _STRING}),
    "Error": _object(
        {
            "error": _object(
                {"message": _STRING, "type": _STRING, "param": _nullable(_STRING), "code": _nullable(_STRING)}
            )
        }
    ),
}

_ERROR: JsonObject = {"description": "An error", "content": {"application/json": {"schema": reference("Error")}}}
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": _ERROR, "5XX": _ERROR}
"""Of every route; without them FastAPI would promise its own form of a 422."""

_REQUESTS: dict[str, type[WireModel]] = {}


def described(request: type[WireModel], answer: str, event: str | None = None) -> dict[str, Any]:
    """What a route that reads its own body says of it in the document: the request, the answer, a stream's events."""
    _REQUESTS[request.__name__] = request
    content = {"application/json": {"schema": reference(answer)}}
    if event is not None:
        content["text/event-stream"] = {"schema": reference(event)}
    text = "The answer" if event is None else "The answer; with `stream`, server-sent events"
    body = {"required": True, "content": {"application/json": {"schema": reference(request.__name__)}}}
    return {
        "responses": {200: {"description": text, "content": content}},
        "openapi_extra": {"requestBody": body},
        "response_model": None,
    }


def _schema(model: type[BaseModel]) -> JsonObject:
    """The model's schema with the fields that are accepted and change nothing."""
    schema = model.model_json_schema(ref_template=COMPONENTS + "{model}")
    ignored = model.IGNORED if issubclass(model, WireModel) else frozenset()
    schema["properties"] |= {name: {"description": "Accepted; changes nothing."} for name in sorted(ignored)}
    return schema


class Application(FastAPI):
    """FastAPI, whose description has our components too: a route that reads its own body brings none."""

    def openapi(self) -> dict[str, Any]:
        described = super().openapi()
        components = described.setdefault("components", {}).setdefault("schemas", {})
        for name, model in _REQUESTS.items():
            schema = _schema(model)
            components |= schema.pop("$defs", {}) | {name: schema}
        components |= ANSWERS
        return described
