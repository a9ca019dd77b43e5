"""The gated SiLU (SwiGLU, arXiv 2002.05202) in torch: the specification, and the path of a GPU."""

import torch
import torch.nn.functional as F


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As `dispatch.silu_and_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
