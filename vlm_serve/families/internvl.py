"""InternVL in transformers' form: an image as tiles on the canvas nearest to its shape, and as a whole behind them."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector, InternVLVisionModel

from vlm_serve.clinical.image import ClinicalImage
from vlm_serve.decoders.config import DecoderConfig
from vlm_serve.encoders.tile_tower import TileTower
from vlm_serve.errors import CheckpointError
from vlm_serve.families.base import ModelFamily, uninitialized
from vlm_serve.families.folder import read_config, read_image_processor, square_pixels, text_settings
from vlm_serve.families.names import whole_model_name
from vlm_serve.types import ImageInputs, ImagePieces


class BlockProjector(InternVLMultiModalProjector):
    """transformers' own, which takes blocks of patches."""

    def __init__(self, config: Any, merged: int) -> None:
        super().__init__(config)
        self._merged = merged

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """patches `[B, side², features]` -> `[B, (side / merged)², hidden_size]`, both row by row."""
        side, merged = int(patches.shape[1] ** 0.5), self._merged
        blocks = patches.unflatten(1, (side // merged, merged, side // merged, merged)).transpose(2, 3)
        return super().forward(blocks.flatten(3).flatten(1, 2))  # type: ignore[no-untyped-call, no-any-return]


class InternVlFamily(ModelFamily):
    """See `ModelFamily`. `grid` of a tile is rows and columns of its tokens."""

    model_types = ("internvl",)

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__(folder, config)
        self._full = read_config(folder)
        layer, strategy = self._full.vision_feature_layer, self._full.vision_feature_select_strategy
        if (layer, strategy) != (-1, "default"):
            raise CheckpointError(
                f"vision_feature_layer is {layer} and vision_feature_select_strategy {strategy!r}; of InternVL only "
                "those with -1 and 'default' are served."
            )
        self.decoder_config = DecoderConfig.from_hf(text_settings(self._full))
        self.image_token_id = self._full.image_token_id
        with uninitialized(torch.float32, torch.device("meta")):
            self._tower = self.build_vision()
        self.max_tokens_per_image = self._tokens_of(self._image_processor.max_patches)

    @property
    def min_tokens_per_image(self) -> int:
        return self._tokens_of(self._image_processor.min_patches)

    def _tokens_of(self, tiles: int) -> int:
        """Of so many, and of the whole beside them where there are several."""
        return self._tower.num_tokens * (tiles + 1 if tiles > 1 else 1)

    @cached_property
    def _image_processor(self) -> Any:
        return read_image_processor(self.folder)

    @property
    def _merged(self) -> int:
        """Patches of a token's side."""
        merged: int = round(1 / self._full.downsample_ratio)
        return merged

    def process_image(self, image: ClinicalImage) -> ImagePieces:
        """By the checkpoint's own processor; `pixel_values` is float32 `[3, image_size, image_size]` of each tile, row
        by row, and of the whole.

        Raises:
            CheckpointError: the processor gives another size than the tower takes.
        """
        # The cutting is in transformers' processor of the whole model, not in the config of that of images.
        made = square_pixels(
            self.folder, self._image_processor, image.pixels, self._tower.image_size, crop_to_patches=True
        )
        tiles = [ImageInputs.create({"pixel_values": one}, self._tower.grid, self._tower.num_tokens) for one in made]
        begin = getattr(self.tokenizer, "start_image_token", "<img>")
        return begin, *tiles, getattr(self.tokenizer, "end_image_token", "</img>")

    def rename(self, name: str) -> str | None:
        return whole_model_name(name, self.decoder_config.architecture)

    def build_vision(self) -> TileTower:
        return TileTower(InternVLVisionModel, self._full.vision_config, self._merged, class_tokens=1)

    def build_projector(self) -> nn.Module:
        return BlockProjector(self._full, self._merged)
