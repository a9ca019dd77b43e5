"""LLaVA-Rad (arXiv 2403.08002): LLaVA 1.5 whose tower is that of BiomedCLIP-CXR, a vision transformer of timm's that
was trained with open_clip, for films of 518 by 518 pixels.

It is published as parts: an adapter and a projector for Vicuna, and the tower's whole open_clip model, with its config.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.data.transforms_factory import create_transform

from vlm_serve.encoders.open_clip_tower import OpenClipTower
from vlm_serve.errors import CheckpointError
from vlm_serve.families.base import read_json
from vlm_serve.families.llava_original import PREFIXES, OriginalLlavaFamily
from vlm_serve.families.names import TOWER, whole_model_name
from vlm_serve.families.plausible import MOST

TOWERS: dict[str, dict[str, Any]] = {
    "biomedclip_cxr_518": {"timm_model_name": "vit_base_patch14_dinov2", "image_size": 518},
}
"""What open_clip's configs say of the towers (`vision_cfg`), by `mm_vision_tower`; for folders without that config."""

OPEN_CLIP_PREFIXES = {
    "model.vision_tower.vision_tower.vit.": TOWER,
    "module.visual.trunk.": TOWER,
    "visual.trunk.": TOWER,
} | PREFIXES

NOT_THE_TRUNK = ("text.", "visual.head.", "logit_scale", "logit_bias")
"""What an open_clip model holds beside its tower."""


class OpenClipProcessor:
    """open_clip's preparation of an image for a tower of squares, called as transformers' processors are.

    Args:
        side: pixels.
    """

    image_mean = OPENAI_CLIP_MEAN

    def __init__(self, side: int) -> None:
        # timm's does the same: the shorter side to `side`, the middle cut out.
        self._transform = create_transform(
            side, interpolation="bicubic", crop_pct=1.0, mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD
        )

    def __call__(self, images: np.ndarray, **options: Any) -> dict[str, torch.Tensor]:
        """uint8 `[rows, columns, 3]` -> `pixel_values`, float32 `[1, 3, side, side]`."""
        return {"pixel_values": self._transform(Image.fromarray(images))[None]}


class LlavaRadFamily(OriginalLlavaFamily):
    """See `ModelFamily`."""

    tower_names = "model.vision_tower.vision_tower.vit.… or visual.trunk.…"

    @classmethod
    def matches(cls, config: Mapping[str, Any]) -> bool:
        if not super().matches(config):
            return False
        return config.get("mm_vision_tower") in tuple(TOWERS) or bool(config.get("mm_vision_tower_config"))

    def _vision_config(self) -> None:
        """None: the tower is none of transformers'."""

    def build_vision(self) -> OpenClipTower:
        settings = self._open_clip_config()
        name, side = settings.get("timm_model_name"), settings.get("image_size")
        if not isinstance(name, str) or type(side) is not int or not 1 <= side <= MOST["image_size"]:
            raise CheckpointError(
                f"The config of the tower of {self.folder} says no timm_model_name or no image_size as one number from "
                f"1 to {MOST['image_size']}; open_clip's towers are served where they are timm's."
            )
        return OpenClipTower(name, side, self._full.vision_feature_layer, self._full.vision_feature_select_strategy)

    def _open_clip_config(self) -> dict[str, Any]:
        """`vision_cfg` of the file that config.json names or that is published, or what is known of the tower."""
        tower, named = self.config.get("mm_vision_tower"), self.config.get("mm_vision_tower_config")
        files = (Path(named or "").name, "biomedclipcxr_518.json", "open_clip_config.json")
        for file in files:
            for folder in (self._tower_folder, self.folder):
                content = read_json(folder / file) if file else {}
                if content:
                    whole = content.get("model_cfg", content)
                    found = whole.get("vision_cfg") if isinstance(whole, dict) else None
                    return found if isinstance(found, dict) else {}
        if tower not in TOWERS:
            raise CheckpointError(
                f"mm_vision_tower is {tower!r}, whose config {named!r} is not in {self.folder}. Put it there, and the "
                f"tower's weights as safetensors ({self.tower_names})."
            )
        return TOWERS[tower]

    @cached_property
    def _image_processor(self) -> OpenClipProcessor:
        return OpenClipProcessor(self._tower.image_size)

    def rename(self, name: str) -> str | None:
        if name.removeprefix("module.").startswith(NOT_THE_TRUNK):
            return None
        return whole_model_name(name, self.decoder_config.architecture, self._tower, OPEN_CLIP_PREFIXES)

    def rename_published(self, name: str) -> str | None:
        """As `rename`: an open_clip model's own names are known there."""
        return self.rename(name)
