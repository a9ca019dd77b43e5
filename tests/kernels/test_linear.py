import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from vlm_serve.kernels import dispatch
from vlm_serve.kernels.linear import OneDnnLinear, PanelLinear, PlainLinear

FORMS = [
    (PanelLinear, torch.bfloat16),
    (OneDnnLinear, torch.bfloat16),
    (OneDnnLinear, torch.float32),
    *((PlainLinear, dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)),
]


@pytest.mark.parametrize(("form", "dtype"), FORMS, ids=[f"{form.__name__}-{dtype}" for form, dtype in FORMS])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 33])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_a_packed_layer_computes_x_w_plus_b(form: type, dtype: torch.dtype, rows: int, bias: bool) -> None:
    weight, x = torch.randn(40, 24).to(dtype) / 5, torch.randn(rows, 24).to(dtype)
    added = torch.randn(40).to(dtype) if bias else None
    if form is not PlainLinear and not form.takes(weight):
        pytest.skip("this machine does not compute in this form")
    expected = x.double() @ weight.double().T + (0 if added is None else added.double())
    out = form(weight, added)(x)
    assert out.dtype == dtype
    assert out.is_contiguous()
    rtol, atol = {torch.bfloat16: (2**-7, 1e-4), torch.float32: (0, 5e-6), torch.float64: (0, 1e-12)}[dtype]
    torch.testing.assert_close(out, expected.to(dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("rows", [2, 6])
def test_leading_dimensions_and_strides_of_x_are_free(rows: int) -> None:
    layer = dispatch.pack_linear(torch.randn(8, 6))
    x = torch.randn(rows, 3, 12)[..., ::2]
    out = layer(x)
    assert out.shape == (rows, 3, 8)
    torch.testing.assert_close(out[1], layer(x[1].contiguous()))


def test_the_output_is_a_new_tensor_that_may_be_changed_in_place() -> None:
    layer, x = dispatch.pack_linear(torch.randn(8, 6)), torch.randn(2, 6)
    first = layer(x)
    kept = first.clone()
    layer(x).add_(1)
    assert torch.equal(first, kept)


def test_a_packed_layer_keeps_no_second_copy_of_the_weight() -> None:
    weight = torch.randn(8, 6)
    layer = dispatch.pack_linear(weight)
    if isinstance(layer, PlainLinear):
        pytest.skip("this torch has no oneDNN")
    gone = weakref.ref(weight)
    del weight
    gc.collect()
    assert gone() is None


@pytest.fixture
def panel_layer() -> Callable[[int, int], PanelLinear]:
    def build(width: int, depth: int) -> PanelLinear:
        weight, bias = torch.randn(width, depth).bfloat16(), torch.randn(width).bfloat16()
        if not PanelLinear.takes(weight):
            pytest.skip("this CPU does not multiply pairs of bfloat16, or has matrix tiles")
        return PanelLinear(weight, bias)

    return build


@pytest.mark.parametrize("width", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("depth", [2, 1022, 1024, 1026, 2100])
@pytest.mark.parametrize("rows", [0, 1, 7, 191, 193, 500])
def test_panels_compute_what_float64_does(
    panel_layer: Callable[[int, int], PanelLinear], width: int, depth: int, rows: int
) -> None:
    layer, x = panel_layer(width, depth), torch.randn(rows, depth).bfloat16()
    weight = layer.panels.transpose(1, 2).reshape(-1, depth)[:width]
    assert layer.bias is not None
    expected = x.double() @ weight.double().T + layer.bias.double()
    # Half a unit of the result's last place, and float32 sums of terms that may cancel.
    torch.testing.assert_close(layer(x).double(), expected, rtol=2**-8, atol=1e-6 * depth)


def test_a_rows_result_does_not_depend_on_the_rows_beside_it(panel_layer: Callable[[int, int], PanelLinear]) -> None:
    """Row 20 of engines.md, for the linear layers."""
    layer, x = panel_layer(200, 2100), torch.randn(400, 2100).bfloat16()
    together = layer(x)
    for rows in (1, 2, 5, 6, 17, 64, 211):
        for first in (0, 3, 400 - rows):
            assert torch.equal(layer(x[first : first + rows]), together[first : first + rows]), (rows, first)


def test_dispatch_takes_panels_where_they_are_built() -> None:
    weight = torch.randn(8, 6).bfloat16()
    assert isinstance(dispatch.pack_linear(weight), PanelLinear) == PanelLinear.takes(weight)
    assert not PanelLinear.takes(weight.float())
    assert not PanelLinear.takes(torch.randn(8, 5).bfloat16())


@pytest.mark.parametrize("half", [64, 256])
@pytest.mark.parametrize("rows", [0, 1, 8, 193])
def test_a_gated_product_is_to_the_bit_what_two_operators_give(
    panel_layer: Callable[[int, int], PanelLinear], half: int, rows: int
) -> None:
    layer, x = panel_layer(2 * half, 1100), torch.randn(rows, 1100).bfloat16() / 8
    assert layer.can_gate
    assert torch.equal(dispatch.linear_silu_and_mul(layer, x), dispatch.silu_and_mul(layer(x)))


def test_halves_that_share_a_panel_are_gated_by_two_operators(panel_layer: Callable[[int, int], PanelLinear]) -> None:
    layer, x = panel_layer(2 * 72, 32), torch.randn(3, 32).bfloat16()
    assert not layer.can_gate
    assert torch.equal(dispatch.linear_silu_and_mul(layer, x), dispatch.silu_and_mul(layer(x)))
