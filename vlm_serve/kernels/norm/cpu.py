"""Root-mean-square norm on a CPU by the C++ operators of `cpu.cpp`."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """As `dispatch.rms_norm`, float32 or bfloat16; `cpp_library.load()` comes first."""
    x = x.contiguous()
    out = torch.empty_like(x)
    torch.ops.vlm_serve.rms_norm(out, x, weight, eps, offset)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
) -> torch.Tensor:
    """As `dispatch.add_rms_norm`, float32 or bfloat16; `cpp_library.load()` comes first."""
    x = x.contiguous()
    out = torch.empty_like(x)
    torch.ops.vlm_serve.add_rms_norm(out, residual, x, weight, eps, offset)
    return out
