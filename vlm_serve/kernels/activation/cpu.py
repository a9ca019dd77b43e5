"""The gated SiLU on a CPU by the C++ operator of `cpu.cpp`."""

import torch


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As `dispatch.silu_and_mul`, float32 or bfloat16; `cpp_library.load()` comes first."""
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    torch.ops.vlm_serve.silu_and_mul(out, gate_up)
    return out
