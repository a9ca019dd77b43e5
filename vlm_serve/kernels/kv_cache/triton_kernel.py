"""Writing keys and values into the paged cache on a GPU: one Triton program a token."""

import torch
import triton
import triton.language as tl


@triton.jit
def write_kv_cache_kernel(
    key_ptr,
    value_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slot_mapping_ptr,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    HEAD_DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Grid `(T,)`; `PADDED` is a power of two of at least `KV_HEADS * HEAD_DIM`."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    if slot < 0:
        return
    element = tl.arange(0, PADDED)
    used = element < KV_HEADS * HEAD_DIM
    head = element // HEAD_DIM
    dim = element % HEAD_DIM
    target = ((slot // BLOCK_SIZE * KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM + dim
    key = tl.load(key_ptr + token * key_token_stride + head * key_head_stride + dim, mask=used)
    value = tl.load(value_ptr + token * value_token_stride + head * value_head_stride + dim, mask=used)
    tl.store(key_cache_ptr + target, key, mask=used)
    tl.store(value_cache_ptr + target, value, mask=used)


def write_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """As `dispatch.write_kv_cache`."""
    num_tokens, num_kv_heads, head_dim = key.shape
    assert key_cache.is_contiguous()
    assert value_cache.is_contiguous()
    assert key.stride(2) == value.stride(2) == 1
    write_kv_cache_kernel[(num_tokens,)](
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        HEAD_DIM=head_dim,
        KV_HEADS=num_kv_heads,
        BLOCK_SIZE=key_cache.shape[2],
        PADDED=triton.next_power_of_2(num_kv_heads * head_dim),
        num_warps=4,
    )
