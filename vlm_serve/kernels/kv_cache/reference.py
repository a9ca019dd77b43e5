"""Writing keys and values into the paged cache, in plain torch: the specification, and the path without a compiler."""

import torch


def write_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """As `dispatch.write_kv_cache`."""
    block_size = key_cache.shape[2]
    written = slot_mapping >= 0
    slots = slot_mapping[written]
    block, offset = slots // block_size, slots % block_size
    key_cache[block, :, offset] = key[written]
    value_cache[block, :, offset] = value[written]
