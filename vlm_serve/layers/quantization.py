"""Quantized checkpoints: which parts each format keeps of a matrix, and these put together again while they are read.

No kernel computes in these formats yet: every matrix is expanded to the dtype that is served.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vlm_serve.errors import CheckpointError
from vlm_serve.kernels.linear.dequantize import (
    Dequantized,
    dequantize_awq,
    dequantize_gptq,
    dequantize_packed,
    dequantize_scaled,
)

GPTQ = "gptq"
AWQ = "awq"
COMPRESSED = "compressed-tensors"

_INTEGER_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_PARTS = {
    GPTQ: _INTEGER_PARTS,
    AWQ: _INTEGER_PARTS,
    COMPRESSED: (
        "weight",
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
    ),
}
"""What the tensors of a quantized matrix are called after the name of its module."""

_MARK = {GPTQ: "qweight", AWQ: "qweight", COMPRESSED: "weight_scale"}
"""The part by which a quantized matrix is known."""

_OF_ACTIVATIONS = {"input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale"}
"""How activations and the KV cache would be quantized; here they never are."""

_COMPRESSED_FORMATS = {"pack-quantized", "int-quantized", "float-quantized", "naive-quantized"}


class RoundingError:
    """What quantization is expected to have changed in all matrices read so far."""

    def __init__(self) -> None:
        self._variance = 0.0
        self._energy = 0.0

    def add(self, made: Dequantized) -> None:
        """
        Raises:
            ValueError: some of its numbers are none.
        """
        flat = (made.weight if made.weight.is_contiguous() else made.weight.T).reshape(-1)
        energy = sum(float(some.dot(some)) for some in flat.split(1 << 20))  # the squares would be one more matrix
        if not math.isfinite(energy):
            raise ValueError("infinite")
        self._variance += made.variance
        self._energy += energy

    @property
    def relative(self) -> float:
        """The root mean square of the error to that of the weights; rounding to a step is off by step/√12."""
        return math.sqrt(self._variance / self._energy) if self._energy else 0.0

    def __str__(self) -> str:
        return f"rounding has changed the weights by about {self.relative:.1%}"


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantized.

    `bits` of an integer; 0 is a format whose tensors say it by their dtype. `group_size` inputs share a scale; None:
    all of a row, or of the matrix. `block` is that of compressed-tensors' strategy of that name.
    """

    method: str
    bits: int
    group_size: int | None
    zero_offset: int = 0
    block: tuple[int, int] | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Quantization | None":
        """By a config.json; None: it is not quantized.

        Raises:
            CheckpointError: in a way that is not known; names it.
        """
        text = config.get("text_config")
        settings = config.get("quantization_config") or config.get("compression_config")
        if not settings and isinstance(text, Mapping):
            settings = text.get("quantization_config")
        if not settings:
            return None
        if not isinstance(settings, Mapping):
            raise CheckpointError(f"quantization_config is {repr(settings)[:80]}; it must be an object.")
        method = settings.get("quant_method")
        try:
            if method == GPTQ:
                return cls._gptq(settings)
            if method == AWQ:
                return cls._awq(settings)
            if method == COMPRESSED:
                return cls._compressed(settings)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"The quantization_config lacks or garbles the field {error}.") from None
        raise _unknown("method", method, "GPTQ, AWQ and compressed-tensors")

    @classmethod
    def _gptq(cls, settings: Mapping[str, Any]) -> "Quantization":
        bits = int(settings["bits"])
        if bits not in (2, 4, 8):
            raise _unknown("number of bits", bits, "2, 4 and 8")
        form = settings.get("checkpoint_format") or GPTQ
        if form not in (GPTQ, "gptq_v2"):
            raise _unknown("checkpoint_format", form, "gptq and gptq_v2")
        if settings.get("dynamic"):
            raise _unknown("field", "dynamic", "one form for all matrices")
        return cls(GPTQ, bits, _group(settings["group_size"]), zero_offset=int(form == GPTQ))

    @classmethod
    def _awq(cls, settings: Mapping[str, Any]) -> "Quantization":
        bits = int(settings.get("bits") or settings["w_bit"])
        version = str(settings.get("version") or "gemm").lower()
        if bits != 4 or version != "gemm":
            raise _unknown("form of AWQ", f"{version}, {bits} bits", "gemm, 4 bits")
        return cls(AWQ, bits, _group(settings.get("group_size") or settings["q_group_size"]))

    @classmethod
    def _compressed(cls, settings: Mapping[str, Any]) -> "Quantization":
        sparsity = (settings.get("sparsity_config") or {}).get("format") or "dense"
        if sparsity != "dense" or (settings.get("transform_config") or {}).get("config_groups"):
            raise _unknown("sparsity or transform", sparsity, "dense, without a transform_config")
        schemes = [group["weights"] for group in settings["config_groups"].values()]
        forms = {group.get("format") or settings["format"] for group in settings["config_groups"].values()}
        if unknown := forms - _COMPRESSED_FORMATS:
            raise _unknown("format", ", ".join(sorted(unknown)), ", ".join(sorted(_COMPRESSED_FORMATS)))
        layouts = {(int(one["num_bits"]), one.get("group_size"), str(one.get("block_structure"))) for one in schemes}
        if len(layouts) != 1:
            raise _unknown("mixture", f"of {len(layouts)} schemes of weights", "those with one")
        (scheme, *_) = schemes
        if int(scheme["num_bits"]) not in (4, 8):
            raise _unknown("number of bits", scheme["num_bits"], "4 and 8")
        block = scheme.get("block_structure")
        return cls(
            COMPRESSED,
            int(scheme["num_bits"]),
            _group(scheme.get("group_size")),
            block=None if block is None else (int(block[0]), int(block[1])),
        )

    @property
    def name(self) -> str:
        """For people: `gptq, 4 bits`."""
        return f"{self.method}, {self.bits} bits"

    def is_filler(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a tensor that the model lacks is one of the zero biases that GPTQ's tools write for every layer."""
        return self.method == GPTQ and name.endswith(".bias") and not tensor.any()

    def expand(
        self, tensors: Iterable[tuple[str, torch.Tensor]], names: Iterable[str], error: RoundingError
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors with every quantized matrix as one of float32, named `….weight`; it comes with its last part.

        Args:
            tensors: all of the checkpoint.
            names: those of all of them.
            error: what rounding has cost is added to it.

        Raises:
            CheckpointError: a matrix lacks a part, or they do not fit together; names it.
        """
        parts_of: dict[str, set[str]] = defaultdict(set)
        for name in names:
            module, _, part = name.rpartition(".")
            if part in _PARTS[self.method]:
                parts_of[module].add(part)
        parts_of = {module: parts for module, parts in parts_of.items() if _MARK[self.method] in parts}
        pending: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, tensor in tensors:
            module, _, part = name.rpartition(".")
            if part in parts_of.get(module, ()):
                pending[module][part] = tensor
                if pending[module].keys() == parts_of[module]:
                    yield f"{module}.weight", self._dequantize(module, pending.pop(module), error)
            elif part not in _OF_ACTIVATIONS:
                yield name, tensor

    def _dequantize(self, module: str, parts: Mapping[str, torch.Tensor], error: RoundingError) -> torch.Tensor:
        try:
            made = self._dequantize_parts(parts)
        except KeyError as lacking:
            raise CheckpointError(
                f"The quantized matrix {module} lacks its {lacking}. Copy the checkpoint again."
            ) from None
        except (RuntimeError, IndexError, TypeError, ValueError):
            shapes = ", ".join(
                f"{part} {tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
                for part, tensor in sorted(parts.items())
            )
            raise CheckpointError(
                f"The parts of the quantized matrix {module} do not fit its quantization_config ({self.name}, groups "
                f"of {self.group_size}): {shapes}. Take both from the same checkpoint."
            ) from None
        try:
            error.add(made)
        except ValueError:
            raise CheckpointError(
                f"The quantized matrix {module} has numbers that are infinite or none. Copy the checkpoint again."
            ) from None
        return made.weight

    def _dequantize_parts(self, parts: Mapping[str, torch.Tensor]) -> Dequantized:
        if self.method == COMPRESSED:
            return self._dequantize_compressed(parts)
        qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
        if self.method == AWQ:
            return dequantize_awq(qweight, qzeros, scales, self._group_of(len(qweight)))
        inputs = len(qweight) * 32 // self.bits
        group_of = parts["g_idx"].long() if "g_idx" in parts else self._group_of(inputs)
        return dequantize_gptq(qweight, qzeros, scales, group_of, self.bits, self.zero_offset)

    def _dequantize_compressed(self, parts: Mapping[str, torch.Tensor]) -> Dequantized:
        scale, zero_point = parts["weight_scale"], parts.get("weight_zero_point")
        if "weight_packed" in parts:
            rows, columns = parts["weight_shape"].tolist()
            group_of = parts["weight_g_idx"].long() if "weight_g_idx" in parts else self._group_of(columns)
            scale = scale.expand(rows, -1)
            return dequantize_packed(parts["weight_packed"], scale, zero_point, (rows, columns), group_of, self.bits)
        if "weight_g_idx" in parts:
            raise _unknown("part", "weight_g_idx", "weight_g_idx of packed matrices alone")
        weight = parts["weight"]
        rows, columns = weight.shape
        if self.block is not None:
            block = self.block
        elif scale.numel() == 1:
            block = (rows, columns)
        else:
            block = (1, self.group_size or columns)
        over = [math.ceil(size / step) for size, step in zip(weight.shape, block, strict=True)]
        zero_point = None if zero_point is None else zero_point.reshape(over)
        return dequantize_scaled(weight, scale.reshape(over), zero_point, block)

    def _group_of(self, inputs: int) -> torch.Tensor:
        return torch.arange(inputs) // (self.group_size or inputs)


def _group(size: int | None) -> int | None:
    """-1 and null are the whole row."""
    return None if size is None or int(size) <= 0 else int(size)


def _unknown(what: str, found: object, known: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint is quantized with the {what} {found}, which is not known. Known: {known}. Take another form "
        "of it, or the unquantized one."
    )
