"""What can never be served is refused before it is queued."""

from vlm_serve.engine.block_manager import BlockManager
from vlm_serve.errors import ContextLengthError, InvalidRequestError
from vlm_serve.types import Request


def check_request(request: Request, *, max_model_len: int, max_image_tokens: int, blocks: BlockManager) -> int:
    """The most tokens that an answer to the request may have; none for one that pools.

    Raises:
        ContextLengthError: prompt and answer do not fit in the context, or not in the KV cache.
        InvalidRequestError: an empty prompt, an image larger than the encoder cache, or several that must be in it at
            once and cannot.
    """
    prompt_len, max_tokens = len(request.token_ids), request.sampling.max_tokens
    if prompt_len == 0:
        raise InvalidRequestError("The prompt is empty.", param="messages")
    room = max_model_len - prompt_len
    if request.pooling:
        max_tokens = 0
    if room < (1 if max_tokens is None else max_tokens):
        answer = "" if request.pooling else f" and {max_tokens or 'at least 1'} may be generated"
        raise ContextLengthError(
            f"The prompt has {prompt_len} tokens{answer}; the context holds {max_model_len}. "
            "Shorten the prompt, send fewer images or lower max_tokens.",
            param="messages" if room < 1 else "max_tokens",
        )
    largest = max((span.inputs.num_tokens for span in request.images), default=0)
    if largest > max_image_tokens:
        raise InvalidRequestError(
            f"An image takes {largest} tokens; the encoder cache holds {max_image_tokens}. Send a smaller image.",
            param="messages",
        )
    prefix = {span.inputs.digest: span.inputs for span in request.images if span.offset < request.both_ways_prefix}
    together = sum(inputs.num_tokens for inputs in prefix.values())
    if together > max_image_tokens:
        raise InvalidRequestError(
            f"The images take {together} tokens, all at once in this model; the encoder cache holds "
            f"{max_image_tokens}. Send fewer images.",
            param="messages",
        )
    max_tokens = room if max_tokens is None else max_tokens
    # The context is planned for steps of the budget; an atomic span that is longer holds more of a window's blocks.
    needed = blocks.most_for(prompt_len + max_tokens, request.longest_atomic_span)
    if needed > blocks.num_blocks:
        raise ContextLengthError(
            f"The request takes {needed} blocks of the KV cache, which has {blocks.num_blocks}. Send a smaller image "
            "or lower max_tokens.",
            param="messages",
        )
    return max_tokens
