"""LLaVA-NeXT: an image as a whole and as tiles of the best of some resolutions, a newline after each row of tokens.

What the tiles have of padding is left out (LLaVA-NeXT, "any resolution", after arXiv 2310.03744).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.image_processing_utils import select_best_resolution

from vlm_serve.clinical.image import ClinicalImage
from vlm_serve.decoders.decoder import Decoder
from vlm_serve.encoders.projector import MlpProjector
from vlm_serve.errors import CheckpointError, ImageLimitError
from vlm_serve.families.base import VisionLanguageModel
from vlm_serve.families.folder import square_pixels
from vlm_serve.families.llava import LlavaFamily
from vlm_serve.types import ImageInputs, ImagePieces

NEWLINE = ("model.image_newline", "image_newline")


@dataclass(frozen=True, slots=True)
class TileLayout:
    """How the tokens of an image's tiles lie: `rows` by `columns` tiles, and of their patches, seen as one large grid,
    `top` rows at either end and `left` columns at either side are padding.
    """

    rows: int
    columns: int
    top: int
    left: int

    def grid(self, side: int) -> tuple[int, int]:
        """Rows and columns of patches that are no padding.

        Args:
            side: patches of a tile's side.
        """
        return self.rows * side - 2 * self.top, self.columns * side - 2 * self.left

    def num_tokens(self, side: int) -> int:
        """Of the tiles, a newline after each row."""
        height, width = self.grid(side)
        return height * (width + 1)


def layout(height: int, width: int, resolutions: Sequence[tuple[int, int]], tile: int, side: int) -> TileLayout:
    """The tiles of an image of `height` by `width` pixels.

    Args:
        resolutions: those that there are, in pixels.
        tile: its side in pixels.
        side: its side in patches.
    """
    best_height, best_width = select_best_resolution((height, width), list(resolutions))
    rows, columns = best_height // tile, best_width // tile
    # The model's own arithmetic, rounding included: the places of the tokens depend on it.
    if width / height > columns / rows:
        kept = int(round(height * (columns * side / width), 7))
        return TileLayout(rows, columns, (rows * side - kept) // 2, 0)
    kept = int(round(width * (rows * side / height), 7))
    return TileLayout(rows, columns, 0, (columns * side - kept) // 2)


class NewlineProjector(MlpProjector):
    """The projector, and the embedding that ends a row."""

    def __init__(self, in_features: int, hidden_size: int, activation: str, *, bias: bool) -> None:
        super().__init__(in_features, hidden_size, activation, bias=bias)
        self.image_newline = nn.Parameter(torch.empty(hidden_size))


class LlavaNextModel(VisionLanguageModel):
    """It encodes the tiles of all images in one forward, and puts each image's together."""

    @torch.inference_mode()
    def encode_images(self, images: Sequence[ImageInputs]) -> list[torch.Tensor]:
        """`[num_tokens, hidden_size]` of each image, in order: the whole, then the rows of its tiles."""
        assert isinstance(self.projector, NewlineProjector)
        newline = self.projector.image_newline
        pixels = [torch.as_tensor(inputs.tensors["pixel_values"]) for inputs in images]
        packed = torch.cat(pixels).to(newline.device, newline.dtype)
        encoded = self.embed_pixels(packed).split([len(tiles) for tiles in pixels])
        return [
            torch.cat((tiles[0], _unfold(tiles[1:], TileLayout(*inputs.grid), newline)))
            for inputs, tiles in zip(images, encoded, strict=True)
        ]


def _unfold(tiles: torch.Tensor, place: TileLayout, newline: torch.Tensor) -> torch.Tensor:
    """Tiles `[rows * columns, side², hidden]` as one grid without its padding, row by row, each with a newline."""
    side = int(tiles.shape[1] ** 0.5)
    apart = tiles.unflatten(1, (side, side)).unflatten(0, (place.rows, place.columns))
    whole = apart.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    height, width = place.grid(side)
    kept = whole[place.top : place.top + height, place.left : place.left + width]
    return torch.cat((kept, newline.expand(height, 1, -1)), dim=1).flatten(0, 1)


class LlavaNextFamily(LlavaFamily):
    """See `ModelFamily`. `grid` of an image is the four numbers of its `TileLayout`."""

    model_types: tuple[str, ...] = ("llava_next",)

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__(folder, config)
        tile = self._tower.image_size
        self._side = self._tower.grid[0]
        self._resolutions = [(int(height), int(width)) for height, width in self._full.image_grid_pinpoints]
        if not self._resolutions or any(pixels < tile or pixels % tile for pixels in sum(self._resolutions, ())):
            raise CheckpointError(
                f"image_grid_pinpoints is {self._full.image_grid_pinpoints}; each must be a height and a width of "
                f"whole tiles of {tile} pixels."
            )
        if self._tower.num_tokens != self._side**2:
            raise CheckpointError(
                "vision_feature_select_strategy keeps the tower's class token, or drops a patch: the tokens of a tile "
                "would be no square. CLIP towers take 'default', SigLIP towers 'full'."
            )
        tiles = (TileLayout(height // tile, width // tile, 0, 0) for height, width in self._resolutions)
        self.max_tokens_per_image = self._tower.num_tokens + max(one.num_tokens(self._side) for one in tiles)

    @property
    def min_tokens_per_image(self) -> int:
        """Of the whole, and of the thinnest strip across the tiles: what is cut off is as wide on either side."""
        tile, side = self._tower.image_size, self._side
        grids = [(height // tile * side, width // tile * side) for height, width in self._resolutions]
        strips = [((2 - rows % 2) * (columns + 1), rows * (3 - columns % 2)) for rows, columns in grids]
        return self._tower.num_tokens + min(sum(strips, ()))

    def process_image(self, image: ClinicalImage) -> ImagePieces:
        """By the checkpoint's own processor; `pixel_values` is float32 `[1 + tiles, 3, image_size, image_size]`, the
        whole first.

        Raises:
            CheckpointError: the processor gives another size than the tower takes.
            ImageLimitError: the image is a strip, of which nothing would be left.
            ValueError: the processor gives another number of tiles.
        """
        height, width, _ = image.pixels.shape
        place = layout(height, width, self._resolutions, self._tower.image_size, self._side)
        if not all(place.grid(self._side)):
            raise ImageLimitError(
                f"The image is {width} by {height} pixels: so thin a strip has no tokens in this model. Crop it."
            )
        options = {"image_grid_pinpoints": [list(one) for one in self._resolutions]}
        (pixels,) = square_pixels(self.folder, self._image_processor, image.pixels, self._tower.image_size, **options)
        if len(pixels) != 1 + place.rows * place.columns:
            raise ValueError(f"{len(pixels)} tiles")
        count = self._tower.num_tokens + place.num_tokens(self._side)
        grid = (place.rows, place.columns, place.top, place.left)
        return (ImageInputs.create({"pixel_values": pixels}, grid, count),)

    def rename(self, name: str) -> str | None:
        return "projector.image_newline" if name in NEWLINE else super().rename(name)

    def build_projector(self) -> nn.Module:
        return NewlineProjector(
            self._tower.out_features,
            self.decoder_config.hidden_size,
            self._full.projector_hidden_act,
            bias=self._full.multimodal_projector_bias,
        )

    def assemble(self, vision: nn.Module | None, projector: nn.Module | None, decoder: Decoder) -> VisionLanguageModel:
        return LlavaNextModel(vision, projector, decoder)
