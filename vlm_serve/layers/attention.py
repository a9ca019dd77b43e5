"""Self-attention over the paged KV cache."""

import torch
from torch import nn

from vlm_serve.kernels import dispatch
from vlm_serve.layers.context import ForwardContext, Outputs
from vlm_serve.layers.linear import Linear
from vlm_serve.layers.norm import Norm
from vlm_serve.layers.parallel import SINGLE, TensorParallel
from vlm_serve.layers.rotary import Rotation, rotate


class Attention(nn.Module):
    """Causal attention with grouped key/value heads (GQA, arXiv 2305.13245), over all before or a sliding window.

    Args:
        group: of the layers that page alike; it chooses the block tables.
        cache_layer: which of its group's layers this is; it chooses the tensors of the cache.
        window: how many positions a query sees, its own among them; None: all.
        scale: factor of the scores; None: 1 / sqrt(head_dim).
        softcap, alibi_slopes: as `dispatch.paged_attention` takes them, the slopes of all heads.
        bias, output_bias: of the projections to queries, keys and values, and of the one after them.
        query_norm, key_norm: of each head's query and key, before they are rotated; None: none.
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
        query_norm: Norm | None = None,
        key_norm: Norm | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        alibi_slopes: tuple[float, ...] | None = None,
        parallel: TensorParallel = SINGLE,
    ) -> None:
        super().__init__()
        self.group = group
        self.cache_layer = cache_layer
        self.window = window
        self.num_heads = parallel.share(num_heads)
        self.num_kv_heads = parallel.share(num_kv_heads)
        self.head_dim = head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.softcap = softcap
        self.alibi_slopes = alibi_slopes
        self.parallel = parallel
        self._slopes_on_device: torch.Tensor | None = None
        self.q_norm = query_norm
        self.k_norm = key_norm
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
        rotation: Rotation | None,
        context: ForwardContext,
        outputs: Outputs | None = None,
    ) -> torch.Tensor:
        """hidden `[T, hidden_size]` -> the same shape, or of `outputs` alone `[n, hidden_size]`; writes this step's
        keys and values into the cache.
        """
        query_and_key, value = self.qkv_proj(hidden, context.adapters).split(
            [(self.num_heads + self.num_kv_heads) * self.head_dim, self.num_kv_heads * self.head_dim], dim=-1
        )
        query_and_key = query_and_key.unflatten(-1, (-1, self.head_dim))
        heads = [self.num_heads, self.num_kv_heads]
        if self.q_norm is not None and self.k_norm is not None:
            query, key = query_and_key.split(heads, dim=1)
            query_and_key = torch.cat((self.q_norm(query), self.k_norm(key)), dim=1)
        if rotation is not None:
            query_and_key = rotate(query_and_key, rotation)
        query, key = query_and_key.split(heads, dim=1)
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
            softcap=self.softcap,
            alibi_slopes=self._slopes(query.device),
            spans=queries.spans,
        )
        return self.o_proj(attended.flatten(1), queries.adapters)  # type: ignore[no-any-return]

    def _slopes(self, device: torch.device) -> torch.Tensor | None:
        """This rank's ALiBi slopes. Not a buffer: they must never be cast to bfloat16 nor loaded."""
        if self.alibi_slopes is None or self._slopes_on_device is not None:
            return self._slopes_on_device
        slopes = torch.tensor(self.alibi_slopes, dtype=torch.float32, device=device)
        self._slopes_on_device = self.parallel.slice(slopes, 0)
        return self._slopes_on_device
