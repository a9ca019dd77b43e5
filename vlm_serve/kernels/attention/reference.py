"""Paged causal attention in plain torch: the specification, and the oracle of every other implementation.

It loops over sequences and computes in float64; nothing serves requests with it.
"""

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
) -> torch.Tensor:
    """As `dispatch.paged_attention`; the output of padding tokens is zero."""
    num_heads = query.shape[1]
    num_kv_heads, block_size = key_cache.shape[1:3]
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    for sequence, length in enumerate(kv_lengths.tolist()):
        start, end = query_start[sequence : sequence + 2].tolist()
        positions = torch.arange(length - (end - start), length, device=query.device)
        window_of_all = length if window is None else window
        first = max(0, length - (end - start) - window_of_all + 1)
        seen = torch.arange(first, length, device=query.device)
        blocks, offsets = block_tables[sequence, seen // block_size].long(), seen % block_size

        def keys_of(
            cache: torch.Tensor, blocks: torch.Tensor = blocks, offsets: torch.Tensor = offsets
        ) -> torch.Tensor:
            by_head = cache[blocks, :, offsets].double().transpose(0, 1)
            return by_head.repeat_interleave(num_heads // num_kv_heads, dim=0)

        scores = query[start:end].double().transpose(0, 1) @ keys_of(key_cache).transpose(1, 2) * scale
        hidden = (seen > positions[:, None]) | (seen <= positions[:, None] - window_of_all)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        out[start:end] = (weights @ keys_of(value_cache)).transpose(0, 1).to(query.dtype)
    return out
