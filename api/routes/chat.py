"""`POST /v1/chat/completions`: one conversation, its answers whole or as a stream of server-sent events."""

import time
from functools import partial

from fastapi import APIRouter, Response

from api.answers.chat import ChatWriter
from api.conversation import answer_chat
from api.intake import IncomingRequest, validated
from api.openapi import described
from api.schemas import ChatCompletionRequest
from api.tools import ToolCalling, tool_calling
from api.wire import chat_input, sampling_params
from vlm_serve.families.prompt import ToolFormat
from vlm_serve.serving.run import Run
from vlm_serve.types import ChatInput, SamplingParams

router = APIRouter()


@router.post("/v1/chat/completions", **described(ChatCompletionRequest, "ChatCompletion", "ChatCompletionChunk"))
async def create_chat_completion(call: IncomingRequest) -> Response:
    """Answer a conversation; `stream` decides how."""
    state = call.state
    parse = partial(_parse, max_images=state.config.max_images, form=state.llm.tool_format)
    asked, calling, chat, sampling = await call.parse(parse)

    def writer(run: Run) -> ChatWriter:
        return ChatWriter(asked, calling, run, state.base, int(time.time()))

    return await answer_chat(call, asked, chat, sampling, writer)


def _parse(
    body: bytes, *, max_images: int, form: ToolFormat | None
) -> tuple[ChatCompletionRequest, ToolCalling | None, ChatInput, SamplingParams]:
    asked = validated(ChatCompletionRequest, body)
    calling = tool_calling(asked, form)
    sampling = sampling_params(asked, calling.structured_outputs() if calling is not None else None)
    return asked, calling, chat_input(asked, max_images=max_images), sampling
