"""Each quantized format against matrices that are packed here, number by number, from its description."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.quantize import Packed, pack_awq, pack_compressed, pack_fp8, pack_gptq, pack_int8
from vlm_serve.errors import CheckpointError
from vlm_serve.kernels.linear import dequantize
from vlm_serve.kernels.linear.dequantize import unpack
from vlm_serve.layers.quantization import Quantization, RoundingError

ROWS, COLUMNS = 48, 64

FORMATS = {
    "GPTQ, 4 bits": lambda weight: pack_gptq(weight, bits=4),
    "GPTQ, 2 bits": lambda weight: pack_gptq(weight, bits=2),
    "GPTQ, 8 bits": lambda weight: pack_gptq(weight, bits=8),
    "GPTQ, one group": lambda weight: pack_gptq(weight, group_size=-1),
    "GPTQ, groups in another order": lambda weight: pack_gptq(weight, order=True),
    "GPTQ without g_idx": lambda weight: pack_gptq(weight, with_order=False),
    "GPTQ version 2": lambda weight: pack_gptq(weight, version=2),
    "AWQ": pack_awq,
    "int4 in groups": pack_compressed,
    "int4 by channel": lambda weight: pack_compressed(weight, group_size=None),
    "int4 with zero points": lambda weight: pack_compressed(weight, symmetric=False),
    "int4 with groups in another order": lambda weight: pack_compressed(weight, order=True),
    "int8 packed": lambda weight: pack_compressed(weight, bits=8),
    "int8 by channel": lambda weight: pack_int8(weight, "channel"),
    "int8 by tensor": lambda weight: pack_int8(weight, "tensor"),
    "int8 in groups": lambda weight: pack_int8(weight, "group"),
    "int8 with zero points": lambda weight: pack_int8(weight, "channel", symmetric=False),
    "fp8 by channel": lambda weight: pack_fp8(weight, "channel"),
    "fp8 by tensor": lambda weight: pack_fp8(weight, "tensor"),
    "fp8 in blocks": lambda weight: pack_fp8(weight, "block"),
}


def expand(packed: Packed, error: RoundingError | None = None) -> torch.Tensor:
    quantization = Quantization.from_config({"quantization_config": packed.config})
    assert quantization is not None
    tensors = {f"layer.{part}": tensor for part, tensor in packed.tensors.items()}
    ((name, weight),) = quantization.expand(tensors.items(), tensors, error or RoundingError())
    assert name == "layer.weight"
    return weight


def matrix(seed: int = 0) -> torch.Tensor:
    """Rows and groups of different sizes, so that a scale in the wrong place shows; the last rows are positive, whose
    zero is the lowest number.
    """
    rng = np.random.default_rng(seed)
    sizes = rng.uniform(0.2, 3.0, (ROWS, COLUMNS // 16)).repeat(16, axis=1)
    weight = rng.standard_normal((ROWS, COLUMNS)) * sizes + 0.1
    weight[-8:] = np.abs(weight[-8:])
    return torch.from_numpy(weight.astype(np.float32))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_matrix_comes_out_as_its_steps_say(kind: str) -> None:
    packed = FORMATS[kind](matrix())
    torch.testing.assert_close(expand(packed), packed.expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_matrix_that_is_unpacked_in_slabs_is_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = FORMATS[kind](matrix())
    whole = expand(packed)
    monkeypatch.setattr(dequantize, "_SLAB", 5 * COLUMNS)
    assert torch.equal(expand(packed), whole)


def test_a_row_need_not_fill_its_last_word() -> None:
    packed = pack_compressed(matrix()[:, :61].contiguous(), group_size=None)
    torch.testing.assert_close(expand(packed), packed.expected, rtol=1e-6, atol=1e-6)


def test_numbers_of_a_type_that_is_not_quantized_are_told() -> None:
    packed = pack_fp8(matrix(), "channel")
    with pytest.raises(CheckpointError, match=r"weight \(48, 64\) of float32"):
        expand(replace(packed, tensors={**packed.tensors, "weight": matrix()}))


@pytest.mark.parametrize("kind", FORMATS)
def test_the_error_that_is_told_is_the_one_that_was_made(kind: str) -> None:
    weight, error = matrix(1), RoundingError()
    packed = FORMATS[kind](weight)
    expand(packed, error)
    made = float((packed.expected - weight).norm() / packed.expected.norm())
    assert error.relative == pytest.approx(made, rel=0.25)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_lowest_bits_of_a_word_come_first(bits: int, dim: int) -> None:
    words = torch.tensor([[-0x01234568]], dtype=torch.int32)
    number = -0x01234568 % 2**32
    expected = [number >> shift & 2**bits - 1 for shift in range(0, 32, bits)]
    assert unpack(words, bits, dim).flatten().tolist() == expected
