"""Root-mean-square norm by torch's fused operator: the path of a GPU.

It rounds once, where the specification rounds what the weight multiplies as well, for which torch has no one operator.
"""

import torch
import torch.nn.functional as F

from vlm_serve.kernels.norm import reference


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """As `dispatch.rms_norm`."""
    return reference.rms_norm(x, weight, eps, offset) if offset else F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> torch.Tensor:
    """As `dispatch.add_rms_norm`."""
    return rms_norm(residual.add_(x), weight, eps, offset)
