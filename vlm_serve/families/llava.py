"""LLaVA: a CLIP or SigLIP tower, an MLP projector, a Llama-type decoder; in transformers' form
(`LlavaForConditionalGeneration`) and, see `llava_original`, in that of its authors.
"""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_serve.clinical.image import ClinicalImage
from vlm_serve.decoders.config import DecoderConfig
from vlm_serve.encoders.projector import MlpProjector
from vlm_serve.encoders.transformers_tower import TransformersTower
from vlm_serve.families.base import ModelFamily, uninitialized
from vlm_serve.families.folder import read_config, read_image_processor, square_pixels, text_settings
from vlm_serve.families.names import Tower, whole_model_name
from vlm_serve.types import ImageInputs, ImagePieces

VICUNA_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
{{- 'A chat between a curious user and an artificial intelligence assistant. ' -}}
{{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " -}}
{%- endif -%}
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
"""The form in which LLaVA-1.5 and LLaVA-Rad were tuned (arXiv 2310.03744, after Vicuna v1: its sentences stand at the
front of every conversation), for a checkpoint without a template.
"""


class LlavaFamily(ModelFamily):
    """See `ModelFamily`."""

    model_types: tuple[str, ...] = ("llava",)

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__(folder, config)
        self._full = self._read_config()
        self.decoder_config = DecoderConfig.from_hf(text_settings(self._full))
        self.image_token_id = self._full.image_token_id
        with uninitialized(torch.float32, torch.device("meta")):
            self._tower = self.build_vision()
        self.max_tokens_per_image = self._tower.num_tokens

    def _read_config(self) -> Any:
        return read_config(self.folder)

    def default_template(self) -> str:
        return f"{{%- set image_token = {json.dumps(self.image_token)} -%}}\n{VICUNA_TEMPLATE}"

    @cached_property
    def _image_processor(self) -> Any:
        return read_image_processor(self.folder)

    def process_image(self, image: ClinicalImage) -> ImagePieces:
        """By the checkpoint's own processor; `pixel_values` is float32 `[3, image_size, image_size]`.

        Raises:
            CheckpointError: the processor gives another size than the tower takes.
        """
        (pixels,) = square_pixels(self.folder, self._image_processor, image.pixels, self._tower.image_size)
        return (ImageInputs.create({"pixel_values": pixels}, self._tower.grid, self._tower.num_tokens),)

    def rename(self, name: str) -> str | None:
        return whole_model_name(name, self.decoder_config.architecture, self._tower)

    def build_vision(self) -> Tower:
        return TransformersTower(
            self._full.vision_config, self._full.vision_feature_layer, self._full.vision_feature_select_strategy
        )

    def build_projector(self) -> nn.Module:
        return MlpProjector(
            self._tower.out_features,
            self.decoder_config.hidden_size,
            self._full.projector_hidden_act,
            bias=self._full.multimodal_projector_bias,
        )
