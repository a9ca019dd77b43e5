"""The operations that layers call, and the one place that chooses their implementation.

CUDA tensors go to Triton. On a CPU float32 and bfloat16 go to the C++ operators, built at first use, and to
batched torch where they cannot be built.
"""

from collections.abc import Callable, Sequence

import torch

from vlm_serve.kernels import cpp_library
from vlm_serve.kernels.activation import cpu as activation_cpu
from vlm_serve.kernels.activation import reference as activation_torch
from vlm_serve.kernels.attention import cpu as attention_cpu
from vlm_serve.kernels.attention import torch_batched as attention_torch
from vlm_serve.kernels.experts import by_expert
from vlm_serve.kernels.experts.by_expert import Compute
from vlm_serve.kernels.experts.grouped import GroupedExperts, plain_layers
from vlm_serve.kernels.kv_cache import cpu as kv_cache_cpu
from vlm_serve.kernels.kv_cache import reference as kv_cache_torch
from vlm_serve.kernels.linear import OneDnnLinear, PackedLinear, PanelLinear, PlainLinear
from vlm_serve.kernels.lora import reference as lora_torch
from vlm_serve.kernels.lora.reference import Segment
from vlm_serve.kernels.norm import cpu as norm_cpu
from vlm_serve.kernels.norm import reference as norm_torch
from vlm_serve.kernels.norm import torch_fused as norm_fused
from vlm_serve.kernels.rotary import cpu as rotary_cpu
from vlm_serve.kernels.rotary import reference as rotary_torch

CPP_DTYPES = (torch.float32, torch.bfloat16)


def _takes_cpp(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in CPP_DTYPES and cpp_library.load()


def prepare(device: torch.device) -> None:
    """Builds what `device` needs, seconds the first time on a machine, so that no request waits for it."""
    if device.type == "cpu":
        cpp_library.load()


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
    """Causal attention of a ragged batch over the paged cache, prefill chunks and decodes together.

    Args:
        query: `[T, heads, head_dim]`; heads may be any multiple of the cache's (GQA, arXiv 2305.13245).
        key_cache, value_cache: `[blocks, kv_heads, block_size, head_dim]`, of the query's dtype.
        block_tables: int32 `[S, max_blocks]`; entries past a sequence's length are not read,
            nor those of blocks that lie before all that its queries see.
        kv_lengths: int32 `[S]`, the keys present, this step's among them.
        query_start: int32 `[S + 1]`, prefix sums of the tokens granted. Query i of a sequence stands at
            position `kv_length - granted + i`.
        scale: factor of the scores before the softmax.
        max_query_len: the most tokens granted to one sequence.
        window: how many keys a query sees, its own position's and those just before; None: all before it.
        softcap: scaled scores s become `softcap * tanh(s / softcap)` (Gemma 2, arXiv 2408.00118).
        alibi_slopes: float32 `[heads]`; `scale * (b(key's position) - b(query's))` is added to the scaled and capped
            scores (ALiBi, arXiv 2108.12409), with `b(position) = slope * position` in bfloat16 as Falcon has it:
            slope, position and product are rounded each.
        spans: int32 `[T, 2]`, for each token `[begin, end)` of the span that attends both ways and holds it, in
            positions of its sequence; (0, 0) for none. A query sees all keys of its span as well, those before its
            window and those after it, and they must be present: `end` is at most the sequence's kv_length.

    Returns:
        `[T, heads, head_dim]` of the query's dtype. Tokens past `query_start[-1]` are padding; their output is
        finite and means nothing.
    """
    tensors = (query, key_cache, value_cache, block_tables, kv_lengths, query_start)
    if query.device.type == "cuda":
        from vlm_serve.kernels.attention import triton_kernel as attention_triton

        return attention_triton.paged_attention(
            *tensors,
            scale=scale,
            max_query_len=max_query_len,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            spans=spans,
        )
    attend = attention_cpu.paged_attention if _takes_cpp(query) else attention_torch.paged_attention
    return attend(*tensors, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes, spans=spans)


def write_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Writes this step's keys and values `[T, kv_heads, head_dim]` into their slots of the cache.

    Args:
        key_cache, value_cache: `[blocks, kv_heads, block_size, head_dim]`, changed in place.
        slot_mapping: int64 `[T]`, `block * block_size + offset`, each slot at most once; -1 writes nothing.
    """
    if key.device.type == "cuda":
        from vlm_serve.kernels.kv_cache import triton_kernel as kv_cache_triton

        kv_cache_triton.write_kv_cache(key, value, key_cache, value_cache, slot_mapping)
    elif _takes_cpp(key):
        kv_cache_cpu.write_kv_cache(key, value, key_cache, value_cache, slot_mapping)
    else:
        kv_cache_torch.write_kv_cache(key, value, key_cache, value_cache, slot_mapping)


def pack_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedLinear:
    """A linear layer of `weight [out, in]` and `bias [out]` in the form that its device computes fastest in.

    The packed form on a CPU is a copy: the caller drops `weight` unless something else needs it.
    """
    for form in (PanelLinear, OneDnnLinear):
        if form.takes(weight):
            return form(weight, bias)
    return PlainLinear(weight, bias)


def experts(
    x: torch.Tensor, expert_index: torch.Tensor, expert_weights: torch.Tensor, compute: Compute
) -> torch.Tensor:
    """A mixture of experts: the sum of what each token's experts make of it, by their weights.

    Args:
        x: `[T, hidden]`.
        expert_index: int64 `[T, k]`, the experts of each token, each once.
        expert_weights: `[T, k]`, of any floating dtype.
        compute: `compute(expert, rows [n, hidden], tokens)` -> `[n, hidden]` for the n tokens, int64, that an expert
            has; experts that have none are not asked.

    Returns:
        `[T, hidden]` of x's dtype, summed in at least float32.
    """
    return by_expert.experts(x, expert_index, expert_weights, compute)


def group_experts(
    gate_up: Sequence[PackedLinear],
    down: Sequence[PackedLinear],
    activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> GroupedExperts | None:
    """`experts` of gated MLPs by grouped products, where the device has them for such layers; None where it has not.

    Args:
        gate_up, down: each expert's layers, packed; gate and up are one layer's outputs end to end. They go on to work,
            as views of the grouped weights.
        activation: of the gate; None: SiLU.
    """

    def gated(rows: torch.Tensor) -> torch.Tensor:
        if activation is None:
            return silu_and_mul(rows)
        gate, up = rows.chunk(2, dim=-1)
        return activation(gate) * up

    first, last = plain_layers(gate_up), plain_layers(down)
    return None if first is None or last is None else GroupedExperts(first, last, gated)


def apply_lora(out: torch.Tensor, x: torch.Tensor, segments: Sequence[Segment]) -> None:
    """Adds each adapter's update `B (A x)` to the tokens that have it, in place.

    Args:
        out: `[T, out_features]`.
        x: `[T, in_features]`.
        segments: for each adapter its tokens, int64 `[n]`, and its `A [r, in]` and `B [out, r]`, the scaling
            folded into B; ranks may differ. A token has one adapter at most.
    """
    lora_torch.apply_lora(out, x, segments)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """x `[..., size]` over the root of its mean square on the last axis, in float32, times `weight [size] + offset`.

    It is rounded where transformers' models round, or in bfloat16 the likeliest token would differ more often: with an
    offset the result alone, without one what the weight multiplies, too. A GPU rounds the result alone.
    """
    if x.device.type == "cuda":
        return norm_fused.rms_norm(x, weight, eps, offset)
    norm = norm_cpu.rms_norm if _takes_cpp(x) else norm_torch.rms_norm
    return norm(x, weight, eps, offset)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> torch.Tensor:
    """Adds x to `residual`, contiguous and of its shape, in place; returns `rms_norm` of the sum as it was rounded."""
    if x.device.type == "cuda":
        return norm_fused.add_rms_norm(x, residual, weight, eps, offset)
    norm = norm_cpu.add_rms_norm if _takes_cpp(x) else norm_torch.add_rms_norm
    return norm(x, residual, weight, eps, offset)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`[..., 2 * width]`, the gate before the other half -> `silu(gate) * up`, `[..., width]`."""
    return activation_cpu.silu_and_mul(gate_up) if _takes_cpp(gate_up) else activation_torch.silu_and_mul(gate_up)


def linear_silu_and_mul(layer: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    """`silu_and_mul(layer(x))`, in one operator where the packed form has it."""
    if isinstance(layer, PanelLinear) and layer.can_gate:
        return layer.silu_and_mul(x)
    return silu_and_mul(layer(x))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the two halves of each head, x `[T, heads, head_dim]`, by cos and sin `[T, 1, head_dim]` of its dtype."""
    return rotary_cpu.rotate(x, cos, sin) if _takes_cpp(x) else rotary_torch.rotate(x, cos, sin)
