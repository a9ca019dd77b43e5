"""Paged causal attention on a CPU by the C++ operator of `cpu.cpp`."""

import torch


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lengths: torch.Tensor,
    query_start: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    spans: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `dispatch.paged_attention`, float32 or bfloat16; `cpp_library.load()` comes first.

    A sequence's result is the same to the bit whatever else is in the batch and however its prefill is cut, spans
    being whole.
    """
    out = torch.empty(query.shape, dtype=query.dtype)
    torch.ops.vlm_serve.paged_attention(
        out,
        query,
        key_cache,
        value_cache,
        block_tables,
        kv_lengths,
        query_start,
        scale,
        window,
        softcap,
        alibi_slopes,
        spans,
    )
    return out
