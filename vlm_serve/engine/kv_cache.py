"""The tensors of the paged KV cache, and the plan of what a memory budget holds."""

from dataclasses import dataclass

import torch

from vlm_serve.config import GIB, MIB, EngineConfig
from vlm_serve.decoders.config import DecoderConfig
from vlm_serve.engine.block_manager import most_blocks
from vlm_serve.errors import ConfigurationError

CPU_DEFAULT = 1 * GIB
GPU_SHARE = 0.9
LENGTHS = (1024, 8192)
"""Of the sequences that a plan is told in."""


@dataclass(frozen=True, slots=True)
class KVCache:
    """`keys` and `values` are `[layers of a group, blocks, kv_heads, block_size, head_dim]`."""

    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def allocate(
        cls, config: DecoderConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> "KVCache":
        shape = (config.layers_per_group, num_blocks, config.num_kv_heads, block_size, config.head_dim)
        # Left as it is: no kernel reads what was not written.
        return cls(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))

    @property
    def num_blocks(self) -> int:
        return self.keys.shape[1]


@dataclass(frozen=True, slots=True)
class KVPlan:
    """What the blocks of a KV cache hold.

    Args:
        num_blocks: in the pool.
        block_size: tokens in a block, of one group of layers.
        block_bytes: keys and values in a block.
        windows: of each group of layers, None without one.
        max_chunk: the most tokens of a sequence that one step computes.
        padding: the share of the pool's bytes that no layer uses, where some groups have fewer layers than the others.
            It is in no other figure: `kv_waste_ratio` counts places for tokens.
    """

    num_blocks: int
    block_size: int
    block_bytes: int
    windows: tuple[int | None, ...]
    max_chunk: int
    padding: float = 0.0

    @property
    def memory(self) -> int:
        """In bytes."""
        return self.num_blocks * self.block_bytes

    @property
    def tokens(self) -> int:
        """Of which every layer has its keys and values at once."""
        return self.num_blocks // len(self.windows) * self.block_size

    def blocks_of(self, num_tokens: int) -> int:
        """The most that a sequence holds on its way to `num_tokens` tokens."""
        return most_blocks(num_tokens, self.block_size, self.windows, self.max_chunk)

    def sequences_of(self, num_tokens: int) -> int:
        """How many of this length fit at once, each with all of its own blocks."""
        return self.num_blocks // self.blocks_of(num_tokens)

    def longest(self, limit: int) -> int:
        """The longest sequence, of `limit` tokens or fewer, that the blocks hold."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            if self.blocks_of(middle) <= self.num_blocks:
                low = middle
            else:
                high = middle - 1
        return low

    def describe(self, max_model_len: int) -> str:
        """The plan in a line, for sequences up to the longest one that is served."""
        amount = f"{self.memory / GIB:.1f} GiB" if self.memory >= GIB else f"{self.memory / MIB:.1f} MiB"
        lengths = sorted({min(length, max_model_len) for length in LENGTHS})
        counts = [f"{self.sequences_of(length):,} of {length:,}" for length in lengths]
        word = "sequence" if counts[0].startswith("1 ") else "sequences"
        counts[0] = counts[0].replace(" ", f" {word} ", 1)
        padding = f", {self.padding:.0%} of it padding" if self.padding else ""
        return f"{amount}{padding}: {self.tokens:,} tokens; {', '.join(counts)}"


def plan_blocks(
    decoder: DecoderConfig,
    config: EngineConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    longest_span: int = 0,
) -> KVPlan:
    """The blocks that fit in `config.kv_cache_memory`, or in the default for the device. Call it once the weights
    are in: a share is of what they leave free. `longest_span` tokens may have to be computed in one step.

    Raises:
        ConfigurationError: a share on a CPU, or not two blocks of each group of layers fit.
    """
    budget = config.kv_cache_memory
    if budget is None:
        budget = CPU_DEFAULT if device.type == "cpu" else GPU_SHARE
    if isinstance(budget, float):
        if device.type == "cpu":
            raise ConfigurationError("--kv-cache-memory as a share is for a GPU; on a CPU give bytes, such as 2GiB.")
        budget = int(torch.cuda.mem_get_info(device)[0] * budget)
    elements = decoder.layers_per_group * decoder.num_kv_heads * decoder.head_dim * config.block_size
    block_bytes = 2 * elements * dtype.itemsize
    windows = tuple(group.window for group in decoder.layer_groups)
    num_blocks = budget // block_bytes
    if num_blocks < 2 * len(windows):
        raise ConfigurationError(
            f"The KV cache's {budget} bytes hold fewer than {2 * len(windows)} blocks of {block_bytes}. "
            "Raise --kv-cache-memory."
        )
    padding = 1 - decoder.num_layers / (len(windows) * decoder.layers_per_group)
    max_chunk = max(config.max_num_batched_tokens, longest_span)
    return KVPlan(num_blocks, config.block_size, block_bytes, windows, max_chunk, padding)
