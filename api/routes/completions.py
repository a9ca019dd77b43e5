"""`POST /v1/completions`: plain prompts, continued."""

import time
import uuid
from collections.abc import Sequence

from fastapi import APIRouter, Response

from api.answers.completions import TextWriter
from api.generation import Generation, respond
from api.intake import Incoming, IncomingRequest, validated
from api.openapi import described
from api.schemas import CompletionRequest
from api.schemas.completions import each_prompt
from api.wire import naming_fields, priority, sampling_params
from vlm_serve.errors import InvalidRequestError
from vlm_serve.serving.run import Run
from vlm_serve.types import SamplingParams

router = APIRouter()


@router.post("/v1/completions", **described(CompletionRequest, "Completion", "Completion"))
async def create_completion(call: IncomingRequest) -> Response:
    """Continue each prompt; `stream` decides how the answers come."""
    state = call.state
    asked, sampling = await call.parse(_parse)
    call.take_id(asked.request_id)
    prompts = each_prompt(asked.prompt)
    _check_number(len(prompts), sampling.n, state.llm.max_answers)
    call.record.facts |= {"stream": int(bool(asked.stream)), "prompts": len(prompts)}
    with naming_fields(asked):
        runs = await call.while_connected(_admitted(call, asked, sampling, prompts))
        generation = Generation(runs, state, call.record, call.identity)
        writer = TextWriter(asked, prompts, runs, state.base, int(time.time()))
        return await respond(generation, writer, call.request.receive, stream=bool(asked.stream))


def _parse(body: bytes) -> tuple[CompletionRequest, SamplingParams]:
    asked = validated(CompletionRequest, body)
    return asked, sampling_params(asked)


def _check_number(prompts: int, n: int, most: int) -> None:
    """Raises InvalidRequestError for what would never be let in, however idle the server is."""
    if prompts > 1 and prompts * n > most:
        raise InvalidRequestError(
            f"{prompts} prompts of {n} answers each are {prompts * n} answers at once; this server takes {most}. "
            "Send fewer in a request.",
            param="prompt",
        )


async def _admitted(
    call: Incoming, asked: CompletionRequest, sampling: SamplingParams, prompts: Sequence[str | tuple[int, ...]]
) -> list[Run]:
    """A run for each prompt, or none if one is refused."""
    runs: list[Run] = []
    urgency = priority(asked.priority, call.identity)
    try:
        for prompt in prompts:
            run = await call.state.llm.complete(
                prompt,
                model=asked.model,
                sampling=sampling,
                request_id=uuid.uuid4().hex,
                tenant=call.identity.tenant,
                priority=urgency,
            )
            runs.append(run)
    except BaseException:
        for run in runs:
            await run.aclose()
        raise
    return runs
