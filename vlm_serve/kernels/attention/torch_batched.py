"""Paged causal attention as a few batched torch operations, for a CPU without a compiler.

Pages are gathered and padded, so it costs memory; sequences of like length are taken together.
"""

import torch

SCORES_BUDGET = 16 * 1024**2
"""How many padded scores one group of sequences may have: 64 MiB in float32."""


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
    """As `dispatch.paged_attention`; computes in float32, and the output of padding tokens is zero."""
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    for group in _groups(kv_lengths.tolist(), query_start.diff().tolist(), query.shape[1]):
        _attend(query, key_cache, value_cache, block_tables, kv_lengths, query_start, group, scale, window, out)
    return out


def _groups(kv_lengths: list[int], query_lengths: list[int], num_heads: int) -> list[list[int]]:
    """Sequences with tokens to compute, in groups whose padded scores fit the budget."""
    groups: list[list[int]] = []
    most_queries = most_keys = 0
    order = sorted(range(len(kv_lengths)), key=lambda sequence: (query_lengths[sequence], kv_lengths[sequence]))
    for sequence in order:
        if query_lengths[sequence] == 0:
            continue
        most_queries = max(most_queries, query_lengths[sequence])
        most_keys = max(most_keys, kv_lengths[sequence])
        if groups and (len(groups[-1]) + 1) * most_queries * most_keys * num_heads <= SCORES_BUDGET:
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
            most_queries, most_keys = query_lengths[sequence], kv_lengths[sequence]
    return groups


def _attend(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lengths: torch.Tensor,
    query_start: torch.Tensor,
    group: list[int],
    scale: float,
    window: int | None,
    out: torch.Tensor,
) -> None:
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, block_size = key_cache.shape[1:3]
    members = torch.tensor(group, device=query.device)
    starts, lengths = query_start[members].long(), kv_lengths[members].long()
    counts = query_start[members + 1].long() - starts
    first_positions = lengths - counts
    first_seen = torch.zeros_like(lengths) if window is None else (first_positions - window + 1).clamp(min=0)
    first_block = int(first_seen.min()) // block_size
    blocks = block_tables[members, first_block : -(-int(lengths.max()) // block_size)].long()
    blocks = blocks.clamp(0, key_cache.shape[0] - 1)
    num_keys = blocks.shape[1] * block_size
    key_index = torch.arange(first_block * block_size, first_block * block_size + num_keys, device=query.device)
    # Memory past a sequence's length was never written, and what lies before its windows may be another's by now: it
    # may hold NaN, which a weight of zero would not cancel.
    foreign = ((key_index >= lengths[:, None]) | (key_index < first_seen[:, None]))[:, None, :, None]

    def gather(cache: torch.Tensor) -> torch.Tensor:
        pages = cache[blocks].float().transpose(1, 2).reshape(len(group), num_kv_heads, num_keys, head_dim)
        return pages.masked_fill(foreign, 0.0)

    offset = torch.arange(int(counts.max()), device=query.device)
    present = offset < counts[:, None]
    token = (starts[:, None] + offset).clamp(max=query.shape[0] - 1)
    positions = first_positions[:, None, None] + offset[:, None]
    hidden = key_index > positions
    if window is not None:
        hidden |= key_index <= positions - window
    shape = (len(group), len(offset), num_kv_heads, num_heads // num_kv_heads, head_dim)
    padded = query[token].float().reshape(shape).transpose(1, 2).flatten(2, 3)
    scores = (padded @ gather(key_cache).transpose(2, 3)).unflatten(2, (len(offset), -1)).mul_(scale)
    weights = scores.masked_fill_(hidden[:, None, :, None, :], -torch.inf).softmax(dim=-1).flatten(2, 3)
    attended = (weights @ gather(value_cache)).unflatten(2, (len(offset), -1)).transpose(1, 2).flatten(2, 3)
    out[token[present]] = attended[present].to(out.dtype)
