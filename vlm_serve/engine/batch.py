"""`ScheduledBatch`: one step's work as plain data, from the scheduler to the model runner.

It holds no `Sequence`, so that it can cross to another process, and so that the next batch can be
scheduled while this one runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from vlm_serve.types import ImageInputs, SamplingParams, TokenLogprobs


class ImageKey(NamedTuple):
    """The key of an image's embeddings: its digest, its tenant's salt, and the digest of the adapter if that changes
    the tower or the projector. Under an adapter of the decoder alone an image's embeddings are the base model's.
    """

    image: str
    salt: str
    adapter: str | None = None


TableEntry = tuple[int, ...]
"""An entry of a block table: the blocks of some tokens, one of each group of layers, or `NULL_BLOCK`."""

NULL_BLOCK = -1
"""Stands for a block that a window has passed and that was given back; no kernel reads through it."""


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """Where one image's placeholders lie in a sequence: `[offset, offset + length)`; `grid` is its inputs'."""

    key: ImageKey
    offset: int
    length: int
    grid: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class NewRow:
    """A sequence that takes a row of the batch, for good until it ends or is preempted.

    `token_ids` are the prompt and, after a preemption, what was generated before it. `draw` is the seed
    of its random draws; `adapter_slot` is None for the base model. `atomic_spans` are the request's.
    """

    row: int
    token_ids: tuple[int, ...]
    prompt_len: int
    images: tuple[PlacedImage, ...]
    sampling: SamplingParams
    draw: int
    adapter_slot: int | None
    eos_token_ids: tuple[int, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    grammar: str | None = None
    pooling: bool = False
    atomic_spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step over S sequences.

    Args:
        rows: int64 `[S]`, the row of each.
        starts: int64 `[S]`, tokens whose keys and values are already in the cache.
        counts: int64 `[S]`, tokens granted now.
        samples: bool `[S]`, whether the last granted token is the last one known, so that the next is drawn.
        new_rows: the sequences among them that the runner has not seen.
        new_blocks: for each of the S, the entries added to its block table in this step.
        encode: images to encode now, by key; the adapter of one that has one is on the device, or in `load_adapters`.
        evict_images: embeddings to drop first.
        load_adapters: `(slot, digest)` to copy to the device first.
        drafts: for each of the S, the guessed tokens at the end of those granted; empty where none is guessed. They
            count in `counts` and lie past the known tokens.
    """

    rows: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    samples: np.ndarray
    new_rows: tuple[NewRow, ...] = ()
    new_blocks: tuple[tuple[TableEntry, ...], ...] = ()
    encode: tuple[tuple[ImageKey, ImageInputs], ...] = ()
    evict_images: tuple[ImageKey, ...] = ()
    load_adapters: tuple[tuple[int, str], ...] = ()
    drafts: tuple[tuple[int, ...], ...] = ()

    @property
    def num_tokens(self) -> int:
        return int(self.counts.sum())


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an answer cannot go on, in words for the caller. `param` is the field of the request that is to blame; None:
    the server is.
    """

    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the model runner made of a batch.

    Args:
        tokens: for each sequence with `batch.samples`, in order, the tokens drawn: one, and one more for each of its
            drafts that was right. None for a sequence that pools or failed.
        logprobs: parallel to `tokens`, with nothing for a sequence that did not ask; empty where none did.
        prompt_logprobs: for each of the S, the entries of those positions of its prompt that this step gives them for,
            nothing for one that did not ask; empty where none did.
        embeddings: by row, float32 `[hidden_size]`, of the sequences with `batch.samples` that pool.
        failed: by row, why an answer cannot go on; such a sequence has no tokens.
        encoder_seconds: that the images of the batch took.
    """

    tokens: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[TokenLogprobs, ...], ...] = ()
    prompt_logprobs: tuple[tuple[TokenLogprobs, ...], ...] = ()
    embeddings: Mapping[int, np.ndarray] = field(default_factory=dict)
    failed: Mapping[int, Failure] = field(default_factory=dict)
    encoder_seconds: float = 0.0
