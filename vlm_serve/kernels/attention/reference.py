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
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    spans: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `dispatch.paged_attention`; the output of padding tokens is zero."""
    num_heads = query.shape[1]
    num_kv_heads, block_size = key_cache.shape[1:3]
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    for sequence, length in enumerate(kv_lengths.tolist()):
        start, end = query_start[sequence : sequence + 2].tolist()
        if start == end:
            continue
        positions = torch.arange(length - (end - start), length, device=query.device)[:, None]
        keys = torch.arange(length, device=query.device)
        sees = keys <= positions
        if window is not None:
            sees &= keys > positions - window
        if spans is not None:
            begins, ends = spans[start:end, :, None].unbind(1)
            sees |= (keys >= begins) & (keys < ends)
        seen = sees.any(0).nonzero()[:, 0]
        blocks, offsets = block_tables[sequence, seen // block_size].long(), seen % block_size

        def keys_of(
            cache: torch.Tensor, blocks: torch.Tensor = blocks, offsets: torch.Tensor = offsets
        ) -> torch.Tensor:
            by_head = cache[blocks, :, offsets].double().transpose(0, 1)
            return by_head.repeat_interleave(num_heads // num_kv_heads, dim=0)

        scores = query[start:end].double().transpose(0, 1) @ keys_of(key_cache).transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        if alibi_slopes is not None:
            bias = alibi_bias(alibi_slopes, torch.arange(length, device=query.device)).double().T
            scores = scores + scale * (bias[:, None, seen] - bias[:, positions])
        weights = scores.masked_fill(~sees[:, seen], -torch.inf).softmax(dim=-1)
        out[start:end] = (weights @ keys_of(value_cache)).transpose(0, 1).to(query.dtype)
    return out


def alibi_bias(slopes: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The bias that ALiBi gives integer positions `[...]` by each head's slope, float32 `[..., heads]`.

    Slope, position and product are each rounded to bfloat16 in models of every type, because transformers has it so for
    Falcon (`build_alibi_tensor`), whose checkpoints are the ones with ALiBi. What a key gets over another is then no
    function of their distance: past position 256 neighbours have the same bias, and far ones differ in steps.
    """
    return (slopes.bfloat16() * positions[..., None].bfloat16()).float()
