"""The attention layer: options and spans of a step reach the kernel, for all tokens and for the outputs alone."""

from dataclasses import replace

import pytest
import torch

from vlm_serve.layers.attention import Attention
from vlm_serve.layers.context import ForwardContext, Outputs
from vlm_serve.layers.parallel import SINGLE, TensorParallel

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, TOKENS, WINDOW = 12, 4, 2, 8, 20, 3
SPAN = (5, 17)
SCALE, SOFTCAP, SLOPES = 0.7, 1.5, (0.5, 0.25, 0.125, 0.0625)


@pytest.fixture
def context() -> ForwardContext:
    """A prefill of one sequence with a span, in a cache of one block."""
    inside = (torch.arange(TOKENS) >= SPAN[0]) & (torch.arange(TOKENS) < SPAN[1])
    return ForwardContext(
        positions=torch.arange(TOKENS),
        slot_mapping=(torch.arange(TOKENS),),
        block_tables=(torch.zeros(1, 1, dtype=torch.int32),),
        kv_lengths=torch.tensor([TOKENS], dtype=torch.int32),
        query_start=torch.tensor([0, TOKENS], dtype=torch.int32),
        max_query_len=TOKENS,
        key_cache=torch.full((1, 1, KV_HEADS, TOKENS, HEAD_DIM), torch.nan),
        value_cache=torch.full((1, 1, KV_HEADS, TOKENS, HEAD_DIM), torch.nan),
        spans=torch.where(inside[:, None], torch.tensor(SPAN), 0).int(),
    )


def layer(parallel: TensorParallel = SINGLE) -> tuple[Attention, dict[str, torch.Tensor]]:
    """A packed layer with every option, and the whole matrices that it holds its share of."""
    generator = torch.Generator().manual_seed(0)
    attention = Attention(
        HIDDEN,
        HEADS,
        KV_HEADS,
        HEAD_DIM,
        group=0,
        cache_layer=0,
        window=WINDOW,
        bias=False,
        output_bias=False,
        scale=SCALE,
        softcap=SOFTCAP,
        alibi_slopes=SLOPES,
        parallel=parallel,
    )
    whole = {}
    for linear in (attention.qkv_proj, attention.o_proj):
        for part, width in linear.whole_parts.items():
            whole[part] = torch.randn(width, linear.whole_in_features, generator=generator) / 3
            target = linear.target(part, "weight")
            assert target is not None
            target.copy_(linear.share_of(whole[part], "weight"))
        linear.pack()
    return attention, whole


def expected_of(hidden: torch.Tensor, whole: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same by dense matrices."""
    query, key, value = (
        (hidden @ whole[part].T).unflatten(1, (-1, HEAD_DIM)).transpose(0, 1) for part in ("q_proj", "k_proj", "v_proj")
    )
    key, value = (tensor.repeat_interleave(HEADS // KV_HEADS, dim=0) for tensor in (key, value))
    distance = torch.arange(TOKENS) - torch.arange(TOKENS)[:, None]
    scores = SOFTCAP * (query @ key.transpose(1, 2) * SCALE / SOFTCAP).tanh()
    scores += SCALE * torch.tensor(SLOPES)[:, None, None] * distance
    sees = (distance <= 0) & (distance > -WINDOW)
    sees[SPAN[0] : SPAN[1], SPAN[0] : SPAN[1]] = True
    attended = scores.masked_fill(~sees, -torch.inf).softmax(-1) @ value
    return attended.transpose(0, 1).flatten(1) @ whole["o_proj"].T


def test_a_layer_with_every_option_equals_dense_attention(context: ForwardContext) -> None:
    attention, whole = layer()
    hidden = torch.randn(TOKENS, HIDDEN)
    torch.testing.assert_close(attention(hidden, None, context), expected_of(hidden, whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 4, 10, 16])
def test_the_outputs_alone_are_what_all_tokens_give(context: ForwardContext, count: int) -> None:
    attention, _ = layer()
    hidden, index = torch.randn(TOKENS, HIDDEN), torch.arange(TOKENS - count, TOKENS)
    assert context.spans is not None
    starts = torch.tensor([0, count], dtype=torch.int32)
    outputs = Outputs(index=index, query_start=starts, max_query_len=count, spans=context.spans[index])
    everything = attention(hidden, None, context)
    last = attention(hidden, None, replace(context, outputs=outputs), outputs)
    torch.testing.assert_close(last, everything[index], rtol=0, atol=1e-6)


def test_ranks_have_the_slopes_of_their_own_heads(context: ForwardContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorParallel, "all_reduce", lambda self, partial: partial)
    hidden, total = torch.randn(TOKENS, HIDDEN), torch.zeros(TOKENS, HIDDEN)
    for rank in range(2):
        attention, whole = layer(TensorParallel(rank, 2))
        own = {
            name: torch.full((1, 1, KV_HEADS // 2, TOKENS, HEAD_DIM), torch.nan)
            for name in ("key_cache", "value_cache")
        }
        total += attention(hidden, None, replace(context, **own))
    torch.testing.assert_close(total, expected_of(hidden, whole), rtol=0, atol=1e-5)
