"""`/openapi.json`: the wire's models as components, and what an answer looks like, for those who generate clients.

Answers are written by `api.responses`, not by pydantic; their schemas are stated here.
"""

from typing import Any

from fastapi import FastAPI

from api.schemas import ChatCompletionRequest
from vlm_serve.types import JsonObject

COMPONENTS = "#/components/schemas/"


def reference(name: str) -> JsonObject:
    return {"$ref": f"{COMPONENTS}{name}"}


def _object(required: JsonObject, **optional: JsonObject) -> JsonObject:
    return {"type": "object", "properties": required | optional, "required": list(required)}


def _nullable(schema: JsonObject) -> JsonObject:
    return {"anyOf": [schema, {"type": "null"}]}


_STRING: JsonObject = {"type": "string"}
_INTEGER: JsonObject = {"type": "integer"}
_NULL: JsonObject = {"type": "null"}
_ROLE: JsonObject = {"const": "assistant"}
_REASON: JsonObject = {"enum": ["stop", "length"]}


def _head(kind: str) -> JsonObject:
    return {
        "id": _STRING,
        "object": {"const": kind},
        "created": _INTEGER,
        "model": _STRING,
        "system_fingerprint": _STRING,
    }


def _choices(**content: JsonObject) -> JsonObject:
    return {"type": "array", "items": _object({"index": _INTEGER, **content, "logprobs": _NULL})}


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
            "images": {"type": "array", "items": {"type": "object"}},
            "model": _object({"id": _STRING, "digest": _STRING}),
            "adapter": _nullable(_object({"id": _STRING, "digest": _STRING})),
        }
    ),
    "ChatCompletion": _object(
        _head("chat.completion")
        | {
            "choices": _choices(
                message=_object({"role": _ROLE, "content": _STRING, "refusal": _NULL}), finish_reason=_REASON
            ),
            "usage": reference("Usage"),
        },
        x_vlm_serve=reference("AboutImages"),
    ),
    "ChatCompletionChunk": _object(
        _head("chat.completion.chunk")
        | {"choices": _choices(delta=_object({}, role=_ROLE, content=_STRING), finish_reason=_nullable(_REASON))},
        usage=_nullable(reference("Usage")),
        x_vlm_serve=reference("AboutImages"),
    ),
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

CHAT_REQUEST: JsonObject = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": reference(ChatCompletionRequest.__name__)}},
    }
}

CHAT_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream`, chunks as server-sent events up to `data: [DONE]`",
        "content": {
            "application/json": {"schema": reference("ChatCompletion")},
            "text/event-stream": {"schema": reference("ChatCompletionChunk")},
        },
    }
}


class Application(FastAPI):
    """FastAPI, whose description has our components too: a route that reads its own body brings none."""

    def openapi(self) -> dict[str, Any]:
        described = super().openapi()
        request = ChatCompletionRequest.model_json_schema(ref_template=COMPONENTS + "{model}")
        components = described.setdefault("components", {}).setdefault("schemas", {})
        components |= request.pop("$defs") | {ChatCompletionRequest.__name__: request} | ANSWERS
        return described
