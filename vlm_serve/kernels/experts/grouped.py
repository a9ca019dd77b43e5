"""Gated experts by two grouped products, each of all experts at once, and nothing that the host waits for: on a GPU."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from vlm_serve.kernels.experts.by_expert import weigh
from vlm_serve.kernels.linear import PackedLinear, PlainLinear


class GroupedExperts:
    """The experts' weights end to end, `[E, 2 * inner, hidden]` and `[E, hidden, inner]`.

    The layers that they come from become views of these, so that no second copy is kept.

    Args:
        gate_up, down: each expert's two layers.
        gated: what gate and up side by side `[n, 2 * inner]` become, `[n, inner]`.
    """

    def __init__(
        self,
        gate_up: Sequence[PlainLinear],
        down: Sequence[PlainLinear],
        gated: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.gate_up = _stack(gate_up)
        self.down = _stack(down)
        self.gated = gated

    def __call__(self, x: torch.Tensor, expert_index: torch.Tensor, expert_weights: torch.Tensor) -> torch.Tensor:
        """x `[T, hidden]`, expert_index int64 `[T, k]` and expert_weights `[T, k]` -> `[T, hidden]`."""
        by_expert, order = expert_index.flatten().sort(stable=True)
        experts = torch.arange(len(self.gate_up), device=x.device)
        ends = torch.searchsorted(by_expert, experts, right=True, out_int32=True)
        rows = x[order // expert_index.shape[1]]
        rows = self.gated(F.grouped_mm(rows, self.gate_up.transpose(1, 2), offs=ends))
        rows = F.grouped_mm(rows, self.down.transpose(1, 2), offs=ends)
        return weigh(torch.empty_like(rows).index_copy_(0, order, rows), expert_weights)


def plain_layers(layers: Sequence[PackedLinear]) -> list[PlainLinear] | None:
    """The layers, if torch has the grouped product for them: bfloat16 on a GPU, rows of whole 16 bytes, no bias."""
    plain = [
        layer
        for layer in layers
        if isinstance(layer, PlainLinear)
        and layer.bias is None
        and layer.weight.device.type == "cuda"
        and layer.weight.dtype == torch.bfloat16
        and layer.weight.shape[1] % 8 == 0
    ]
    return plain if len(plain) == len(layers) else None


def _stack(layers: Sequence[PlainLinear]) -> torch.Tensor:
    weights = torch.stack([layer.weight for layer in layers])
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight = weight
    return weights
