"""Linear layers of vision towers and projectors that an adapter changes, in the place of torch's own.

The modules around them are transformers' and timm's, which hand no adapter on: one object tells all layers whose
images are being encoded.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from vlm_serve.kernels import dispatch
from vlm_serve.layers.linear import LoraPair


@dataclass(slots=True)
class TowerAdapter:
    """The device slot of the adapter with which images are encoded now; None: the base model's weights alone, for which
    a graph may be captured.

    It is one for the whole call, and images of several adapters go through the tower one adapter after the other: how
    the rows of a layer belong to images (windows, merged patches, tiles) is known inside the tower alone.
    """

    slot: int | None = None


class TowerLinear(nn.Linear):
    """`y = x Wᵀ + b`, with the low-rank update `y += B(A x)` of the active adapter, if it changes this layer.

    Weight and bias are those of the layer whose place it takes, not copies.
    """

    def __init__(self, base: nn.Linear, active: TowerAdapter) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.adapters: dict[int, LoraPair] = {}
        self._active = active

    def set_adapter(self, slot: int, pair: LoraPair | None) -> None:
        """Puts an adapter's `(A [r, in], B [out, r])`, the scaling folded into B, into a device slot, in the place of
        the one that was there; None: it does not change this layer.
        """
        if pair is None:
            self.adapters.pop(slot, None)
        else:
            self.adapters[slot] = pair

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`."""
        slot = self._active.slot
        if slot is None or slot not in self.adapters:
            return super().forward(input)
        rows = input.reshape(-1, self.in_features)
        out = super().forward(rows)
        dispatch.apply_lora(out, rows, [(torch.arange(len(rows), device=rows.device), *self.adapters[slot])])
        return out.view(*input.shape[:-1], -1)


def replace_linears(model: nn.Module, names: Iterable[str], active: TowerAdapter) -> None:
    """Puts a `TowerLinear` in the place of each of these `nn.Linear`s, by their paths in the model."""
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        model.set_submodule(name, TowerLinear(base, active))
