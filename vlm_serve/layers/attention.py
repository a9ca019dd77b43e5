"""Self-attention over the paged KV cache."""

import torch
from torch import nn

from vlm_serve.kernels import dispatch
from vlm_serve.layers.context import ForwardContext, Outputs
from vlm_serve.layers.linear import Linear
from vlm_serve.layers.parallel import SINGLE, TensorParallel


class Attention(nn.Module):
    """Causal attention with grouped key/value heads (GQA, arXiv 2305.13245), over all before or a sliding window.

    Args:
        group: of the layers that page alike; it chooses the block tables.
        cache_layer: which of its group's layers this is; it chooses the tensors of the cache.
        window: how many positions a query sees, its own among them; None: all.
        bias, output_bias: of the projections to queries, keys and values, and of the one after them.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        group: int,
        cache_layer: int,
        window: int | None,
        bias: bool,
        output_bias: bool,
        parallel: TensorParallel = SINGLE,
    ) -> None:
        super().__init__()
        self.group = group
        self.cache_layer = cache_layer
        self.window = window
        self.num_heads = parallel.share(num_heads)
        self.num_kv_heads = parallel.share(num_kv_heads)
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        kv_size = num_kv_heads * head_dim
        self.qkv_proj = Linear(
            hidden_size,
            {"q_proj": num_heads * head_dim, "k_proj": kv_size, "v_proj": kv_size},
            bias=bias,
            parallel=parallel,
        )
        self.o_proj = Linear(
            num_heads * head_dim, {"o_proj": hidden_size}, bias=output_bias, split="row", parallel=parallel
        )

    def forward(
        self,
        hidden: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        context: ForwardContext,
        outputs: Outputs | None = None,
    ) -> torch.Tensor:
        """hidden `[T, hidden_size]` -> the same shape, or of `outputs` alone `[n, hidden_size]`; writes this step's
        keys and values into the cache.
        """
        query_and_key, value = self.qkv_proj(hidden, context.adapters).split(
            [(self.num_heads + self.num_kv_heads) * self.head_dim, self.num_kv_heads * self.head_dim], dim=-1
        )
        rotated = dispatch.rotate(query_and_key.unflatten(-1, (-1, self.head_dim)), *rotation)
        query, key = rotated.split([self.num_heads, self.num_kv_heads], dim=1)
        key_cache, value_cache = context.key_cache[self.cache_layer], context.value_cache[self.cache_layer]
        dispatch.write_kv_cache(
            key, value.unflatten(-1, (-1, self.head_dim)), key_cache, value_cache, context.slot_mapping[self.group]
        )
        queries = outputs or context
        attended = dispatch.paged_attention(
            query if outputs is None else query[outputs.index],
            key_cache,
            value_cache,
            context.block_tables[self.group],
            context.kv_lengths,
            queries.query_start,
            scale=self.scale,
            max_query_len=queries.max_query_len,
            window=self.window,
        )
        return self.o_proj(attended.flatten(1), queries.adapters)  # type: ignore[no-any-return]
