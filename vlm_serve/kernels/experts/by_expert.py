"""Experts one after another, each on all of its tokens at once: on a CPU, and for weights in any form."""

from collections.abc import Callable

import torch

Compute = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""`compute(expert, rows [n, in], tokens)` -> `[n, out]` of the n tokens, int64, that the expert has."""


def experts(
    x: torch.Tensor, expert_index: torch.Tensor, expert_weights: torch.Tensor, compute: Compute
) -> torch.Tensor:
    """As `dispatch.experts`."""
    by_expert, order = expert_index.flatten().sort(stable=True)
    present, counts = by_expert.unique_consecutive(return_counts=True)
    # Experts change neither width nor dtype: theirs is the width of the stream.
    rows = x.new_empty(expert_index.numel(), x.shape[1])
    for expert, chosen in zip(present.tolist(), order.split(counts.tolist()), strict=True):
        tokens = chosen // expert_index.shape[1]
        rows[chosen] = compute(expert, x[tokens], tokens)
    return weigh(rows, expert_weights)


def weigh(rows: torch.Tensor, expert_weights: torch.Tensor) -> torch.Tensor:
    """rows `[T * k, hidden]`, the k of each token together -> their sum by `expert_weights [T, k]`, `[T, hidden]`.

    It is taken in the order of the k, so that a token's result does not depend on the tokens beside it.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    weighted = rows.unflatten(0, expert_weights.shape).to(dtype) * expert_weights[..., None].to(dtype)
    total: torch.Tensor = weighted.sum(1)
    return total.to(rows.dtype)
