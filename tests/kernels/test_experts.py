from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from vlm_serve.kernels import dispatch
from vlm_serve.kernels.experts import grouped, reference
from vlm_serve.kernels.linear import PlainLinear

Activation = Callable[[torch.Tensor], torch.Tensor]

TOLERANCE = {torch.float32: (0.0, 5e-6), torch.float64: (0.0, 1e-12), torch.bfloat16: (2**-6, 2**-5)}
"""In bfloat16 each layer's result is rounded, and what experts give, near 4 here, may cancel in the sum."""


@dataclass(frozen=True)
class Mixture:
    """Tokens, the experts that a router chose for them, and the experts' weights."""

    x: torch.Tensor
    expert_index: torch.Tensor
    expert_weights: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor

    @staticmethod
    def random(tokens: int, experts: int, each: int, dtype: torch.dtype = torch.float32) -> "Mixture":
        hidden, inner = 24, 16
        chosen = torch.rand(tokens, experts).topk(each)
        return Mixture(
            torch.randn(tokens, hidden).to(dtype),
            chosen.indices,
            chosen.values.to(dtype),
            torch.randn(experts, 2 * inner, hidden).to(dtype) / 5,
            torch.randn(experts, hidden, inner).to(dtype) / 4,
        )

    def expected(self, activation: Activation = F.silu) -> torch.Tensor:
        return reference.experts(self.x, self.expert_index, self.expert_weights, self.gate_up, self.down, activation)

    def one_by_one(self, activation: Activation = F.silu) -> torch.Tensor:
        def compute(expert: int, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            assert torch.equal(rows, self.x[tokens])
            gate, up = F.linear(rows, self.gate_up[expert]).chunk(2, dim=-1)
            return F.linear(activation(gate) * up, self.down[expert])

        return dispatch.experts(self.x, self.expert_index, self.expert_weights, compute)

    def layers(self) -> tuple[list[PlainLinear], list[PlainLinear]]:
        gate_up, down = ([PlainLinear(weight.clone(), None) for weight in all_] for all_ in (self.gate_up, self.down))
        return gate_up, down

    def at_once(self) -> torch.Tensor:
        """By the grouped products, which torch has on a CPU too, for tests."""
        together = grouped.GroupedExperts(*self.layers(), gated=dispatch.silu_and_mul)
        return together(self.x, self.expert_index, self.expert_weights)


@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        *((Mixture.one_by_one, dtype) for dtype in TOLERANCE),
        *((Mixture.at_once, dtype) for dtype in (torch.float32, torch.bfloat16)),  # what torch has the product for
    ],
)
@pytest.mark.parametrize(
    ("tokens", "experts", "each"), [(1, 4, 2), (33, 8, 2), (5, 60, 4), (7, 3, 3), (9, 2, 1), (0, 4, 2)]
)
def test_each_token_goes_through_its_experts(
    way: Callable[[Mixture], torch.Tensor], dtype: torch.dtype, tokens: int, experts: int, each: int
) -> None:
    mixture = Mixture.random(tokens, experts, each, dtype)
    rtol, atol = TOLERANCE[dtype]
    out = way(mixture)
    assert out.dtype == dtype
    torch.testing.assert_close(out, mixture.expected(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("way", [Mixture.one_by_one, Mixture.at_once])
def test_tokens_that_all_want_one_expert_leave_the_others_alone(way: Callable[[Mixture], torch.Tensor]) -> None:
    mixture = Mixture.random(6, 4, 1)
    mixture.expert_index.fill_(2)
    for expert in (0, 1, 3):
        mixture.gate_up[expert] = mixture.down[expert] = torch.nan
    torch.testing.assert_close(way(mixture), mixture.expected(), rtol=0, atol=5e-6)


def test_an_expert_without_tokens_is_not_asked() -> None:
    mixture = Mixture.random(6, 8, 2)
    mixture.expert_index[:] = torch.tensor([5, 1])
    asked: list[int] = []

    def compute(expert: int, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        asked.append(expert)
        return rows

    dispatch.experts(mixture.x, mixture.expert_index, mixture.expert_weights, compute)
    assert asked == [1, 5]


def test_a_tokens_sum_does_not_depend_on_the_tokens_beside_it() -> None:
    mixture = Mixture.random(40, 6, 4)

    def compute(expert: int, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return rows * (expert + 0.1)

    together = dispatch.experts(mixture.x, mixture.expert_index, mixture.expert_weights, compute)
    for token in range(40):
        one = slice(token, token + 1)
        alone = dispatch.experts(mixture.x[one], mixture.expert_index[one], mixture.expert_weights[one], compute)
        assert torch.equal(alone, together[one])


def test_grouped_layers_go_on_to_work_as_views_of_the_one_copy() -> None:
    gate_up, down = Mixture.random(1, 4, 1).layers()
    before = [layer.weight.clone() for layer in (*gate_up, *down)]
    together = grouped.GroupedExperts(gate_up, down, gated=dispatch.silu_and_mul)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip((*gate_up, *down), before, strict=True))
    for layers, weights in ((gate_up, together.gate_up), (down, together.down)):
        assert {layer.weight.untyped_storage().data_ptr() for layer in layers} == {weights.data_ptr()}


def test_layers_on_a_cpu_are_not_grouped() -> None:
    mixture = Mixture.random(1, 4, 1, torch.bfloat16)
    assert dispatch.group_experts(*mixture.layers()) is None
    packed = [dispatch.pack_linear(weight) for weight in mixture.gate_up]
    assert dispatch.group_experts(packed, packed) is None
