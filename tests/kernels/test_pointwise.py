"""Norm, gated activation and rotation: the C++ operators beside torch."""

from collections.abc import Callable

import pytest
import torch

from tests.kernels.cases import require_cpp
from vlm_serve.kernels import dispatch
from vlm_serve.kernels.activation import reference as activation
from vlm_serve.kernels.norm import reference as norm
from vlm_serve.kernels.rotary import reference as rotary

Operation = Callable[..., torch.Tensor]

DTYPES = [torch.float32, torch.bfloat16]

TOLERANCE = {torch.float32: (2**-21, 1e-6), torch.bfloat16: (2**-7, 1e-5)}
"""`rtol` and `atol`: in float32 four units of the last place, in bfloat16 one."""


@pytest.fixture(autouse=True)
def _cpp() -> None:
    require_cpp()


def check(fused: Operation, plain: Operation, dtype: torch.dtype, *tensors: torch.Tensor, **options: float) -> None:
    """Float32 against the plain operation in float64 on the same values. Bfloat16 against bfloat16, for both round at
    the same places: sums in another order may take one value in a hundred to the other side of a tie.
    """
    rounded = [tensor.to(dtype) for tensor in tensors]
    rtol, atol = TOLERANCE[dtype]
    computed = torch.float64 if dtype == torch.float32 else dtype
    expected = plain(*(tensor.to(computed) for tensor in rounded), **options).to(dtype)
    out = fused(*rounded, **options)
    torch.testing.assert_close(out, expected, rtol=rtol, atol=atol)
    if dtype == torch.bfloat16:
        assert int((out != expected).sum()) <= out.numel() // 100
    assert out.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 576), (5, 64), (2, 3, 7), (0, 16)], ids=str)
def test_the_norm_agrees_with_the_reference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(dispatch.rms_norm, norm.rms_norm, dtype, 3 * torch.randn(shape), torch.randn(shape[-1]), eps=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_around_zero_is_added_to_one_with_all_its_bits(dtype: torch.dtype) -> None:
    check(dispatch.rms_norm, norm.rms_norm, dtype, 3 * torch.randn(5, 62), torch.randn(62) / 100, eps=1e-6, offset=1.0)
    x, weight = torch.randn(5, 62).to(dtype), torch.randn(62).to(dtype) / 100
    torch.testing.assert_close(norm.rms_norm(x, weight, 1e-6, 1.0), dispatch.rms_norm(x, weight, 1e-6, 1.0))
    stream = torch.randn(5, 62).to(dtype)
    expected = dispatch.rms_norm(stream + x, weight, 1e-6, 1.0)
    assert torch.equal(dispatch.add_rms_norm(x, stream, weight, 1e-6, 1.0), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 576), (5, 62), (2, 3, 7), (300, 96), (0, 16)], ids=str)
def test_an_addition_with_its_norm_is_to_the_bit_what_the_two_are(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, stream, weight = (torch.randn(size).to(dtype) for size in (shape, shape, shape[-1:]))
    expected = stream + x
    out = dispatch.add_rms_norm(x, stream, weight, 1e-5)
    assert torch.equal(stream, expected)
    assert torch.equal(out, dispatch.rms_norm(expected, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 3072), (5, 62), (300, 96), (0, 16)], ids=str)
def test_the_gated_activation_agrees_with_the_reference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(dispatch.silu_and_mul, activation.silu_and_mul, dtype, 3 * torch.randn(shape))


def test_the_gated_activation_of_large_numbers_is_finite() -> None:
    gate = torch.tensor([-1e30, -200.0, -0.0, 0.0, 200.0, 1e30])
    out = dispatch.silu_and_mul(torch.cat((gate, torch.ones(6))))
    torch.testing.assert_close(out, torch.tensor([0.0, 0.0, 0.0, 0.0, 200.0, 1e30]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 256])
def test_the_rotation_of_strided_heads_agrees_with_the_reference(dtype: torch.dtype, head_dim: int) -> None:
    angles = torch.randn(6, 1, head_dim // 2).repeat(1, 1, 2)
    stacked = torch.randn(6, 5, head_dim)

    def rotate_three_heads(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return dispatch.rotate(x[:, :3], cos, sin)

    check(
        rotate_three_heads, lambda x, *pair: rotary.rotate(x[:, :3], *pair), dtype, stacked, angles.cos(), angles.sin()
    )


def test_a_row_gets_the_same_bits_alone_and_among_others() -> None:
    x, weight = torch.randn(40, 576), torch.randn(576)
    assert torch.equal(dispatch.rms_norm(x, weight, 1e-5)[7], dispatch.rms_norm(x[7], weight, 1e-5))
    assert torch.equal(dispatch.silu_and_mul(x)[7], dispatch.silu_and_mul(x[7]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes_take_the_torch_path(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 16).to(dtype), torch.randn(16).to(dtype)
    assert torch.equal(dispatch.rms_norm(x, weight, 1e-5), norm.rms_norm(x, weight, 1e-5))
    assert torch.equal(dispatch.silu_and_mul(x), activation.silu_and_mul(x))
