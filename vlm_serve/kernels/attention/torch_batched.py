"""Paged causal attention as a few batched torch operations, for a CPU without a compiler.

Pages are gathered and padded, so it costs memory; sequences of like length are taken together.
"""

from typing import NamedTuple

import torch

from vlm_serve.kernels.attention.reference import alibi_bias

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
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    spans: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `dispatch.paged_attention`; computes in float32, and the output of padding tokens is zero."""
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    for group in _groups(kv_lengths.tolist(), query_start.diff().tolist(), query.shape[1]):
        out_of_group, token = _attend(
            query,
            key_cache,
            value_cache,
            block_tables,
            kv_lengths,
            query_start,
            group,
            _Scoring(scale, window, softcap, alibi_slopes, spans),
        )
        out[token] = out_of_group.to(out.dtype)
    return out


class _Scoring(NamedTuple):
    """How a query's product with a key becomes a score, and which keys it sees; as in `paged_attention`."""

    scale: float
    window: int | None
    softcap: float | None
    alibi_slopes: torch.Tensor | None
    spans: torch.Tensor | None


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


def _seen(scoring: _Scoring, positions: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first key that each query sees and the one after its last, of the shape of its position and token."""
    begins, ends = torch.zeros_like(positions), positions + 1
    if scoring.window is not None:
        begins = (ends - scoring.window).clamp(min=0)
    if scoring.spans is not None:  # a query lies in its span, so what it sees has no gap
        span_begins, span_ends = scoring.spans[token].long().unbind(-1)
        begins = torch.where(span_ends > 0, begins.minimum(span_begins), begins)
        ends = ends.maximum(span_ends)
    return begins, ends


def _attend(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lengths: torch.Tensor,
    query_start: torch.Tensor,
    group: list[int],
    scoring: _Scoring,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the group's n tokens the result, float32 `[n, heads, head_dim]`, and which tokens of the batch they are."""
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, block_size = key_cache.shape[1:3]
    members = torch.tensor(group, device=query.device)
    starts, lengths = query_start[members].long(), kv_lengths[members].long()
    counts = query_start[members + 1].long() - starts
    offset = torch.arange(int(counts.max()), device=query.device)
    present = offset < counts[:, None]
    token = (starts[:, None] + offset).clamp(max=query.shape[0] - 1)
    positions = (lengths - counts)[:, None] + offset
    begins, ends = _seen(scoring, positions, token)
    first_seen = begins[:, 0]
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

    shape = (len(group), len(offset), num_kv_heads, num_heads // num_kv_heads, head_dim)
    padded = query[token].float().reshape(shape).transpose(1, 2).flatten(2, 3)
    scores = (padded @ gather(key_cache).transpose(2, 3)).unflatten(2, (len(offset), -1)).mul_(scoring.scale)
    if scoring.softcap is not None:
        scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    if scoring.alibi_slopes is not None:
        of_keys = alibi_bias(scoring.alibi_slopes, key_index).T.reshape(num_kv_heads, 1, -1, num_keys)
        of_queries = alibi_bias(scoring.alibi_slopes, positions).unflatten(2, (num_kv_heads, -1)).transpose(1, 2)
        scores.add_(of_keys - of_queries[..., None], alpha=scoring.scale)
    hidden = (key_index < begins[:, :, None]) | (key_index >= ends[:, :, None])
    weights = scores.masked_fill_(hidden[:, None, :, None, :], -torch.inf).softmax(dim=-1).flatten(2, 3)
    attended = (weights @ gather(value_cache)).unflatten(2, (len(offset), -1)).transpose(1, 2).flatten(2, 3)
    return attended[present], token[present]
