"""`POST /v1/responses`: a conversation in OpenAI's newer form. Nothing is stored."""

import time
from functools import partial

from fastapi import APIRouter, Response

from api.answers.responses import ResponseWriter
from api.conversation import answer_chat
from api.intake import IncomingRequest, validated
from api.openapi import described
from api.schemas import ResponsesRequest
from api.wire import responses_input, sampling_params
from vlm_serve.serving.run import Run
from vlm_serve.types import ChatInput, SamplingParams

router = APIRouter()


@router.post("/v1/responses", **described(ResponsesRequest, "Response", "ResponseEvent"))
async def create_response(call: IncomingRequest) -> Response:
    """Answer a conversation; `stream` decides how."""
    state = call.state
    asked, chat, sampling = await call.parse(partial(_parse, max_images=state.config.max_images))

    def writer(run: Run) -> ResponseWriter:
        return ResponseWriter(asked, run, state.base, int(time.time()))

    return await answer_chat(call, asked, chat, sampling, writer)


def _parse(body: bytes, *, max_images: int) -> tuple[ResponsesRequest, ChatInput, SamplingParams]:
    asked = validated(ResponsesRequest, body)
    return asked, responses_input(asked, max_images=max_images), sampling_params(asked)
