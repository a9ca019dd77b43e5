"""The MLPs of a decoder's layers: gated, plain, or a mixture of gated experts."""

from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from vlm_serve.decoders.config import DecoderConfig
from vlm_serve.decoders.kinds import MlpKind
from vlm_serve.kernels import dispatch
from vlm_serve.kernels.experts.grouped import GroupedExperts
from vlm_serve.layers.context import AdapterSegment
from vlm_serve.layers.linear import Linear
from vlm_serve.layers.parallel import TensorParallel


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))` (arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig, parallel: TensorParallel) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(
            hidden, {"gate_proj": inner, "up_proj": inner}, bias=config.mlp_bias, parallel=parallel
        )
        self.down_proj = Linear(inner, {"down_proj": hidden}, bias=config.mlp_bias, split="row", parallel=parallel)
        self.activation = None if config.activation == "silu" else ACT2FN[config.activation]

    def forward(self, x: torch.Tensor, adapters: tuple[AdapterSegment, ...]) -> torch.Tensor:
        if self.activation is None:
            activated = self.gate_up_proj.silu_and_mul(x, adapters)
        else:
            gate, up = self.gate_up_proj(x, adapters).chunk(2, dim=-1)
            activated = self.activation(gate) * up
        return self.down_proj(activated, adapters)  # type: ignore[no-any-return]

    def has_adapter(self, adapters: tuple[AdapterSegment, ...]) -> bool:
        """Whether one of a step's adapters changes it."""
        return self.gate_up_proj.has_adapter(adapters) or self.down_proj.has_adapter(adapters)


class PlainMLP(nn.Module):
    """`fc2(act(fc1(x)))`."""

    def __init__(self, config: DecoderConfig, parallel: TensorParallel) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.fc1 = Linear(hidden, {"fc1": inner}, bias=config.mlp_bias, parallel=parallel)
        self.fc2 = Linear(inner, {"fc2": hidden}, bias=config.mlp_bias, split="row", parallel=parallel)
        self.activation = ACT2FN[config.activation]

    def forward(self, x: torch.Tensor, adapters: tuple[AdapterSegment, ...]) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(x, adapters)), adapters)  # type: ignore[no-any-return]


class Router(nn.Module):
    """Which experts each token goes through, and by what weights."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size), requires_grad=False)
        self.per_token = config.experts_per_token
        self.norm_topk_prob = config.norm_topk_prob

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x `[T, hidden_size]` -> the experts of each token, int64 `[T, k]`, and their weights, float32 `[T, k]`."""
        likings = F.linear(x, self.weight).softmax(dim=-1, dtype=torch.float32)
        weights, chosen = likings.topk(self.per_token, dim=-1)
        return chosen, weights / weights.sum(dim=-1, keepdim=True) if self.norm_topk_prob else weights


class Experts(nn.Module):
    """Each token through the gated MLPs that the router likes best for it (arXiv 2401.04088, section 2.1)."""

    def __init__(self, config: DecoderConfig, parallel: TensorParallel) -> None:
        super().__init__()
        one = replace(config, intermediate_size=config.experts_intermediate_size)
        self.gate = Router(config)
        self._each = [GatedMLP(one, parallel) for _ in range(config.num_experts)]
        self.experts = nn.ModuleList(self._each)

    @cached_property
    def _grouped(self) -> GroupedExperts | None:
        """All of them at once, where the device can; made by the first step, once the weights are packed."""
        gate_up = [expert.gate_up_proj.packed for expert in self._each]
        down = [expert.down_proj.packed for expert in self._each]
        assert None not in gate_up + down, "pack() comes before the first forward"
        return dispatch.group_experts(gate_up, down, self._each[0].activation)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor, adapters: tuple[AdapterSegment, ...]) -> torch.Tensor:
        chosen, weights = self.gate(x)
        adapters = tuple(one for one in adapters if any(expert.has_adapter((one,)) for expert in self._each))
        if not adapters and self._grouped is not None:
            return self._grouped(x, chosen, weights)

        def compute(expert: int, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            return self._each[expert](rows, _among(adapters, tokens))  # type: ignore[no-any-return]

        return dispatch.experts(x, chosen, weights, compute)


def _among(adapters: tuple[AdapterSegment, ...], tokens: torch.Tensor) -> tuple[AdapterSegment, ...]:
    """The adapters' tokens as indices among these, int64 `[n]`."""
    return tuple(replace(one, token_index=torch.isin(tokens, one.token_index).nonzero()[:, 0]) for one in adapters)


def make_mlp(config: DecoderConfig, layer: int, parallel: TensorParallel) -> GatedMLP | PlainMLP | Experts:
    """One layer's."""
    kinds: dict[MlpKind, type[GatedMLP | PlainMLP | Experts]] = {
        MlpKind.GATED: GatedMLP,
        MlpKind.PLAIN: PlainMLP,
        MlpKind.EXPERTS: Experts,
    }
    return kinds[config.mlp_of(layer)](config, parallel)
