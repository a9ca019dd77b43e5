"""Rotary position embedding (RoFormer, arXiv 2104.09864) with the scalings that checkpoints name."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vlm_serve.kernels import dispatch

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, each `[T, 1, rotary_dim]`."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How a checkpoint stretches its rotary frequencies; the fields are the names of its config.

    `kind` is `linear` (positions divided by `factor`); `llama3` (only wavelengths past the original
    context are stretched, with a smooth border between `low_freq_factor` and `high_freq_factor`); `yarn` (arXiv
    2309.00071: by frequency, between `beta_fast` and `beta_slow` rotations in the original context); or `longrope`
    (arXiv 2402.13753: a factor for each frequency, of `short_factor` for sequences within the original context and of
    `long_factor` for longer ones). The last two make queries and keys longer, too, by `attention_factor` or the
    paper's own.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        stretch = math.log(self.factor)
        if self.kind == "longrope":
            return math.sqrt(1 + stretch / math.log(self.original_max_position_embeddings))
        if self.mscale and self.mscale_all_dim:
            return (0.1 * self.mscale * stretch + 1) / (0.1 * self.mscale_all_dim * stretch + 1)
        return 0.1 * stretch + 1


def rotary_frequencies(dim: int, theta: float, scaling: RopeScaling | None, *, is_long: bool = False) -> torch.Tensor:
    """The inverse frequencies, float32 `[dim / 2]`; `is_long` are those of sequences past the original context."""
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "yarn":
        kept = _yarn_share(dim, theta, scaling)
        return frequencies / scaling.factor * (1 - kept) + frequencies * kept
    if scaling.kind == "longrope":
        return frequencies / torch.tensor(scaling.long_factor if is_long else scaling.short_factor)
    assert scaling.kind == "llama3", scaling.kind
    wavelengths = 2 * math.pi / frequencies
    smooth = (scaling.original_max_position_embeddings / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def _yarn_share(dim: int, theta: float, scaling: RopeScaling) -> torch.Tensor:
    """How much of each frequency stays as it is: 1 for the fastest, 0 for the slowest, float32 `[dim / 2]`."""

    def index_of(rotations: float) -> float:
        """The frequency that makes so many of them in the original context."""
        positions = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(positions) / (2 * math.log(theta))

    low, high = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    return 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)


def frequency_axes(section: Sequence[int], *, interleaved: bool) -> list[int]:
    """The axis (0 time, 1 row, 2 column) whose position turns each of the `sum(section)` frequencies.

    Args:
        section: how many each axis has.
        interleaved: the axes take turns while they have any left (Qwen3-VL), else lie end to end (Qwen2-VL, arXiv
            2409.12191).
    """
    if not interleaved:
        return [axis for axis, count in enumerate(section) for _ in range(count)]
    axes = [0] * sum(section)
    for axis in (1, 2):
        for place in range(axis, min(3 * section[axis], len(axes)), 3):
            axes[place] = axis
    return axes


class Rotary(nn.Module):
    """Turns positions into the cosines and sines that rotate queries and keys.

    Args:
        dim: how many features of a head are rotated.
        axes: for positions in three axes, which of them turns each frequency.
    """

    def __init__(self, dim: int, theta: float, scaling: RopeScaling | None, axes: Sequence[int] = ()) -> None:
        super().__init__()
        self.arguments = (dim, theta, scaling)
        self.amplitude = 1.0 if scaling is None else scaling.amplitude
        self.has_long = scaling is not None and scaling.kind == "longrope"
        self.axes = tuple(axes)
        self.frequencies: torch.Tensor | None = None
        self.axis_index: torch.Tensor | None = None

    def forward(self, positions: torch.Tensor, dtype: torch.dtype, is_long: torch.Tensor | None = None) -> Rotation:
        """positions int64 `[T]`, or `[3, T]` of time, row and column -> cosines and sines `[T, 1, dim]` in `dtype`.

        `is_long`, bool `[T]`, says which tokens are of sequences past the original context; None: none is.
        """
        if self.frequencies is None:  # not buffers: they must never be cast to bfloat16 nor loaded
            kinds = [rotary_frequencies(*self.arguments, is_long=long) for long in (False, True)[: 1 + self.has_long]]
            self.frequencies = torch.stack(kinds).to(positions.device)
            self.axis_index = torch.tensor(self.axes, device=positions.device)
        frequencies = self.frequencies[0] if is_long is None else self.frequencies[is_long.long()]
        if positions.dim() == 1:
            angles = positions[:, None].float() * frequencies
        else:
            assert self.axis_index is not None
            angles = positions.float()[self.axis_index].T * frequencies
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return (angles.cos() * self.amplitude).to(dtype), (angles.sin() * self.amplitude).to(dtype)


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """x `[T, heads, head_dim]` with the first `rotary_dim` features of each head rotated, the others as they are."""
    rotary_dim = rotation[0].shape[-1]
    if rotary_dim == x.shape[-1]:
        return dispatch.rotate(x, *rotation)
    return torch.cat((dispatch.rotate(x[..., :rotary_dim], *rotation), x[..., rotary_dim:]), dim=-1)


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """The slope of each head (ALiBi, arXiv 2108.12409), for a count that is no power of two as its authors' code has
    them: those of the power below, then every other one of the power above.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * head / power) for head in range(1, power + 1)]
    return tuple(slopes + [2 ** (-4 * head / power) for head in range(1, 2 * (num_heads - power) + 1, 2)])
