"""Any timm model as a vision tower: its feature map, pooled to a grid of few tokens."""

from collections.abc import Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from vlm_serve.errors import CheckpointError

SHAPES = {
    *("img_size", "patch_size", "dynamic_img_size", "embed_dim", "depth", "depths", "num_heads", "window_size"),
    *("reg_tokens", "output_stride"),
}
"""Arguments of `timm.create_model` that a config may give. Others open files, or fetch them."""


def make_timm_model(name: str, arguments: Mapping[str, Any], **own: Any) -> Any:
    """A timm model of random weights; `arguments` and the name are a checkpoint's, `own` are the caller's.

    Raises:
        CheckpointError: timm has no such model, or not with these arguments.
    """
    if not timm.is_model(name):  # it would take `hf-hub:` and `local-dir:` before a name for places to read
        raise CheckpointError(f"timm has no model {name!r}. Name one of its own, without a place in front.")
    if unknown := arguments.keys() - SHAPES:
        raise CheckpointError(
            f"timm's model {name!r} is to be made with {', '.join(sorted(unknown))}. A config may give "
            f"{', '.join(sorted(SHAPES))}."
        )
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, **arguments, **own)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"timm cannot make its model {name!r}: {error}") from None


class TimmTower(nn.Module):
    """The features of a timm model, convolutional or transformer, on a grid.

    Args:
        name: of the model in timm, without a pretrained tag.
        grid: rows and columns of the tokens; a larger feature map is averaged down to it.
        arguments: of `timm.create_model`, those of `SHAPES` (`img_size` for a vision transformer).

    Raises:
        CheckpointError: timm has no such model, or not with these arguments.
    """

    def __init__(self, name: str, grid: tuple[int, int], arguments: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.grid = grid
        self.model: Any = make_timm_model(name, arguments or {})
        self.model.to(memory_format=torch.channels_last)  # convolutions: half the time in bfloat16 on a CPU
        self.out_features = int(self.model.num_features)

    @property
    def num_tokens(self) -> int:
        """Tokens an image gives."""
        return self.grid[0] * self.grid[1]

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """pixel_values `[B, 3, H, W]` -> `[B, num_tokens, out_features]`, row by row."""
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        maps = self._feature_map(self.model.forward_features(pixel_values))
        if tuple(maps.shape[-2:]) != self.grid:
            maps = F.adaptive_avg_pool2d(maps, self.grid)
        return maps.flatten(2).transpose(1, 2)

    def _feature_map(self, features: torch.Tensor) -> torch.Tensor:
        """What timm gives, in whichever of its layouts, as `[B, out_features, rows, columns]`."""
        if features.ndim == 3:
            patches = features[:, self.model.num_prefix_tokens :].transpose(1, 2)
            features = patches.unflatten(2, self.model.patch_embed.grid_size)
        elif getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            features = features.permute(0, 3, 1, 2)
        return features
