"""Normalisation layers of the decoder."""

import torch
import torch.nn.functional as F
from torch import nn

from vlm_serve.kernels import dispatch


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis (arXiv 1910.07467), computed in at least float32.

    Args:
        offset: added to the weight; Gemma's are around zero and have 1.
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dispatch.rms_norm(x, self.weight, self.eps, self.offset)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Adds x to `residual` in place and returns the norm of the sum."""
        return dispatch.add_rms_norm(x, residual, self.weight, self.eps, self.offset)


class LayerNorm(nn.Module):
    """Layer norm over the last axis (arXiv 1607.06450)."""

    def __init__(self, size: int, eps: float, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False) if bias else None
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Adds x to `residual` in place and returns the norm of the sum."""
        return self(residual.add_(x))  # type: ignore[no-any-return]


Norm = RMSNorm | LayerNorm
