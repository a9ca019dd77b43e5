"""`POST /v1/responses`: a conversation in OpenAI's newer form. Nothing is stored."""

import time
import uuid
from functools import partial

from fastapi import APIRouter, Response

from api.answers.responses import ResponseWriter
from api.generation import Generation, respond
from api.intake import IncomingRequest, validated
from api.openapi import described
from api.schemas import ResponsesRequest
from api.wire import naming_fields, priority, responses_input, sampling_params
from vlm_serve.types import ChatInput, SamplingParams

router = APIRouter()


@router.post("/v1/responses", **described(ResponsesRequest, "Response", "ResponseEvent"))
async def create_response(call: IncomingRequest) -> Response:
    """Answer a conversation; `stream` decides how."""
    state = call.state
    asked, chat, sampling = await call.parse(partial(_parse, max_images=state.config.max_images))
    call.take_id(asked.request_id)
    call.record.facts |= {"stream": int(bool(asked.stream)), "images": len(chat.images)}
    with naming_fields(asked):
        run = await call.while_connected(
            state.llm.chat(
                chat,
                model=asked.model,
                sampling=sampling,
                request_id=uuid.uuid4().hex,
                tenant=call.identity.tenant,
                priority=priority(asked.priority, call.identity),
            )
        )
        generation = Generation([run], state, call.record, call.identity)
        writer = ResponseWriter(asked, run, state.base, int(time.time()))
        return await respond(generation, writer, call.request.receive, stream=bool(asked.stream))


def _parse(body: bytes, *, max_images: int) -> tuple[ResponsesRequest, ChatInput, SamplingParams]:
    asked = validated(ResponsesRequest, body)
    return asked, responses_input(asked, max_images=max_images), sampling_params(asked)
