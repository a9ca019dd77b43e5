"""The linear layer of the decoder: stacked outputs, LoRA by token, a tensor-parallel share, packed weights."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from vlm_serve.kernels import dispatch
from vlm_serve.kernels.linear import PackedLinear
from vlm_serve.layers.context import AdapterSegment
from vlm_serve.layers.parallel import SINGLE, TensorParallel

LoraPair = tuple[torch.Tensor, torch.Tensor]


class Linear(nn.Module):
    """`y = x Wᵀ + b`, with the low-rank update `y += B(A x)` for each token that has an adapter.

    `parts` names the checkpoint's matrices that are stacked into this one, with their output widths in
    order: `{"q_proj": 576, "k_proj": 192, "v_proj": 192}`; one GEMM serves them all.
    `split` says how tensor-parallel ranks share it: by `column` each holds some outputs, by `row` some
    inputs and the results are summed.

    `weight` is `[sum(parts), in_features]` of this rank's share, until `pack()` gives it its final form.
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        *,
        bias: bool = False,
        split: Literal["column", "row"] = "column",
        parallel: TensorParallel = SINGLE,
    ) -> None:
        super().__init__()
        self.split = split
        self.parallel = parallel
        self.whole_parts = dict(parts)
        self.whole_in_features = in_features
        by_row = split == "row"
        self.parts = {name: out if by_row else parallel.share(out) for name, out in parts.items()}
        width = sum(self.parts.values())
        self.weight: nn.Parameter | None = nn.Parameter(
            torch.empty(width, parallel.share(in_features) if by_row else in_features), requires_grad=False
        )
        self.bias = nn.Parameter(torch.empty(width), requires_grad=False) if bias else None
        self.packed: PackedLinear | None = None
        self.tied = False
        self.adapters: dict[int, LoraPair] = {}

    def tie(self, weight: nn.Parameter) -> None:
        """Shares another module's weight (the word embeddings'); checkpoints need not hold it twice."""
        self.weight = weight
        self.tied = True

    def offsets(self) -> dict[str, int]:
        """Where each part begins in the stacked output."""
        offsets, start = {}, 0
        for name, width in self.parts.items():
            offsets[name] = start
            start += width
        return offsets

    def target(self, part: str, kind: Literal["weight", "bias"]) -> torch.Tensor | None:
        """The view of `weight` or `bias` that the checkpoint's matrix `part` fills; None if there is no bias."""
        stacked = self.weight if kind == "weight" else self.bias
        return None if stacked is None else stacked.data.narrow(0, self.offsets()[part], self.parts[part])

    def share_of(self, whole: torch.Tensor, kind: Literal["weight", "bias"]) -> torch.Tensor:
        """This rank's share of a checkpoint's whole matrix or bias."""
        if self.split == "column":
            return self.parallel.slice(whole, 0)
        if kind == "weight":
            return self.parallel.slice(whole, 1)
        # Every rank adds its partial sum, so the bias must come in once.
        return whole if self.parallel.rank == 0 else torch.zeros_like(whole)

    def pack(self) -> None:
        """Turns the loaded weight into the form that its device computes fastest in, and drops the plain one."""
        assert self.weight is not None, "packed twice"
        self.packed = dispatch.pack_linear(self.weight.data, None if self.bias is None else self.bias.data)
        self.weight = None

    def set_adapter(self, slot: int, parts: Mapping[str, LoraPair]) -> None:
        """Puts an adapter's matrices into a device slot.

        Args:
            slot: the device slot; an adapter that was there is replaced.
            parts: for each stacked part that it changes `(A [r, in], B [out, r])`, the scaling folded into B.
                Stacked parts become one pair: A's end to end, B's on a block diagonal.
        """
        if not parts:
            self.adapters.pop(slot, None)
            return
        assert self.parallel.size == 1, "adapters are not cut among tensor-parallel ranks yet"
        rank = sum(a.shape[0] for a, _ in parts.values())
        first_a, first_b = next(iter(parts.values()))
        a_stacked = first_a.new_empty(rank, first_a.shape[1])
        b_stacked = first_b.new_zeros(sum(self.parts.values()), rank)
        row, offsets = 0, self.offsets()
        for name, (a, b) in parts.items():
            a_stacked[row : row + a.shape[0]] = a
            b_stacked[offsets[name] : offsets[name] + b.shape[0], row : row + a.shape[0]] = b
            row += a.shape[0]
        self.adapters[slot] = (a_stacked, b_stacked)

    def forward(self, x: torch.Tensor, adapters: tuple[AdapterSegment, ...] = ()) -> torch.Tensor:
        """x `[T, in]` -> `[T, sum(parts)]`; `adapters` says which tokens have one."""
        assert self.packed is not None, "pack() comes before the first forward"
        out = self.packed(x)
        if self.has_adapter(adapters):
            segments = [
                (segment.token_index, *self.adapters[segment.slot])
                for segment in adapters
                if segment.slot in self.adapters
            ]
            dispatch.apply_lora(out, x, segments)
        return self.parallel.all_reduce(out) if self.split == "row" else out

    def has_adapter(self, adapters: tuple[AdapterSegment, ...]) -> bool:
        """Whether one of a step's adapters changes this layer."""
        return any(segment.slot in self.adapters for segment in adapters)

    def silu_and_mul(self, x: torch.Tensor, adapters: tuple[AdapterSegment, ...] = ()) -> torch.Tensor:
        """x `[T, in]` -> `[T, sum(parts) / 2]`, the SiLU of the first half of `forward`'s outputs times the other."""
        assert self.packed is not None, "pack() comes before the first forward"
        if self.split == "row" or self.has_adapter(adapters):
            return dispatch.silu_and_mul(self(x, adapters))
        return dispatch.linear_silu_and_mul(self.packed, x)
