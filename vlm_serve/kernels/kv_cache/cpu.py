"""Writing keys and values into the paged cache on a CPU by the C++ operator of `cpu.cpp`."""

import torch


def write_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """As `dispatch.write_kv_cache`, float32 or bfloat16; `cpp_library.load()` comes first."""
    torch.ops.vlm_serve.write_kv_cache(key, value, key_cache, value_cache, slot_mapping)
