"""Towers for square tiles that transformers has beside CLIP and SigLIP: its own modules, with their last states."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from vlm_serve.errors import CheckpointError


class TileTower(nn.Module):
    """A vision transformer whose patches are merged, block by block, into tokens (pixel shuffle).

    Args:
        model_type: of the tower.
        config: the vision config of the checkpoint.
        merged: patches of a token's side.
        class_tokens: those that the tower puts in front of the patches'; they are dropped.

    Raises:
        CheckpointError: a tile is no square of whole tokens.
    """

    def __init__(
        self, model_type: type[PreTrainedModel], config: PretrainedConfig, merged: int, class_tokens: int = 0
    ) -> None:
        super().__init__()
        self.image_size, patch_size = _side(config.image_size), _side(config.patch_size)
        side, rest = divmod(self.image_size // patch_size, merged)
        if rest or self.image_size % patch_size or side < 1:
            raise CheckpointError(
                f"A tile of {self.image_size} pixels cannot be cut into tokens of {merged} by {merged} patches of "
                f"{patch_size} pixels. Take config.json from the same checkpoint as the weights."
            )
        self.grid = side, side
        self.num_tokens = side * side
        self.class_tokens = class_tokens
        dtype = torch.get_default_dtype()
        self.model: Any = model_type._from_config(copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa")

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """pixel_values `[B, 3, image_size, image_size]` -> `[B, patches, hidden]`, row by row."""
        states = self.model(pixel_values, return_dict=True).last_hidden_state
        return states[:, self.class_tokens :]  # type: ignore[no-any-return]


def _side(size: int | list[int] | tuple[int, ...]) -> int:
    """Of a square, which configs give as one number or as two."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise CheckpointError(f"The tower takes pictures or patches of {size} pixels; only squares are served.")
    return sides.pop()
