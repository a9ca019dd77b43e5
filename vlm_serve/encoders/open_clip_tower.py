"""Towers of open_clip models: timm's own vision transformer, cut off after the layer whose states are used."""

from typing import Any

import timm
import torch
from torch import nn

from vlm_serve.encoders.timm_tower import make_timm_model
from vlm_serve.errors import CheckpointError


class OpenClipTower(nn.Module):
    """A vision transformer of timm and the choice of its hidden states that a checkpoint names.

    Args:
        name: of the model in timm.
        image_size: pixels of a side.
        feature_layer: which hidden states: 0 are the embeddings, -1 the last layer's, before the final norm.
        select: `default` drops the first token (the class token), `full` keeps all.

    Raises:
        CheckpointError: timm has no such vision transformer, or it has no such layer.
    """

    def __init__(self, name: str, image_size: int, feature_layer: int, select: str) -> None:
        super().__init__()
        with torch.device("meta"):
            count = self.whole_depth = len(_make(name, image_size).blocks)
        if not -count <= feature_layer <= count or feature_layer == 0:
            raise CheckpointError(f"mm_vision_select_layer is {feature_layer}, but the tower has {count} layers.")
        self.depth = feature_layer % (count + 1)
        self.drop_first = select == "default"
        self.image_size = image_size
        self.model = _make(name, image_size, depth=self.depth)
        self.model.norm = nn.Identity()  # hidden states are taken before it
        self.out_features = int(self.model.num_features)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = self.model.patch_embed.grid_size
        return rows, columns

    @property
    def num_tokens(self) -> int:
        """Tokens an image gives."""
        rows, columns = self.grid
        return rows * columns + int(self.model.num_prefix_tokens) - self.drop_first

    def uses(self, name: str) -> bool:
        """Whether a tensor of the whole tower, by timm's name (`blocks.11.…`), is used in this one: see
        `TransformersTower.uses`.
        """
        top, _, rest = name.partition(".")
        if top == "blocks":
            return int(rest.split(".")[0]) not in range(self.depth, self.whole_depth)
        return top not in ("norm", "fc_norm", "attn_pool", "head")

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """pixel_values `[B, 3, image_size, image_size]` -> `[B, num_tokens, out_features]`."""
        states = self.model.forward_features(pixel_values)
        return states[:, 1:] if self.drop_first else states  # type: ignore[no-any-return]


def _make(name: str, image_size: int, **arguments: Any) -> Any:
    made = make_timm_model(name, {"img_size": image_size, **arguments}, global_pool="")
    if not isinstance(made, timm.models.VisionTransformer):
        raise CheckpointError(
            f"The tower {name!r} is no plain vision transformer; of open_clip's only those are served."
        )
    return made
