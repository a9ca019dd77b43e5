"""`y = x Wᵀ + b` with the weight packed once for all batches: for the layers of the decoder."""

from typing import Protocol

import torch
import torch.nn.functional as F


class PackedLinear(Protocol):
    """A linear layer whose weight has taken its final form."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., in]` -> a new tensor `[..., out]` of the same dtype."""
        ...


class PlainLinear:
    """The weight as it is, for BLAS."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class OneDnnLinear:
    """The weight in oneDNN's blocked layout, float32 or bfloat16 on a CPU; the plain weight is not kept."""

    MIN_ROWS = 4
    """oneDNN takes a slower kernel for fewer rows; padding to four is cheaper (docs/performance.md)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.out_features = weight.shape[0]
        self.packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        missing = self.MIN_ROWS - rows.shape[0]
        if missing > 0:
            rows = F.pad(rows, (0, 0, 0, missing))
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        if missing > 0:
            out = out[:-missing]
        return out.view(*x.shape[:-1], self.out_features)

    @staticmethod
    def takes(weight: torch.Tensor) -> bool:
        """Whether oneDNN computes in this dtype on this machine."""
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        if weight.dtype == torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return weight.dtype == torch.float32
