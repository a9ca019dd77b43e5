"""Requests for tests of the scheduler's books: no model, so tokens and pixels are arbitrary."""

import numpy as np

from vlm_serve.types import ImageInputs, ImageSpan, Request, SamplingParams


def image(seed: int, num_tokens: int = 4, *, attends_both_ways: bool = False) -> ImageInputs:
    pixels = np.full((3, 2, 2), seed, dtype=np.float32)
    tensors = {"pixel_values": pixels}
    return ImageInputs.create(tensors, (1, num_tokens), num_tokens, attends_both_ways=attends_both_ways)


def request(
    name,
    tokens,
    *,
    images=(),
    max_tokens=4,
    adapter=None,
    salt="",
    eos=(),
    tenant="",
    priority=0,
    pooling=False,
    bad_word_ids=(),
    grammar=None,
    both_ways_prefix=0,
    **sampling,
) -> Request:
    """`tokens` is a prompt or its length; `images` are (offset, ImageInputs); the rest is of `SamplingParams`."""
    token_ids = tuple(range(tokens)) if isinstance(tokens, int) else tuple(tokens)
    return Request(
        request_id=str(name),
        token_ids=token_ids,
        sampling=SamplingParams(max_tokens=max_tokens, **({"temperature": 0} | sampling)),
        images=tuple(ImageSpan(offset, inputs) for offset, inputs in images),
        adapter=adapter,
        cache_salt=salt,
        tenant=tenant,
        priority=priority,
        eos_token_ids=eos,
        bad_word_ids=bad_word_ids,
        grammar=grammar,
        pooling=pooling,
        both_ways_prefix=both_ways_prefix,
    )
