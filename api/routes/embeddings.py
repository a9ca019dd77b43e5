"""`POST /v1/embeddings`: each input's embedding, of norm 1."""

import asyncio
import base64
import uuid
from functools import partial

import numpy as np
from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from api.intake import Incoming, IncomingRequest, validated
from api.openapi import described
from api.schemas import EmbeddingRequest
from api.schemas.completions import each_prompt
from api.wire import naming_fields, priority
from vlm_serve.errors import InvalidRequestError
from vlm_serve.serving.async_llm import Embedding
from vlm_serve.types import JsonObject

router = APIRouter()

AT_ONCE = 16
"""Inputs of one request in the engine: a long list leaves room for others."""


@router.post("/v1/embeddings", **described(EmbeddingRequest, "Embeddings"))
async def create_embeddings(call: IncomingRequest) -> Response:
    """Embed each input."""
    asked = await call.parse(partial(validated, EmbeddingRequest))
    call.take_id(asked.request_id)
    with naming_fields(asked):
        embeddings = await call.while_connected(_embed_all(call, asked))
    tokens = sum(embedding.prompt_tokens for embedding in embeddings)
    call.record.facts |= {"model": asked.model, "prompt_tokens": tokens}
    return JSONResponse(await asyncio.to_thread(embeddings_json, asked, embeddings, tokens))


async def _embed_all(call: Incoming, asked: EmbeddingRequest) -> list[Embedding]:
    urgency = priority(asked.priority, call.identity)
    room = asyncio.Semaphore(AT_ONCE)

    async def embed(prompt: str | tuple[int, ...]) -> Embedding:
        async with room:
            found = await call.state.llm.embed(
                prompt,
                model=asked.model,
                request_id=uuid.uuid4().hex,
                tenant=call.identity.tenant,
                priority=urgency,
            )
        adapter = asked.model if asked.model != call.state.llm.models[0].id else ""
        figures = call.state.metrics.request(adapter, call.identity.tenant)
        figures.embedded(found.prompt_tokens, call.record.elapsed)
        check_dimensions(asked, found.vector)
        return found

    tasks = [asyncio.create_task(embed(prompt)) for prompt in each_prompt(asked.input)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def check_dimensions(asked: EmbeddingRequest, vector: np.ndarray) -> None:
    """Raises InvalidRequestError if the request wants embeddings of another length."""
    if asked.dimensions not in (None, len(vector)):
        raise InvalidRequestError(
            f"This model's embeddings have {len(vector)} dimensions, no more and no fewer.", param="dimensions"
        )


def embeddings_json(asked: EmbeddingRequest, embeddings: list[Embedding], tokens: int) -> JsonObject:
    """The body; `tokens` are those of all prompts."""

    def shown(vector: np.ndarray) -> list[float] | str:
        if asked.encoding_format == "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
        found: list[float] = vector.astype(float).tolist()
        return found

    return {
        "object": "list",
        "model": asked.model,
        "data": [
            {"object": "embedding", "index": index, "embedding": shown(embedding.vector)}
            for index, embedding in enumerate(embeddings)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
