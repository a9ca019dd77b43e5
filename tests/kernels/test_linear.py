import gc
import weakref

import pytest
import torch

from vlm_serve.kernels import dispatch
from vlm_serve.kernels.linear import PlainLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 33])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_a_packed_layer_computes_x_w_plus_b(dtype: torch.dtype, rows: int, bias: bool) -> None:
    weight, x = torch.randn(40, 24).to(dtype) / 5, torch.randn(rows, 24).to(dtype)
    added = torch.randn(40).to(dtype) if bias else None
    expected = x.double() @ weight.double().T + (0 if added is None else added.double())
    out = dispatch.pack_linear(weight, added)(x)
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
