"""Paged causal attention on a GPU: one Triton kernel for prefill chunks and decodes together.

A program takes a tile of one sequence's query tokens with all query heads of one key/value head as its rows, and
walks the keys with an online softmax (arXiv 2205.14135; after "The Anatomy of a Triton Attention Kernel",
arXiv 2511.11581). Nothing on the host waits for the device, so that a step can be captured in a CUDA graph.
"""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
"""The softmax is taken to base 2."""


@triton.jit
def as_bfloat16(x):
    """float32 x, not negative, rounded to what bfloat16 has: by its bits, as the interpreter's cast cuts them off."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def alibi_bias(slope, position):
    """What ALiBi gives an integer position by a slope that was rounded, see reference.py."""
    return as_bfloat16(slope * as_bfloat16(position.to(tl.float32)))


@triton.jit
def paged_attention_kernel(
    out_ptr,
    query_ptr,
    key_cache_ptr,
    value_cache_ptr,
    block_tables_ptr,
    kv_lengths_ptr,
    query_start_ptr,
    alibi_slopes_ptr,
    spans_ptr,
    num_sequences,
    scale_log2,
    query_token_stride,
    query_head_stride,
    block_table_stride,
    cache_block_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP_LOG2: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """Grid `(T // TILE_TOKENS + S, kv_heads)`: sequence s owns the tiles from `query_start[s] // TILE_TOKENS + s`.

    `WINDOW` is how many keys a query sees, 0 for all before it. Scores are to base 2: `scale_log2` and `SOFTCAP_LOG2`,
    0 for no cap, have a factor of log2 e. `alibi_slopes_ptr` and `spans_ptr` may be None.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    num_heads = tl.num_programs(1) * GROUP

    low = 0
    high = num_sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start_ptr + middle) // TILE_TOKENS + middle <= tile:
            low = middle + 1
        else:
            high = middle
    sequence = low - 1
    start = tl.load(query_start_ptr + sequence)
    granted = tl.load(query_start_ptr + sequence + 1) - start
    first_token = (tile - (start // TILE_TOKENS + sequence)) * TILE_TOKENS
    if first_token >= granted:
        return

    row = tl.arange(0, TILE_ROWS)
    token = first_token + row // GROUP
    head = kv_head * GROUP + row % GROUP
    # Rows past TILE_TOKENS * GROUP only fill up a power of two.
    row_used = (row < TILE_TOKENS * GROUP) & (token < granted)
    dim = tl.arange(0, PADDED_DIM)
    dim_used = dim < HEAD_DIM
    used = row_used[:, None] & dim_used[None, :]
    flat_token = (start + token).to(tl.int64)
    query_offset = flat_token * query_token_stride + head * query_head_stride
    query = tl.load(query_ptr + query_offset[:, None] + dim[None, :], mask=used, other=0.0)

    length = tl.load(kv_lengths_ptr + sequence)
    position = length - granted + token
    # A row sees the keys from `seen_from` to before `seen_to`: its span, if it has one, holds it.
    seen_from = position - WINDOW + 1
    seen_to = position + 1
    last_token = tl.minimum(first_token + TILE_TOKENS, granted) - 1
    visible = length - granted + last_token + 1
    if spans_ptr is not None:
        span_begin = tl.load(spans_ptr + 2 * flat_token, mask=row_used, other=0)
        span_end = tl.load(spans_ptr + 2 * flat_token + 1, mask=row_used, other=0)
        seen_from = tl.where(span_end > 0, tl.minimum(seen_from, span_begin), seen_from)
        seen_to = tl.maximum(seen_to, span_end)
        visible = tl.maximum(visible, tl.load(spans_ptr + 2 * (start + last_token) + 1))
    if alibi_slopes_ptr is not None:
        slope = as_bfloat16(tl.load(alibi_slopes_ptr + head, mask=row_used, other=0.0))[:, None]
        query_bias = alibi_bias(slope, position[:, None])
    table_ptr = block_tables_ptr + tl.cast(sequence, tl.int64) * block_table_stride
    head_offset = kv_head * BLOCK_SIZE * HEAD_DIM

    highest = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    attended = tl.zeros([TILE_ROWS, PADDED_DIM], tl.float32)
    first_key = 0
    first_seen = 0
    if WINDOW > 0:
        first_seen = tl.maximum(length - granted + first_token - WINDOW + 1, 0)
        if spans_ptr is not None:
            first_span = spans_ptr + 2 * (start + first_token)
            first_seen = tl.where(tl.load(first_span + 1) > 0, tl.minimum(first_seen, tl.load(first_span)), first_seen)
        # Tiles of keys begin at the same places for every tile of queries, so that a cut changes no bit.
        first_key = first_seen // TILE_KEYS * TILE_KEYS
    while first_key < visible:
        key_position = first_key + tl.arange(0, TILE_KEYS)
        key_used = (key_position >= first_seen) & (key_position < visible)
        block = tl.load(table_ptr + key_position // BLOCK_SIZE, mask=key_used, other=0).to(tl.int64)
        offset = block * cache_block_stride + head_offset + (key_position % BLOCK_SIZE) * HEAD_DIM
        # Masked loads: cache memory that was never written may hold NaN, which a weight of zero would not cancel.
        keys = tl.load(
            key_cache_ptr + offset[None, :] + dim[:, None], mask=key_used[None, :] & dim_used[:, None], other=0.0
        )
        values = tl.load(
            value_cache_ptr + offset[:, None] + dim[None, :], mask=key_used[:, None] & dim_used[None, :], other=0.0
        )
        scores = tl.dot(query, keys, input_precision="ieee") * scale_log2
        if SOFTCAP_LOG2 > 0:
            # tanh, which the interpreter has not; beyond the range of exp2 it is 1 - 2 / inf or 1 - 2 / 1.
            scores = SOFTCAP_LOG2 * (1 - 2 / (1 + tl.exp2(scores * (2 * LOG2_E / SOFTCAP_LOG2))))
        if alibi_slopes_ptr is not None:
            scores += (alibi_bias(slope, key_position[None, :]) - query_bias) * scale_log2
        # Without a window unused rows see key 0 as well, so that no row's maximum stays -inf.
        seen = key_position[None, :] < seen_to[:, None]
        if WINDOW > 0:
            seen = seen & (key_position[None, :] >= seen_from[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        now_highest = tl.maximum(highest, tl.max(scores, axis=1))
        base = now_highest
        if WINDOW > 0:
            # A row may see none of the first keys yet: all of its weights are 0 then, not exp2(-inf + inf).
            base = tl.where(now_highest == float("-inf"), 0.0, now_highest)
        weights = tl.exp2(scores - base[:, None])
        rescale = tl.exp2(highest - base)
        total = total * rescale + tl.sum(weights, axis=1)
        attended = attended * rescale[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        highest = now_highest
        first_key += TILE_KEYS

    out_offset = (flat_token * num_heads + head) * HEAD_DIM
    if WINDOW > 0:
        total = tl.where(total == 0.0, 1.0, total)  # of rows that are not used
    result = attended / total[:, None]
    tl.store(out_ptr + out_offset[:, None] + dim[None, :], result.to(out_ptr.dtype.element_ty), mask=used)


def tile_sizes(
    group: int,
    head_dim: int,
    block_size: int,
    max_query_len: int,
    dtype: torch.dtype,
    window: int | None = None,
    softcap: float | None = None,
) -> dict[str, int | float]:
    """The kernel's compile-time constants for a model and the longest grant of a batch."""
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    # Exact float32 products are unrolled to single multiplications, which takes the compiler long for a large tile.
    exact = dtype == torch.float32
    rows = max(16 if max_query_len == 1 or exact else 64, triton.next_power_of_2(group))
    return {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "WINDOW": window or 0,
        "SOFTCAP_LOG2": (softcap or 0.0) * LOG2_E.value,
        "TILE_TOKENS": rows // group,
        "TILE_ROWS": rows,
        # Keys and values of a tile, twice buffered, stay within the shared memory of a small GPU.
        "TILE_KEYS": 32 if padded_dim > 128 or exact else 64,
        "PADDED_DIM": padded_dim,
    }


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lengths: torch.Tensor,
    query_start: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    spans: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `dispatch.paged_attention`; the output of padding tokens is zero."""
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, block_size = key_cache.shape[1:3]
    assert key_cache.is_contiguous()
    assert value_cache.is_contiguous()
    assert query.stride(2) == 1
    assert spans is None or spans.is_contiguous()
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    sizes = tile_sizes(num_heads // num_kv_heads, head_dim, block_size, max_query_len, query.dtype, window, softcap)
    num_sequences = kv_lengths.shape[0]
    grid = (num_tokens // sizes["TILE_TOKENS"] + num_sequences, num_kv_heads)
    paged_attention_kernel[grid](
        out,
        query,
        key_cache,
        value_cache,
        block_tables,
        kv_lengths,
        query_start,
        alibi_slopes,
        spans,
        num_sequences,
        scale * LOG2_E.value,
        query.stride(0),
        query.stride(1),
        block_tables.stride(0),
        key_cache.stride(0),
        **sizes,
        num_warps=4,
        num_stages=2,
    )
    return out
