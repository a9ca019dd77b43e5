"""CLIP and SigLIP vision towers: transformers' own modules, cut off after the last layer whose states are used."""

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig

from vlm_serve.errors import CheckpointError

CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""The towers that are known, with how many tokens each puts in front of those of the patches."""


class TransformersTower(nn.Module):
    """A vision transformer and the choice of its hidden states that a checkpoint names.

    Args:
        config: the vision config of the checkpoint.
        feature_layer: which hidden states: 0 are the embeddings, -1 the last layer's, before any final norm.
            Those of several are joined along the features. None: the last layer's after the final norm.
        select: `default` drops the first token (CLIP's class token), `full` keeps all.

    Raises:
        CheckpointError: the tower, the layer or the choice is not known.
    """

    def __init__(self, config: PretrainedConfig, feature_layer: int | Sequence[int] | None, select: str) -> None:
        super().__init__()
        if config.model_type not in CLASS_TOKENS:
            raise CheckpointError(
                f"Vision towers of type {config.model_type!r} are not known. Known: {', '.join(CLASS_TOKENS)}."
            )
        if select not in ("default", "full"):
            raise CheckpointError(f"vision_feature_select_strategy is {select!r}; it must be 'default' or 'full'.")
        count = config.num_hidden_layers
        self.is_normed = feature_layer is None
        chosen = count if feature_layer is None else feature_layer
        layers = (chosen,) if isinstance(chosen, int) else tuple(chosen)
        if not layers or not all(-count - 1 <= layer <= count for layer in layers):
            raise CheckpointError(f"vision_feature_layer is {feature_layer}, but the tower has {count} layers.")
        self.layers = tuple(layer % (count + 1) for layer in layers)
        self.drop_first = select == "default"
        self.image_size: int = config.image_size
        self.patch_size: int = config.patch_size
        self.class_tokens = CLASS_TOKENS[config.model_type]
        self.out_features: int = config.hidden_size * len(layers)
        self.whole_depth: int = count
        cut = copy.deepcopy(config)
        self.depth: int = max(1, *self.layers)  # transformers gives no states of a tower without a layer
        cut.num_hidden_layers = self.depth
        cut.vision_use_head = False
        self.model: Any = AutoModel.from_config(cut, dtype=torch.get_default_dtype(), attn_implementation="sdpa")
        if not self.is_normed:
            self.model.post_layernorm = nn.Identity()  # hidden states are taken before it

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_tokens(self) -> int:
        """Tokens an image gives."""
        rows, columns = self.grid
        return rows * columns + self.class_tokens - self.drop_first

    def uses(self, name: str) -> bool:
        """Whether a tensor of the whole tower, by its own name (`encoder.layers.23.…`), is used in this one. It passes
        over the layers behind the last that is; what is no part of the whole tower is not for it to pass over.
        """
        if layer := re.match(r"encoder\.layers\.(\d+)\.", name):
            return int(layer[1]) not in range(self.depth, self.whole_depth)
        top = name.partition(".")[0]
        return top != "head" and (self.is_normed or top != "post_layernorm")

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """pixel_values `[B, 3, image_size, image_size]` -> `[B, num_tokens, out_features]`."""
        made = self.model(pixel_values, output_hidden_states=not self.is_normed, return_dict=True)
        if self.is_normed:
            return made.last_hidden_state[:, 1:] if self.drop_first else made.last_hidden_state  # type: ignore[no-any-return]
        states = made.hidden_states
        chosen = [states[layer][:, 1:] if self.drop_first else states[layer] for layer in self.layers]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)
