"""`POST /tokenize` and `/detokenize`, with vLLM's bodies."""

from functools import partial

from fastapi import APIRouter

from api.intake import IncomingRequest, validated
from api.openapi import described
from api.schemas import DetokenizeRequest, TokenizeRequest
from api.wire import chat_input, naming_fields
from vlm_serve.types import ChatInput, JsonObject

router = APIRouter()


@router.post("/tokenize", **described(TokenizeRequest, "Tokens"))
async def tokenize(call: IncomingRequest) -> JsonObject:
    """The token ids of a prompt, or of a conversation as a chat would send it to the engine."""
    llm = call.state.llm
    asked, prompt = await call.parse(partial(_parse, max_images=call.state.config.max_images))
    model = asked.model or call.state.base.id
    with naming_fields(asked):
        token_ids = await call.while_connected(llm.tokenize(prompt, model=model))
    texts = await call.while_connected(llm.token_texts(token_ids)) if asked.return_token_strs else None
    return {
        "count": len(token_ids),
        "max_model_len": call.state.base.max_model_len,
        "tokens": list(token_ids),
        "token_strs": texts,
    }


def _parse(body: bytes, *, max_images: int) -> tuple[TokenizeRequest, str | ChatInput]:
    asked = validated(TokenizeRequest, body)
    return asked, asked.prompt if asked.prompt is not None else chat_input(asked, max_images=max_images)


@router.post("/detokenize", **described(DetokenizeRequest, "Text"))
async def detokenize(call: IncomingRequest) -> JsonObject:
    """The text of token ids."""
    asked = await call.parse(partial(validated, DetokenizeRequest))
    return {"prompt": await call.state.llm.detokenize(asked.tokens, model=asked.model or call.state.base.id)}
