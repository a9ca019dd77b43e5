"""The tensors of the paged KV cache, and the plan of how many blocks a memory budget holds."""

from dataclasses import dataclass

import torch

from vlm_serve.config import GIB
from vlm_serve.decoders.config import DecoderConfig
from vlm_serve.errors import ConfigurationError

CPU_DEFAULT = 1 * GIB
GPU_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class KVCache:
    """`keys` and `values` are `[layers, blocks, kv_heads, block_size, head_dim]`."""

    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def allocate(
        cls, config: DecoderConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> "KVCache":
        shape = (config.num_layers, num_blocks, config.num_kv_heads, block_size, config.head_dim)
        # Left as it is: no kernel reads what was not written.
        return cls(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))

    @property
    def num_blocks(self) -> int:
        return self.keys.shape[1]


def bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
    """What one token takes of the cache, keys and values of all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def plan_blocks(
    config: DecoderConfig, block_size: int, dtype: torch.dtype, device: torch.device, memory: int | None
) -> int:
    """How many blocks fit in `memory` bytes, or in the default for the device. Call it once the weights are in.

    Raises:
        ConfigurationError: not even two blocks fit.
    """
    if memory is None:
        memory = CPU_DEFAULT if device.type == "cpu" else int(torch.cuda.mem_get_info(device)[0] * GPU_SHARE)
    per_block = block_size * bytes_per_token(config, dtype)
    num_blocks = memory // per_block
    if num_blocks < 2:
        raise ConfigurationError(
            f"The KV cache's {memory} bytes hold fewer than two blocks of {per_block}. Raise --kv-cache-memory."
        )
    return int(num_blocks)
