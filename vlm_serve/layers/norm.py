"""Normalisation layers of the decoder."""

import torch
from torch import nn

from vlm_serve.kernels import dispatch


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis (arXiv 1910.07467), computed in at least float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dispatch.rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Adds x to `residual` in place and returns the norm of the sum."""
        return dispatch.add_rms_norm(x, residual, self.weight, self.eps)
