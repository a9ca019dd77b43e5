"""A layer of a tower that an adapter changes: the base's own weights, and the update of whichever adapter is active."""

import pytest
import torch
from torch import nn

from vlm_serve.layers.tower_linear import TowerAdapter, TowerLinear, replace_linears

IN, OUT = 12, 20


def pair(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rank, IN), torch.randn(OUT, rank)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4), (1,)])
def test_the_active_adapter_alone_adds_its_update(shape: tuple[int, ...], bias: bool) -> None:
    base, active = nn.Linear(IN, OUT, bias=bias), TowerAdapter()
    layer = TowerLinear(base, active)
    pairs = {0: pair(2), 3: pair(5)}
    for slot, one in pairs.items():
        layer.set_adapter(slot, one)
    x = torch.randn(*shape, IN)
    assert torch.equal(layer(x), base(x))
    for active.slot, (a, b) in pairs.items():
        torch.testing.assert_close(layer(x), base(x) + x @ a.T @ b.T)
    active.slot = 1  # an adapter that leaves this layer as it is
    assert torch.equal(layer(x), base(x))
    layer.set_adapter(3, None)
    active.slot = 3
    assert torch.equal(layer(x), base(x))


def test_an_input_that_is_not_contiguous_is_taken_row_by_row() -> None:
    base, active = nn.Linear(IN, OUT), TowerAdapter(slot=0)
    layer = TowerLinear(base, active)
    a, b = pair(3)
    layer.set_adapter(0, (a, b))
    x = torch.randn(IN, 4, 6).permute(2, 1, 0)
    torch.testing.assert_close(layer(x), base(x) + x @ a.T @ b.T)


def test_the_weights_are_those_of_the_layer_whose_place_it_takes() -> None:
    model = nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(IN, IN), nn.GELU(), nn.Linear(IN, OUT))})
    parameters = dict(model.named_parameters())
    replace_linears(model, ["blocks.0"], TowerAdapter())
    assert [type(layer) for layer in model["blocks"]] == [TowerLinear, nn.GELU, nn.Linear]  # type: ignore[arg-type]
    assert {name: id(one) for name, one in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
