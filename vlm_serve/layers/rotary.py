"""Rotary position embedding (RoFormer, arXiv 2104.09864) with the scalings that checkpoints name."""

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How a checkpoint stretches its rotary frequencies; the fields are the names of its config.

    `kind` is `linear` (positions divided by `factor`) or `llama3` (only wavelengths past the original
    context are stretched, with a smooth border between `low_freq_factor` and `high_freq_factor`).
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """The inverse frequencies, float32 `[head_dim / 2]`."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    assert scaling.kind == "llama3", scaling.kind
    wavelengths = 2 * math.pi / frequencies
    smooth = (scaling.original_max_position_embeddings / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


class Rotary(nn.Module):
    """Turns positions into the cosines and sines that rotate queries and keys."""

    def __init__(self, head_dim: int, theta: float, scaling: RopeScaling | None) -> None:
        super().__init__()
        self.arguments = (head_dim, theta, scaling)
        self.frequencies: torch.Tensor | None = None

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """positions int64 `[T]` -> cosines and sines, each `[T, 1, head_dim]` in `dtype`."""
        if self.frequencies is None:  # not a buffer: it must never be cast to bfloat16 nor loaded
            self.frequencies = rotary_frequencies(*self.arguments).to(positions.device)
        angles = positions[:, None].float() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)
