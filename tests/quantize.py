"""Matrices packed as quantized checkpoints hold them, written number by number from the formats' descriptions.

Slow and plain on purpose: nothing here is shared with what reads them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

GROUP = 16
AWQ_COLUMNS = {0: 0, 1: 2, 2: 4, 3: 6, 4: 1, 5: 3, 6: 5, 7: 7}
"""Which column of eight stands in which four bits of AWQ's word."""


@dataclass(frozen=True)
class Packed:
    """`tensors` by the part of the name after the module's; `expected` is what they stand for, float32 `[out, in]`."""

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    expected: torch.Tensor


def to_words(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned numbers `[..., n]` -> int32 words `[..., ceil(n * bits / 32)]`, the first in the lowest bits."""
    count = 32 // bits
    *rest, length = numbers.shape
    words = np.zeros((*rest, -(-length // count)), dtype=np.uint64)
    for index in range(length):
        words[..., index // count] |= numbers[..., index].astype(np.uint64) << np.uint64(bits * (index % count))
    return words.astype(np.uint32).view(np.int32)


def quantize(
    weight: np.ndarray, groups: np.ndarray, bits: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """weight `[out, in]`, groups `[in]` -> numbers `[out, in]` of 0 to 2^bits - 1, scales (as float16 holds them) and
    zeros `[out, groups]`, and what they stand for.
    """
    rows, columns = weight.shape
    count = int(groups.max()) + 1
    numbers = np.zeros((rows, columns), dtype=np.int64)
    scales, zeros = np.zeros((rows, count), dtype=np.float32), np.zeros((rows, count), dtype=np.int64)
    highest = 2**bits - 1
    for row in range(rows):
        for group in range(count):
            part = weight[row, groups == group]
            if symmetric:
                scale = np.float32(np.float16(np.abs(part).max() / (highest / 2 - 0.5 if bits > 2 else 1.5)))
                zero = 2 ** (bits - 1)
            else:
                low, high = min(part.min(), 0.0), max(part.max(), 0.0)
                scale = np.float32(np.float16((high - low) / highest))
                zero = int(np.clip(np.rint(-low / scale), 0, highest))
            scales[row, group], zeros[row, group] = scale, zero
            numbers[row, groups == group] = np.clip(np.rint(part / scale) + zero, 0, highest)
    return numbers, scales, zeros, ((numbers - zeros[:, groups]) * scales[:, groups]).astype(np.float32)


def group_index(columns: int, group_size: int | None, order: bool) -> np.ndarray:
    """The group of each input; in another order where activations decide it."""
    groups = np.arange(columns) // (group_size or columns)
    return np.random.default_rng(3).permutation(groups) if order else groups


def pack_gptq(
    weight: torch.Tensor,
    bits: int = 4,
    group_size: int = GROUP,
    *,
    order: bool = False,
    with_order: bool = True,
    version: int = 1,
) -> Packed:
    """Asymmetric, as AutoGPTQ (version 1, zeros less one) or GPTQModel (version 2) store it."""
    groups = group_index(weight.shape[1], group_size if group_size > 0 else None, order)
    numbers, scales, zeros, expected = quantize(weight.numpy(), groups, bits, symmetric=False)
    stored = (zeros - 1) % 2**bits if version == 1 else zeros
    tensors = {
        "qweight": torch.from_numpy(to_words(numbers, bits).T.copy()),
        "qzeros": torch.from_numpy(to_words(stored.T, bits)),
        "scales": torch.from_numpy(scales.T.copy()).half(),
    }
    if with_order:
        tensors["g_idx"] = torch.from_numpy(groups.astype(np.int32))
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": order,
        "sym": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return Packed(config, tensors, torch.from_numpy(expected))


def pack_awq(weight: torch.Tensor) -> Packed:
    """AutoAWQ's `gemm`: words of eight columns."""
    groups = group_index(weight.shape[1], GROUP, order=False)
    numbers, scales, zeros, expected = quantize(weight.numpy(), groups, 4, symmetric=False)

    def words(rows: np.ndarray) -> torch.Tensor:
        shuffled = np.empty_like(rows)
        for start in range(0, rows.shape[1], 8):
            for place, column in AWQ_COLUMNS.items():
                shuffled[:, start + place] = rows[:, start + column]
        return torch.from_numpy(to_words(shuffled, 4))

    tensors = {
        "qweight": words(numbers.T),
        "qzeros": words(zeros.T),
        "scales": torch.from_numpy(scales.T.copy()).half(),
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return Packed(config, tensors, torch.from_numpy(expected))


def pack_compressed(
    weight: torch.Tensor,
    bits: int = 4,
    group_size: int | None = GROUP,
    *,
    symmetric: bool = True,
    order: bool = False,
) -> Packed:
    """`pack-quantized`."""
    groups = group_index(weight.shape[1], group_size, order)
    numbers, scales, zeros, expected = quantize(weight.numpy(), groups, bits, symmetric)
    tensors = {
        "weight_packed": torch.from_numpy(to_words(numbers, bits)),
        "weight_scale": torch.from_numpy(scales).half(),
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = torch.from_numpy(to_words(zeros.T, bits).T.copy())
    if order:
        tensors["weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
    strategy = "channel" if group_size is None else "group"
    config = compressed_config("pack-quantized", bits, "int", strategy, group_size=group_size)
    return Packed(config, tensors, torch.from_numpy(expected))


def pack_int8(
    weight: torch.Tensor, strategy: Literal["channel", "tensor", "group"], *, symmetric: bool = True
) -> Packed:
    """`int-quantized`."""
    columns = weight.shape[1]
    if strategy == "tensor":
        scale = np.float32(weight.abs().max() / 127)
        numbers = np.rint(weight.numpy() / scale).astype(np.int8)
        tensors = {"weight": torch.from_numpy(numbers), "weight_scale": torch.tensor([scale])}
        expected = torch.from_numpy(numbers.astype(np.float32) * scale)
        return Packed(compressed_config("int-quantized", 8, "int", strategy), tensors, expected)
    size = GROUP if strategy == "group" else None
    numbers, scales, zeros, made = quantize(weight.numpy(), group_index(columns, size, False), 8, symmetric)
    tensors = {
        "weight": torch.from_numpy((numbers - 128).astype(np.int8)),
        "weight_scale": torch.from_numpy(scales),
        "input_scale": torch.tensor([0.5]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = torch.from_numpy((zeros - 128).astype(np.int8))
    config = compressed_config("int-quantized", 8, "int", strategy, group_size=size)
    return Packed(config, tensors, torch.from_numpy(made))


def pack_fp8(weight: torch.Tensor, strategy: Literal["channel", "tensor", "block"]) -> Packed:
    """`float-quantized`, E4M3. The blocks do not fill the matrix."""
    rows, columns = weight.shape
    block = {"channel": (1, columns), "tensor": (rows, columns), "block": (20, 24)}[strategy]
    numbers = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    expected = torch.empty_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            where = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = weight[where].abs().max() / 448
            numbers[where] = (weight[where] / scales[i, j]).to(torch.float8_e4m3fn)
            expected[where] = numbers[where].float() * scales[i, j]
    tensors = {"weight": numbers, "weight_scale": scales.flatten() if strategy == "tensor" else scales}
    structure = list(block) if strategy == "block" else None
    config = compressed_config("float-quantized", 8, "float", strategy, block_structure=structure)
    return Packed(config, tensors, expected)


def compressed_config(form: str, bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    """A `quantization_config` of compressed-tensors'."""
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, **more}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
