"""Qwen's vision towers: transformers' own modules, which take the patches of images of any sizes in one call."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from vlm_serve.errors import CheckpointError

TOWERS: Mapping[str, type[PreTrainedModel]] = {
    "qwen2_vl": Qwen2VisionTransformerPretrainedModel,
    "qwen2_5_vl": Qwen2_5_VisionTransformerPretrainedModel,
    "qwen3_vl": Qwen3VLVisionModel,
}
"""By the kind of model. Each ends in its own projector, which merges neighbouring patches."""


class QwenTower(nn.Module):
    """A vision transformer over packed patches, and its projectors to the decoder's width.

    An image attends to itself alone, in Qwen2.5-VL mostly within windows (arXiv 2502.13923, section 2.1.1).

    Args:
        config: the vision config of the checkpoint.

    Raises:
        CheckpointError: the tower is not known.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        kind = config.model_type.removesuffix("_vision")  # published configs and some transformers have none there
        if kind not in TOWERS:
            raise CheckpointError(
                f"Vision towers of type {config.model_type!r} are not known. Known: {', '.join(TOWERS)}."
            )
        self.channels: int = config.in_channels
        self.patch_size: int = config.patch_size
        self.frames: int = config.temporal_patch_size
        self.merge_size: int = config.spatial_merge_size
        self.deepstack_layers = len(getattr(config, "deepstack_visual_indexes", ()))
        dtype = torch.get_default_dtype()
        self.model: Any = TOWERS[kind]._from_config(copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa")

    def forward(self, patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """Encodes images laid end to end.

        Args:
            patches: `[P, channels * patch_size²]`, in the order of the processor: the patches that are merged into one
                token follow one another.
            grids: int64 `[images, 2]`, rows and columns of each image's tokens.

        Returns:
            `[tokens, hidden_size * (1 + deepstack_layers)]`: the embeddings, then the features that the decoder adds
            after each of its first layers (DeepStack, arXiv 2406.04334).
        """
        # The towers take pairs of frames of a film; both frames of an image are the image.
        framed = patches.unflatten(1, (self.channels, 1, -1)).expand(-1, -1, self.frames, -1).flatten(1)
        thw = nn.functional.pad(grids * self.merge_size, (1, 0), value=1)
        encoded = self.model(framed, grid_thw=thw, return_dict=True)
        return torch.cat([encoded.pooler_output, *getattr(encoded, "deepstack_features", ())], dim=-1)
