"""`y = x Wᵀ + b` with the weight packed once for all batches: for the layers of the decoder."""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

from vlm_serve.kernels import cpp_library


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


class PanelLinear:
    """The weight in panels for the C++ operator of `cpu.cpp`: bfloat16 on a CPU that multiplies pairs of it.

    A row's result does not depend on the rows beside it.
    """

    COLUMNS = 64
    """Outputs in a panel."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.out_features, in_features = weight.shape
        missing = -self.out_features % self.COLUMNS
        filled = F.pad(weight, (0, 0, 0, missing)) if missing else weight  # padding by nothing would copy, too
        self.panels = filled.view(-1, self.COLUMNS, in_features // 2, 2).transpose(1, 2).contiguous()
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._run(torch.ops.vlm_serve.panel_linear, x, self.out_features)

    @property
    def can_gate(self) -> bool:
        """Whether each half of the outputs has panels of its own."""
        return self.out_features % (2 * self.COLUMNS) == 0

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., in]` -> the SiLU of the first half of the outputs times the other half, `[..., out / 2]`: to the
        bit what two operators give, without the way through memory between them.
        """
        return self._run(torch.ops.vlm_serve.panel_silu_and_mul, x, self.out_features // 2)

    def _run(self, operator: Callable[..., None], x: torch.Tensor, width: int) -> torch.Tensor:
        out = x.new_empty(*x.shape[:-1], width)
        operator(out.view(-1, width), x.reshape(-1, x.shape[-1]).contiguous(), self.panels, self.bias)
        return out

    @staticmethod
    def takes(weight: torch.Tensor) -> bool:
        """Whether the operator was built for this machine and computes in this dtype and width."""
        if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or weight.shape[1] % 2:
            return False
        return cpp_library.load() and hasattr(torch.ops.vlm_serve, "panel_linear")


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
