"""Idefics3 and SmolVLM: large images as rows of tiles beside the whole, blocks of patches merged into one token."""

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector, Idefics3VisionTransformer
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector, SmolVLMVisionTransformer

from vlm_serve.clinical.image import ClinicalImage
from vlm_serve.decoders.config import DecoderConfig
from vlm_serve.encoders.tile_tower import TileTower
from vlm_serve.errors import CheckpointError
from vlm_serve.families.base import ModelFamily, uninitialized
from vlm_serve.families.folder import check_square, process_pixels, read_config, read_image_processor, text_settings
from vlm_serve.families.names import whole_model_name
from vlm_serve.types import ImageInputs, ImagePieces

KINDS: Mapping[str, tuple[Any, Any]] = {
    "idefics3": (Idefics3VisionTransformer, Idefics3Connector),
    "smolvlm": (SmolVLMVisionTransformer, SmolVLMConnector),
}
"""Tower and projector by `model_type`."""

PREFIXES = {
    "model.text_model.": "decoder.",
    "model.vision_model.": "vision.model.",
    "model.connector.": "projector.",
    "lm_head.": "decoder.lm_head.",
}

LARGEST_SIDE = 4096
"""The processor makes no image larger than this before it cuts it into tiles."""


class Idefics3Family(ModelFamily):
    """See `ModelFamily`. `grid` of a tile is rows and columns of its tokens."""

    model_types = tuple(KINDS)

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__(folder, config)
        self._full = read_config(folder)
        self.decoder_config = DecoderConfig.from_hf(text_settings(self._full))
        self.image_token_id = self._full.image_token_id
        with uninitialized(torch.float32, torch.device("meta")):
            self._tower = self.build_vision()
        side = self._longest_tiles
        self.max_tokens_per_image = self._tower.num_tokens * (side**2 + 1 if side > 1 else 1)

    @cached_property
    def _image_processor(self) -> Any:
        return read_image_processor(self.folder)

    @property
    def min_tokens_per_image(self) -> int:
        side = self._longest_tiles
        return self._tower.num_tokens * (side + 1 if side > 1 else 1)

    @property
    def _longest_tiles(self) -> int:
        """Along the longer side of any image: it is scaled until this is `size`, then cut."""
        processor = self._image_processor
        if not processor.do_image_splitting:
            return 1
        longest = dict(processor.size).get("longest_edge")
        if not processor.do_resize or longest is None:
            raise CheckpointError(
                f"The image processor in {self.folder} does not bound an image's longer side, so that its tiles cannot "
                "be counted. Set do_resize, and longest_edge of size, in preprocessor_config.json."
            )
        even = min(longest + longest % 2, LARGEST_SIDE)  # the shorter side, which may be as long, is made even
        tiles: int = math.ceil(even / self._tower.image_size)
        return tiles

    def process_image(self, image: ClinicalImage) -> ImagePieces:
        """By the checkpoint's own processor; `pixel_values` is float32 `[3, image_size, image_size]` of each tile, row
        by row, and of the whole.

        Raises:
            CheckpointError: the processor gives another size than the tower takes.
            ValueError: the processor gives another number of tiles than it says.
        """
        made = process_pixels(self._image_processor, image.pixels, return_row_col_info=True)
        check_square(self.folder, made["pixel_values"], self._tower.image_size)
        inputs = [
            ImageInputs.create({"pixel_values": pixels}, self._tower.grid, self._tower.num_tokens)
            for pixels in made["pixel_values"][0]
        ]
        rows, columns = int(made["rows"].item()), int(made["cols"].item())
        if len(inputs) != 1 + rows * columns:
            raise ValueError(f"{len(inputs)} tiles")
        return tuple(self._pieces(inputs, rows, columns))

    def _pieces(self, inputs: list[ImageInputs], rows: int, columns: int) -> Iterator[str | ImageInputs]:
        """Each tile is told by its row and column from 1; 0 rows: the image is one tile, the whole."""
        around = getattr(self.tokenizer, "fake_image_token", "<fake_token_around_image>")
        tiles = iter(inputs)
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                yield f"{around}<row_{row}_col_{column}>"
                yield next(tiles)
            yield "\n"
        before = "\n" if rows else ""
        yield f"{before}{around}{getattr(self.tokenizer, 'global_image_token', '<global-img>')}"
        yield next(tiles)
        yield around

    def rename(self, name: str) -> str | None:
        return whole_model_name(name, self.decoder_config.architecture, prefixes=PREFIXES)

    def build_vision(self) -> TileTower:
        tower, _ = KINDS[self._full.model_type]
        return TileTower(tower, self._full.vision_config, self._full.scale_factor)

    def build_projector(self) -> nn.Module:
        _, projector = KINDS[self._full.model_type]
        return projector(self._full)  # type: ignore[no-any-return]
