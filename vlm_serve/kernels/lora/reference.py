"""The low-rank update of LoRA (arXiv 2106.09685) for a batch that mixes adapters and ranks, in plain torch."""

from collections.abc import Sequence

import torch

Segment = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""The tokens of one adapter, int64 `[n]`, its `A [r, in]` and its `B [out, r]` with the scaling folded in."""


def apply_lora(out: torch.Tensor, x: torch.Tensor, segments: Sequence[Segment]) -> None:
    """As `dispatch.apply_lora`."""
    for token_index, a, b in segments:
        out.index_add_(0, token_index, x[token_index] @ a.T @ b.T)
