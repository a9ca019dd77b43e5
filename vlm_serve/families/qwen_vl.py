"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size as they are, positions in time, height and width.

Lingshu, MedVLM-R1 and HuatuoGPT-Vision-Qwen are checkpoints of these.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from vlm_serve.clinical.image import ClinicalImage
from vlm_serve.decoders.config import DecoderConfig
from vlm_serve.decoders.decoder import Decoder
from vlm_serve.encoders.qwen_tower import QwenTower
from vlm_serve.errors import CheckpointError
from vlm_serve.families.base import ModelFamily, VisionLanguageModel, replace_prefix, uninitialized
from vlm_serve.families.folder import (
    MOST_ELONGATED,
    process_pixels,
    read_config,
    read_image_processor,
    text_settings,
)
from vlm_serve.types import ImageInputs, ImagePieces

PREFIXES = {
    # as transformers has them in memory, and as Qwen3-VL is published
    "model.language_model.": "decoder.",
    "model.visual.": "vision.model.",
    # as Qwen2-VL and Qwen2.5-VL are published and saved
    "visual.": "vision.model.",
    "model.": "decoder.",
    "lm_head.": "decoder.lm_head.",
}


class QwenVisionLanguageModel(VisionLanguageModel):
    """The tower ends in the projector, and takes images of all sizes at once."""

    @torch.inference_mode()
    def encode_images(self, images: Sequence[ImageInputs]) -> list[torch.Tensor]:
        """`[num_tokens, hidden_size * (1 + deepstack_layers)]` of each image, in order, in one forward."""
        assert self.vision is not None
        weight = next(self.vision.parameters())
        patches = torch.cat([torch.as_tensor(inputs.tensors["pixel_values"]) for inputs in images])
        grids = torch.tensor([inputs.grid for inputs in images], device=weight.device)
        encoded = self.vision(patches.to(weight.device, weight.dtype), grids)
        return list(encoded.split([inputs.num_tokens for inputs in images]))


class QwenVlFamily(ModelFamily):
    """See `ModelFamily`. `grid` of an image is rows and columns of its tokens."""

    model_types = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__(folder, config)
        full = read_config(folder)
        self._vision_config: PretrainedConfig = full.vision_config
        with uninitialized(torch.float32, torch.device("meta")):
            self._tower = self.build_vision()
        text = DecoderConfig.from_hf(text_settings(full))
        self.decoder_config = replace(text, deepstack_layers=self._tower.deepstack_layers)
        self.image_token_id = int(full.image_token_id)
        size = self._image_processor.size
        self.max_tokens_per_image = most_tokens(size["shortest_edge"], size["longest_edge"], self._pixels_per_token)

    @property
    def min_tokens_per_image(self) -> int:
        size = self._image_processor.size
        return least_tokens(size["shortest_edge"], size["longest_edge"], self._pixels_per_token)

    @property
    def _pixels_per_token(self) -> int:
        """Of its side."""
        return self._tower.patch_size * self._tower.merge_size

    @cached_property
    def _image_processor(self) -> Any:
        made = read_image_processor(self.folder)
        sizes = ("patch_size", "merge_size", "temporal_patch_size")
        found = tuple(getattr(made, name, None) for name in sizes)
        expected = (self._tower.patch_size, self._tower.merge_size, self._tower.frames)
        if found != expected:
            raise CheckpointError(
                f"The image processor in {self.folder} has {', '.join(sizes)} {found}, but the tower {expected}. Take "
                "preprocessor_config.json from the same checkpoint."
            )
        return made

    def process_image(self, image: ClinicalImage) -> ImagePieces:
        """By the checkpoint's own processor; `pixel_values` is float32 `[patches, 3 * patch_size²]`, of one of the
        alike frames that it makes of an image.

        Raises:
            ImageLimitError: the image is a strip.
        """
        made = process_pixels(self._image_processor, image.pixels)
        (_, height, width), merge = made["image_grid_thw"][0].tolist(), self._tower.merge_size
        grid = height // merge, width // merge
        frames = made["pixel_values"].reshape(height * width, self._tower.channels, self._tower.frames, -1)
        first = frames[:, :, 0].reshape(height * width, -1)
        return (ImageInputs.create({"pixel_values": first}, grid, grid[0] * grid[1]),)

    def rope_positions(self, length: int, images: Sequence[tuple[int, tuple[int, ...]]]) -> np.ndarray:
        """Time, height and width of each token (M-RoPE, arXiv 2409.12191, section 2.1): an image stands still in time,
        and what follows it goes on past the longer of its sides.
        """
        positions = np.empty((3, length), dtype=np.int64)
        begin = following = 0
        for offset, (rows, columns) in images:
            positions[:, begin:offset] = np.arange(following, following + offset - begin)
            following += offset - begin
            begin = offset + rows * columns
            place = np.indices((rows, columns)).reshape(2, -1)
            positions[:, offset:begin] = following
            positions[1:, offset:begin] += place
            following += max(rows, columns)
        positions[:, begin:] = np.arange(following, following + length - begin)
        return positions

    def rename(self, name: str) -> str | None:
        return None if name.endswith("rotary_emb.inv_freq") else replace_prefix(name, PREFIXES)

    def build_vision(self) -> QwenTower:
        return QwenTower(self._vision_config)

    def build_projector(self) -> None:
        """The tower ends in it."""

    def assemble(self, vision: nn.Module | None, projector: nn.Module | None, decoder: Decoder) -> VisionLanguageModel:
        return QwenVisionLanguageModel(vision, projector, decoder)


def least_tokens(min_pixels: int, max_pixels: int, side: int) -> int:
    """A bound of the tokens from below: an image that is too small is scaled up to the least area or more; one that is
    too large is rounded down on both sides, each to more than half of what it was.
    """
    return max(1, math.ceil(min(min_pixels, max_pixels / 4) / side**2))


def most_tokens(min_pixels: int, max_pixels: int, side: int) -> int:
    """A bound of the tokens of `side` by `side` pixels that the processor makes of an image.

    It keeps the area within the limits, but for strips: one that it would make thinner than a token stays a row of
    tokens, and one below `min_pixels` is rounded up.
    """
    fewest, most = min_pixels / side**2, max_pixels / side**2
    strip = math.sqrt(most * MOST_ELONGATED)
    rounded_up = (math.sqrt(fewest * MOST_ELONGATED) + 1) * (math.sqrt(fewest / MOST_ELONGATED) + 1)
    return math.floor(max(most, strip, rounded_up))
