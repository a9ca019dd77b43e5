"""Batches of studies for fine-tuning: which, in what order, in which view of their images, and as which tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch

from vlm_serve.training.examples import Example

FeatureArray = npt.NDArray[np.floating]
"""`[views, images, tokens_per_image, in_features]`; a `np.memmap` is read row by row."""

_BUCKET = 16
"""Batches whose studies are sorted by length together: more waste less on padding and shuffle less."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Studies side by side, padded on the right: under a causal mask nothing real sees the padding.

    token_ids int64 `[B, T]`, with 0 for placeholders and padding; image_mask bool `[B, T]`; answer_mask bool
    `[B, T]` at the positions that predict a token of the answer; labels int64 `[answer tokens]`; features float32
    `[images, tokens_per_image, in_features]`, in the order of the placeholders; lengths int64 `[B]`.
    """

    token_ids: torch.Tensor
    image_mask: torch.Tensor
    answer_mask: torch.Tensor
    labels: torch.Tensor
    features: torch.Tensor
    lengths: torch.Tensor

    @property
    def answer_tokens(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Batch":
        return replace(self, **{entry.name: getattr(self, entry.name).to(device) for entry in fields(self)})


def epoch_batches(
    examples: Sequence[Example], views: int, batch_size: int, seed: int, epoch: int
) -> Iterator[tuple[list[int], list[int]]]:
    """One epoch: every example once, as the indices of each batch and the view drawn for each of its studies.

    Batches are of like lengths and in random order; a function of the arguments alone.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(examples))
    drawn = rng.integers(0, views, len(examples))
    batches = []
    for start in range(0, len(order), _BUCKET * batch_size):
        bucket = sorted(order[start : start + _BUCKET * batch_size], key=lambda i: len(examples[i].token_ids))
        batches += [bucket[first : first + batch_size] for first in range(0, len(bucket), batch_size)]
    for number in rng.permutation(len(batches)):
        indices = [int(index) for index in batches[number]]
        yield indices, [int(drawn[index]) for index in indices]


def plain_batches(examples: Sequence[Example], batch_size: int) -> Iterator[list[int]]:
    """Every example once, by length."""
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].token_ids))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def collate(examples: Sequence[Example], views: Sequence[int], features: FeatureArray) -> Batch:
    """The tensors of some studies.

    Args:
        views: of each study, all of whose images are taken in it.
        features: of all studies.
    """
    lengths = [len(example.token_ids) for example in examples]
    shape = (len(examples), max(lengths))
    token_ids = torch.zeros(shape, dtype=torch.int64)
    image_mask, answer_mask = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    labels: list[int] = []
    for row, example in enumerate(examples):
        token_ids[row, : lengths[row]] = torch.tensor(example.token_ids)
        for offset in example.image_offsets:
            image_mask[row, offset : offset + features.shape[2]] = True
        answer_mask[row, example.answer_start - 1 : lengths[row] - 1] = True
        labels += example.token_ids[example.answer_start :]
    token_ids.masked_fill_(image_mask, 0)  # a placeholder may lie past the vocabulary
    rows = [
        features[view, image] for example, view in zip(examples, views, strict=True) for image in example.image_rows
    ]
    return Batch(
        token_ids,
        image_mask,
        answer_mask,
        torch.tensor(labels),
        torch.from_numpy(np.stack(rows).astype(np.float32)),
        torch.tensor(lengths),
    )
