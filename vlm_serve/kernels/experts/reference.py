"""A mixture of experts in plain torch: the specification, and the oracle of every other implementation.

It takes one token through one expert at a time, in float64; nothing serves requests with it.
"""

from collections.abc import Callable

import torch


def experts(
    x: torch.Tensor,
    expert_index: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """As `dispatch.experts` of gated MLPs with the weights `gate_up [E, 2 * inner, in]` and `down [E, out, inner]`."""
    out = torch.zeros(x.shape[0], down.shape[1], dtype=torch.float64, device=x.device)
    for token, (chosen, weights) in enumerate(zip(expert_index.tolist(), expert_weights.double(), strict=True)):
        for expert, weight in zip(chosen, weights, strict=True):
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            out[token] += weight * (down[expert].double() @ (activation(gate) * up))
    return out.to(x.dtype)
