"""A timm tower before a text model: the form of the embedded default, described by a small config.json.

    {"model_type": "vlm_serve_timm", "text_config": {…}, "image_token_id": 49152, "notice": "…",
     "vision": {"model": "tf_efficientnet_lite0", "arguments": {}, "image_size": 256, "grid": [8, 8],
                "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
     "projector": {"in_features": 1280, "activation": "gelu"}}

Tensors: `model.…` and `lm_head.…` as transformers names them in the text model (here `LlamaForCausalLM`), so that an
adapter trained on that alone fits; `vision.…` as timm does, `projector.linear_1.…`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vlm_serve.clinical.image import ClinicalImage
from vlm_serve.decoders.config import KNOWN, DecoderConfig
from vlm_serve.decoders.names import text_name
from vlm_serve.encoders.projector import MlpProjector
from vlm_serve.encoders.timm_tower import TimmTower
from vlm_serve.errors import CheckpointError
from vlm_serve.families.base import ModelFamily, read_tokenizer
from vlm_serve.types import ImageInputs, ImagePieces

MODEL_TYPE = "vlm_serve_timm"


class TimmVlmFamily(ModelFamily):
    """See `ModelFamily`."""

    model_types = (MODEL_TYPE,)

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__(folder, config)
        try:
            text = dict(config["text_config"])
            vision = config["vision"]
            self.image_token_id = int(config["image_token_id"])
            self.image_size = int(vision["image_size"])
            rows, columns = vision["grid"]
            self.grid = (int(rows), int(columns))
            self.mean = np.asarray(vision["mean"], dtype=np.float32)
            self.std = np.asarray(vision["std"], dtype=np.float32)
            self._timm_name, self._timm_arguments = str(vision["model"]), dict(vision.get("arguments", {}))
            self._in_features = int(config["projector"]["in_features"])
            self._activation = str(config["projector"]["activation"])
            known = text.get("model_type") in KNOWN
            self.decoder_config = DecoderConfig.from_hf(AutoConfig.for_model(**text).to_dict() if known else text)
        except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
            raise CheckpointError(f"{folder}/config.json lacks or garbles the field {error}.") from None
        self.max_tokens_per_image = self.grid[0] * self.grid[1]

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """By its own file alone: `AutoTokenizer` would warn that it does not know the config's model type."""
        return read_tokenizer(PreTrainedTokenizerFast, self.folder)

    def process_image(self, image: ClinicalImage) -> ImagePieces:
        """The whole image in a black square, its aspect kept; `pixel_values` is float32 `[3, size, size]`."""
        square = letterbox(image.pixels, self.image_size).astype(np.float32)
        normal = (square / 255 - self.mean) / self.std
        return (ImageInputs.create({"pixel_values": normal.transpose(2, 0, 1)}, self.grid, self.max_tokens_per_image),)

    def rename(self, name: str) -> str | None:
        if name.startswith("vision."):
            return name.replace("vision.", "vision.model.", 1)
        return name if name.startswith("projector.") else text_name(self.decoder_config.architecture, name)

    def build_vision(self) -> TimmTower:
        return TimmTower(self._timm_name, self.grid, self._timm_arguments)

    def build_projector(self) -> nn.Module:
        return MlpProjector(self._in_features, self.decoder_config.hidden_size, self._activation)


def letterbox(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 `[rows, columns, 3]` -> uint8 `[size, size, 3]`: scaled to fit, centred, black around it."""
    rows, columns, _ = pixels.shape
    scale = size / max(rows, columns)
    height, width = max(1, round(rows * scale)), max(1, round(columns * scale))
    fitted = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    square = np.zeros((size, size, 3), dtype=np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = np.asarray(fitted)
    return square
