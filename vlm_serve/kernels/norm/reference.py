"""Root-mean-square norm (arXiv 1910.07467) in torch: the specification."""

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """As `dispatch.rms_norm`."""
    if not offset:
        return F.rms_norm(x, weight.shape, None, eps) * weight
    wide = torch.promote_types(x.dtype, torch.float32)  # a sum in bfloat16 would lose half of the weight's bits
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide) + offset, eps).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> torch.Tensor:
    """As `dispatch.add_rms_norm`."""
    return rms_norm(residual.add_(x), weight, eps, offset)
