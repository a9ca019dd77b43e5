"""Rotary position embedding on a CPU by the C++ operator of `cpu.cpp`."""

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As `dispatch.rotate`, float32 or bfloat16; `cpp_library.load()` comes first."""
    out = torch.empty(x.shape, dtype=x.dtype)
    torch.ops.vlm_serve.rotate(out, x, cos, sin)
    return out
