"""Quantized matrices as plain ones: the reference of each format, and what serves those that no kernel computes in.

Formats: GPTQ (arXiv 2210.17323) as AutoGPTQ and GPTQModel store it, AWQ (arXiv 2306.00978) as AutoAWQ's `gemm`,
compressed-tensors' packed, int8 and fp8 ones. All results are float32 `[out, in]`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column, of eight, that each four bits of a word hold, lowest first."""

_WORD = 32
_SLAB = 1 << 17
"""Elements of a matrix that are unpacked at once: that takes several times the memory of what comes out."""

_MANTISSA = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}


@dataclass(frozen=True, slots=True)
class Dequantized:
    """`weight` float32 `[out, in]`; `variance` is the sum over its elements of step²/12, the expected squared error of
    rounding to steps of that width.
    """

    weight: torch.Tensor
    variance: float


def unpack(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """int32 words -> unsigned numbers of `bits` bits as int32, lowest bits first, `32 / bits` times as many in
    `dim`.
    """
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32, device=words.device)
    dim %= words.dim()
    shape = [1] * (words.dim() + 1)
    shape[dim + 1] = len(shifts)
    numbers: torch.Tensor = (words.unsqueeze(dim + 1) >> shifts.view(shape)) & (2**bits - 1)
    return numbers.flatten(dim, dim + 1)


def dequantize_gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    group_of: torch.Tensor,
    bits: int,
    zero_offset: int,
) -> Dequantized:
    """GPTQ's.

    Args:
        qweight: int32 `[in * bits / 32, out]`.
        qzeros: int32 `[groups, out * bits / 32]`.
        scales: `[groups, out]`.
        group_of: int64 `[in]`, the group of each input.
        zero_offset: what is added to the stored zeros: 1, or 0 in version 2 of the format.
    """
    zeros = (unpack(qzeros, bits, 1) + zero_offset) & (2**bits - 1)
    step = _slab(qweight.shape[1] * _WORD // bits)
    return _by_groups((unpack(words, bits, 0) for words in qweight.split(step)), zeros, scales, group_of)


def dequantize_awq(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, group_of: torch.Tensor
) -> Dequantized:
    """AWQ's, of four bits.

    Args:
        qweight: int32 `[in, out / 8]`, the columns of a word in `AWQ_ORDER`.
        qzeros: int32 `[groups, out / 8]`, likewise.
        scales: `[groups, out]`.
        group_of: int64 `[in]`, the group of each input.
    """
    slabs = (_in_order(unpack(words, 4, 1)) for words in qweight.split(_slab(scales.shape[1])))
    return _by_groups(slabs, _in_order(unpack(qzeros, 4, 1)), scales, group_of)


def dequantize_packed(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    shape: tuple[int, int],
    group_of: torch.Tensor,
    bits: int,
) -> Dequantized:
    """compressed-tensors' `pack-quantized`: signed numbers, stored with half their range added.

    Args:
        packed: int32 `[out, ceil(in * bits / 32)]`.
        scale: `[out, groups]`.
        zero_point: int32 `[ceil(out * bits / 32), groups]`, packed likewise; None: 0.
        shape: `(out, in)`.
        group_of: int64 `[in]`, the group of each input.
    """
    rows, columns = shape
    half = 2 ** (bits - 1)
    words = packed.split(_slab(rows * _WORD // bits), dim=1)
    numbers = (unpack(some, bits, 1).T for some in words)
    zeros = torch.full_like(scale, half, dtype=torch.int32)
    if zero_point is not None:
        zeros = unpack(zero_point, bits, 0)[:rows]
    if len(group_of) != columns:
        raise IndexError("one group for each input")
    return _by_groups(numbers, zeros.T, scale.T, group_of, padding=-columns % (_WORD // bits))


def dequantize_scaled(
    weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, block: tuple[int, int]
) -> Dequantized:
    """compressed-tensors' `int-quantized` and `float-quantized`: a number for each element.

    Args:
        weight: int8 or float8 `[out, in]`.
        scale: `[ceil(out / block[0]), ceil(in / block[1])]`.
        zero_point: of the same shape; None: 0.
        block: outputs and inputs that share a scale.
    """
    if weight.dtype not in (torch.int8, *_MANTISSA):
        raise TypeError(f"numbers of {weight.dtype}")
    rows, columns = (torch.arange(size) // step for size, step in zip(weight.shape, block, strict=True))
    made, variance, step = torch.empty(weight.shape), 0.0, _slab(weight.shape[1])
    for some, row, target in zip(weight.split(step), rows.split(step), made.split(step), strict=True):
        steps = scale[row].float()[:, columns]
        target.copy_(some)
        widths = steps
        if weight.dtype in _MANTISSA:
            # Between two powers of two the steps of a float are the lower one's, divided by 2^mantissa.
            _, exponents = torch.frexp(target)
            widths = torch.ldexp(steps, exponents - 1 - _MANTISSA[weight.dtype])
        variance += float(widths.square().sum(dtype=torch.float64)) / 12
        if zero_point is not None:
            target -= zero_point[row].float()[:, columns]
        target *= steps
    return Dequantized(made, variance)


def _slab(elements: int) -> int:
    """How many rows of so many elements are unpacked at once."""
    return max(1, _SLAB // max(1, elements))


def _in_order(columns: torch.Tensor) -> torch.Tensor:
    """Columns as AWQ's words hold them -> in their own order."""
    eights = columns.unflatten(1, (-1, len(AWQ_ORDER)))
    ordered: torch.Tensor = eights[..., torch.tensor(AWQ_ORDER).argsort()]
    return ordered.flatten(1)


def _by_groups(
    slabs: Iterable[torch.Tensor], zeros: torch.Tensor, scales: torch.Tensor, group_of: torch.Tensor, padding: int = 0
) -> Dequantized:
    """Numbers `[in, out]`, some inputs at a time, zeros and scales `[groups, out]` -> `(numbers - zeros) * scales`,
    turned round. After the last inputs there may be `padding` more.

    Raises:
        IndexError, RuntimeError: they do not fit together.
    """
    steps, offsets = scales.float(), zeros.float()
    weight = torch.empty(len(group_of), steps.shape[1])
    inputs = torch.bincount(group_of, minlength=len(steps))
    if not inputs.all():
        raise IndexError("groups that no input is in")  # they are of another size than is said
    done = 0
    for numbers in slabs:
        groups = group_of[done : done + len(numbers)]
        target = weight[done : done + len(numbers)]
        done += len(numbers)
        if done == len(group_of) + padding:
            numbers = numbers[: len(target)]
        if numbers.shape != target.shape:
            raise IndexError("one number for each input and output")
        target.copy_(numbers)
        target -= offsets[groups]
        target *= steps[groups]
    if done != len(group_of) + padding:
        raise IndexError("one number for each input")
    variance = float((steps.double().square().sum(1) * inputs).sum()) / 12
    return Dequantized(weight.T, variance)
