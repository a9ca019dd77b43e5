"""`ServedModel`: what a request's `model` may name. Serves the server, and the offline class where it speaks as one."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from vlm_serve.families.base import ModelFamily
from vlm_serve.lora.store import AdapterStore


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What `model` may name: the base model, or an adapter on it (`parent` is then the base).

    `notice` is what every answer about an image must say of the model itself. A model of text alone has 0
    `max_tokens_per_image`. `dtype` is that of weights and KV cache.
    """

    id: str
    root: str
    parent: str | None
    digest: str
    max_model_len: int
    min_tokens_per_image: int
    max_tokens_per_image: int
    dtype: str
    notice: str | None
    created: int


def served_models(
    name: str, family: ModelFamily, store: AdapterStore, max_model_len: int, dtype: str
) -> Iterator[ServedModel]:
    now = int(time.time())
    base = ServedModel(
        id=name,
        root=name,
        parent=None,
        digest=family.model_digest,
        max_model_len=max_model_len,
        min_tokens_per_image=family.min_tokens_per_image,
        max_tokens_per_image=family.max_tokens_per_image,
        dtype=dtype,
        notice=family.notice,
        created=now,
    )
    yield base
    for adapter in store.adapters:
        yield replace(base, id=adapter.name, parent=name, digest=adapter.digest)
