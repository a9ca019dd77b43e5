"""`ServedModel`: what a request's `model` may name. Serves the server, and the offline class where it speaks as one."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_serve.families.base import ModelFamily
from vlm_serve.lora.store import AdapterStore


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What `model` may name: the base model, or an adapter on it (`parent` is then the base).

    `notice` is what every answer about an image must say of the model itself.
    """

    id: str
    root: str
    parent: str | None
    digest: str
    max_model_len: int
    max_tokens_per_image: int
    notice: str | None
    created: int


def served_models(
    name: str, folder: Path, family: ModelFamily, store: AdapterStore, max_model_len: int
) -> Iterator[ServedModel]:
    now = int(time.time())
    base = ServedModel(
        id=name,
        root=name,
        parent=None,
        digest=family.model_digest,
        max_model_len=max_model_len,
        max_tokens_per_image=family.max_tokens_per_image,
        notice=family.notice,
        created=now,
    )
    yield base
    for adapter in store.adapters:
        yield replace(base, id=adapter.name, parent=name, digest=adapter.digest)
