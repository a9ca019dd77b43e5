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
from api.wire import priority, sampling_params
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
    call.record.facts |= {"stream": int(bool(asked.stream)), "prompts": len(prompts)}
    runs = await call.while_connected(_admitted(call, asked, sampling, prompts))
    generation = Generation(runs, state, call.record, call.identity)
    try:
        echoes = [await _text(call, asked.model, prompt) for prompt in prompts] if asked.echo else []
    except BaseException:
        await generation.close()
        raise
    writer = TextWriter(asked, echoes, runs, state.base, int(time.time()))
    return await respond(generation, writer, call.request.receive, stream=bool(asked.stream))


def _parse(body: bytes) -> tuple[CompletionRequest, SamplingParams]:
    asked = validated(CompletionRequest, body)
    return asked, sampling_params(asked)


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


async def _text(call: Incoming, model: str, prompt: str | tuple[int, ...]) -> str:
    return prompt if isinstance(prompt, str) else await call.state.llm.detokenize(prompt, model=model)
