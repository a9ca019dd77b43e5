"""A conversation through the engine and back: what chat completions and responses have in common."""

import uuid
from collections.abc import Callable

from starlette.responses import Response

from api.answers.base import Writer
from api.generation import Generation, respond
from api.intake import Incoming
from api.schemas import ChatCompletionRequest, ResponsesRequest
from api.wire import naming_fields, priority
from vlm_serve.serving.run import Run
from vlm_serve.types import ChatInput, SamplingParams


async def answer_chat(
    call: Incoming,
    asked: ChatCompletionRequest | ResponsesRequest,
    chat: ChatInput,
    sampling: SamplingParams,
    writer: Callable[[Run], Writer],
) -> Response:
    """Runs the conversation that was `asked` and answers in the form of the `writer` of its run.

    Raises:
        VlmServeError: what the engine refuses; `param` names the field as this request has it.
        ClientGoneError: the client left before its request was admitted.
    """
    state = call.state
    call.take_id(asked.request_id)
    call.record.facts |= {"stream": int(bool(asked.stream)), "images": len(chat.images)}
    with naming_fields(asked):
        run = await call.while_connected(
            state.llm.chat(
                chat,
                model=asked.model,
                sampling=sampling,
                # The engine's id is the server's own: two clients may send the same X-Request-Id at once.
                request_id=uuid.uuid4().hex,
                tenant=call.identity.tenant,
                priority=priority(asked.priority, call.identity),
            )
        )
        generation = Generation([run], state, call.record, call.identity)
        return await respond(generation, writer(run), call.request.receive, stream=bool(asked.stream))
