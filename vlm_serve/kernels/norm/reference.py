"""Root-mean-square norm (arXiv 1910.07467) in torch: the specification, and the path of a GPU."""

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `dispatch.rms_norm`."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `dispatch.add_rms_norm`."""
    return rms_norm(residual.add_(x), weight, eps)
