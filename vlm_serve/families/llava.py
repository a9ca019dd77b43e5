"""LLaVA: `LlavaForConditionalGeneration`, a CLIP or SigLIP tower, an MLP projector, a Llama-type decoder."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor, LlavaConfig, PretrainedConfig

from vlm_serve.clinical.image import ClinicalImage
from vlm_serve.decoders.config import DecoderConfig
from vlm_serve.encoders.projector import MlpProjector
from vlm_serve.encoders.transformers_tower import TransformersTower
from vlm_serve.errors import CheckpointError
from vlm_serve.families.base import ModelFamily, replace_prefix, uninitialized
from vlm_serve.types import ImageInputs

TOWER = "vision.model."

PREFIXES = {
    # as transformers has them in memory
    "model.language_model.": "decoder.",
    "model.vision_tower.": TOWER,
    "model.multi_modal_projector.": "projector.",
    # as it saves them, and as they are published: there the tower lies in a `vision_model`
    "language_model.model.": "decoder.",
    "language_model.lm_head.": "decoder.lm_head.",
    "vision_tower.": TOWER,
    "multi_modal_projector.": "projector.",
    "lm_head.": "decoder.lm_head.",
}

VICUNA_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}{%- set mark = '' -%}{%- set end = ' ' -%}
{%- elif message.role == 'user' -%}{%- set mark = 'USER: ' -%}{%- set end = ' ' -%}
{%- else -%}{%- set mark = 'ASSISTANT: ' -%}{%- set end = eos_token -%}{%- endif -%}
{{- mark -}}
{%- for part in message.content if part.type == 'image' -%}{{- image_token + '\\n' -}}{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
{{- end -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
"""The form in which LLaVA-1.5 was tuned (arXiv 2310.03744, after Vicuna v1), for a checkpoint without a template."""


class LlavaFamily(ModelFamily):
    """See `ModelFamily`."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__(folder, config)
        self._full = _read_config(folder)
        # transformers ties the word embeddings of the whole model by the outer config.
        text = _inner(self._full.text_config).to_dict() | {"tie_word_embeddings": self._full.tie_word_embeddings}
        self.decoder_config = DecoderConfig.from_hf(text)
        self.image_token_id = self._full.image_token_id
        with uninitialized(torch.float32, torch.device("meta")):
            self._tower = self.build_vision()
        self.max_tokens_per_image = self._tower.num_tokens

    @classmethod
    def matches(cls, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "llava"

    def default_template(self) -> str:
        return f"{{%- set image_token = {json.dumps(self.image_token)} -%}}\n{VICUNA_TEMPLATE}"

    @cached_property
    def _image_processor(self) -> BaseImageProcessor:
        try:
            made = AutoImageProcessor.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, ImportError):
            raise CheckpointError(
                f"{self.folder} has no image processor that can be read (preprocessor_config.json)."
            ) from None
        assert isinstance(made, BaseImageProcessor)
        return made

    def process_image(self, image: ClinicalImage) -> ImageInputs:
        """By the checkpoint's own processor; `pixel_values` is float32 `[3, image_size, image_size]`.

        Raises:
            CheckpointError: the processor gives another size than the tower takes.
        """
        # A copy: torch takes no array that is read-only, as decoded pixels are.
        made = self._image_processor(images=image.pixels.copy(), input_data_format="channels_last", return_tensors="pt")
        pixels = made["pixel_values"][0].numpy().astype(np.float32, copy=False)
        side = self._tower.image_size
        if pixels.shape != (3, side, side):
            raise CheckpointError(
                f"The image processor in {self.folder} gives {pixels.shape}, but the tower takes {(3, side, side)}. "
                "Take preprocessor_config.json from the same checkpoint."
            )
        return ImageInputs.create({"pixel_values": pixels}, self._tower.grid, self._tower.num_tokens)

    def rename(self, name: str) -> str | None:
        if name.endswith(("rotary_emb.inv_freq", "position_ids")):
            return None
        canonical = replace_prefix(name, PREFIXES)
        if canonical.startswith(TOWER):
            inner = canonical.removeprefix(TOWER).removeprefix("vision_model.")
            return TOWER + inner if self._tower.uses(inner) else None
        return canonical

    def build_vision(self) -> TransformersTower:
        return TransformersTower(
            _inner(self._full.vision_config), self._full.vision_feature_layer, self._full.vision_feature_select_strategy
        )

    def build_projector(self) -> nn.Module:
        return MlpProjector(
            self._tower.out_features,
            self.decoder_config.hidden_size,
            self._full.projector_hidden_act,
            bias=self._full.multimodal_projector_bias,
        )


def _inner(config: PretrainedConfig | dict[str, Any] | None) -> PretrainedConfig:
    assert isinstance(config, PretrainedConfig), "transformers fills in the inner configs"
    return config


def _read_config(folder: Path) -> LlavaConfig:
    """The config with the defaults that transformers fills in."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"transformers cannot read {folder}/config.json ({type(error).__name__}).") from None
    assert isinstance(config, LlavaConfig)
    return config
