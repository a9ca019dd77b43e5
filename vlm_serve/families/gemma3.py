"""Gemma3 and MedGemma: a SigLIP tower whose patches are pooled to few tokens, which see each other both ways.

Pan-and-scan, crops of long images beside the whole, is on where the checkpoint's preprocessor_config.json says so.
"""

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

from vlm_serve.clinical.image import ClinicalImage
from vlm_serve.decoders.config import DecoderConfig
from vlm_serve.encoders.transformers_tower import TransformersTower
from vlm_serve.errors import CheckpointError
from vlm_serve.families.base import ModelFamily, uninitialized
from vlm_serve.families.folder import read_config, read_image_processor, square_pixels, text_settings
from vlm_serve.families.names import whole_model_name
from vlm_serve.types import ImageInputs, ImagePieces

PAN_AND_SCAN = {
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
"""What transformers' processor takes where the checkpoint's config has nothing."""


class Gemma3Family(ModelFamily):
    """See `ModelFamily`. `grid` of an image is rows and columns of its pooled tokens."""

    model_types = ("gemma3",)
    attends_both_ways = True

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__(folder, config)
        self._full = read_config(folder)
        # transformers caps the logits of the text model alone.
        self.decoder_config = DecoderConfig.from_hf(text_settings(self._full) | {"final_logit_softcapping": None})
        self.image_token_id = self._full.image_token_id
        with uninitialized(torch.float32, torch.device("meta")):
            self._tower = self.build_vision()
        self._inputs_tokens: int = self._full.mm_tokens_per_image
        side = math.isqrt(self._inputs_tokens)
        if side**2 != self._inputs_tokens or self._tower.grid[0] % side:
            raise CheckpointError(
                f"mm_tokens_per_image is {self._inputs_tokens}; it must be a square that divides the tower's "
                f"{self._tower.grid[0]} by {self._tower.grid[1]} patches."
            )
        self.grid = side, side
        window = self.decoder_config.sliding_window
        if window is not None and window < self._inputs_tokens:
            raise CheckpointError(
                f"sliding_window is {window}, less than the {self._inputs_tokens} tokens of an image. "
                "Such a checkpoint is not served."
            )
        crops = self._pan_and_scan["pan_and_scan_max_num_crops"] if self._pan_and_scan else 0
        self.max_tokens_per_image = self._inputs_tokens * (1 + crops)

    @property
    def min_tokens_per_image(self) -> int:
        return self._inputs_tokens

    @cached_property
    def _image_processor(self) -> Any:
        return read_image_processor(self.folder)

    @cached_property
    def _pan_and_scan(self) -> dict[str, Any]:
        """The processor's settings of it; empty: it is off."""
        processor = self._image_processor
        if not getattr(processor, "do_pan_and_scan", None):
            return {}
        return {name: getattr(processor, name, None) or default for name, default in PAN_AND_SCAN.items()}

    @cached_property
    def template_image(self) -> str:
        """The token that begins an image: the template writes it alone."""
        return self._token(self._full.boi_token_index)

    def _token(self, token_id: int) -> str:
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):
            raise CheckpointError(f"The tokenizer in {self.folder} has no token {token_id}, which config.json names.")
        return token

    def process_image(self, image: ClinicalImage) -> ImagePieces:
        """By the checkpoint's own processor; `pixel_values` is float32 `[3, image_size, image_size]` of the whole, and
        of each crop.

        Raises:
            CheckpointError: the processor gives another size than the tower takes.
        """
        side = self._tower.image_size
        made = square_pixels(self.folder, self._image_processor, image.pixels, side, **self._pan_and_scan)
        whole, *crops = [self._framed(pixels) for pixels in made]
        if not crops:
            return whole
        pieces = ("Here is the original image ", *whole, " and here are some crops to help you see better ", *crops[0])
        return pieces + tuple(piece for crop in crops[1:] for piece in (" ", *crop))

    def _framed(self, pixels: np.ndarray) -> ImagePieces:
        inputs = ImageInputs.create({"pixel_values": pixels}, self.grid, self._inputs_tokens, attends_both_ways=True)
        end = self._token(self._full.eoi_token_index)
        return f"\n\n{self.template_image}", inputs, f"{end}\n\n"

    def rename(self, name: str) -> str | None:
        return whole_model_name(name, self.decoder_config.architecture, self._tower)

    def build_vision(self) -> TransformersTower:
        return TransformersTower(self._full.vision_config, None, "full")

    def build_projector(self) -> nn.Module:
        return Gemma3MultiModalProjector(self._full)
