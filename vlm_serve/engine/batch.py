"""`ScheduledBatch`: one step's work as plain data, from the scheduler to the model runner.

It holds no `Sequence`, so that it can cross to another process, and so that the next batch can be
scheduled while this one runs.
"""

from dataclasses import dataclass

import numpy as np

from vlm_serve.types import ImageInputs, SamplingParams

ImageKey = tuple[str, str]
"""An image's digest and its tenant's salt: the key of its embeddings."""


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """Where one image's placeholders lie in a sequence: `[offset, offset + length)`."""

    key: ImageKey
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class NewRow:
    """A sequence that takes a row of the batch, for good until it ends or is preempted.

    `token_ids` are the prompt and, after a preemption, what was generated before it. `draw` is the seed
    of its random draws; `adapter_slot` is None for the base model.
    """

    row: int
    token_ids: tuple[int, ...]
    prompt_len: int
    images: tuple[PlacedImage, ...]
    sampling: SamplingParams
    draw: int
    adapter_slot: int | None


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step over S sequences.

    Args:
        rows: int64 `[S]`, the row of each.
        starts: int64 `[S]`, tokens whose keys and values are already in the cache.
        counts: int64 `[S]`, tokens granted now.
        samples: bool `[S]`, whether the last granted token is the last one known, so that the next is drawn.
        new_rows: the sequences among them that the runner has not seen.
        new_blocks: for each of the S, the blocks added to its table in this step.
        encode: images to encode now, by key.
        evict_images: embeddings to drop first.
        load_adapters: `(slot, digest)` to copy to the device first.
    """

    rows: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    samples: np.ndarray
    new_rows: tuple[NewRow, ...] = ()
    new_blocks: tuple[tuple[int, ...], ...] = ()
    encode: tuple[tuple[ImageKey, ImageInputs], ...] = ()
    evict_images: tuple[ImageKey, ...] = ()
    load_adapters: tuple[tuple[int, str], ...] = ()

    @property
    def num_tokens(self) -> int:
        return int(self.counts.sum())
