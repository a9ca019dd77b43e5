"""PaliGemma and PaliGemma 2: a SigLIP tower, and a prompt of which every token sees every other, images and question.

They take one message: images first, then the question, as they were tuned (arXiv 2412.03555).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.models.paligemma.modeling_paligemma import PaliGemmaMultiModalProjector

from vlm_serve.clinical.image import ClinicalImage
from vlm_serve.decoders.config import DecoderConfig
from vlm_serve.encoders.transformers_tower import TransformersTower
from vlm_serve.families.base import ModelFamily, Prompt, uninitialized
from vlm_serve.families.folder import read_config, read_image_processor, square_pixels, text_settings
from vlm_serve.families.names import whole_model_name
from vlm_serve.types import ChatInput, ImageInputs, ImagePieces

TEMPLATE = """\
{%- if messages | length != 1 or messages[0].role != 'user' -%}
{{- raise_exception('The model takes one message of the user.') -}}
{%- endif -%}
{%- for part in messages[0].content if part.type == 'image' -%}{{- '<image>' -}}{%- endfor -%}
{{- bos_token -}}
{%- for part in messages[0].content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
{{- '\\n' -}}
"""
"""What transformers' processor makes of images and a question; the checkpoints bring no template."""


class PaliGemmaFamily(ModelFamily):
    """See `ModelFamily`."""

    model_types = ("paligemma",)
    attends_both_ways = True

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__(folder, config)
        self._full = read_config(folder)
        # This field of the text config is of the prompt alone, which `both_ways_prefix` has.
        text = text_settings(self._full) | {"use_bidirectional_attention": None}
        self.decoder_config = DecoderConfig.from_hf(text)
        self.image_token_id = self._full.image_token_id
        with uninitialized(torch.float32, torch.device("meta")):
            self._tower = self.build_vision()
        self.max_tokens_per_image = self._tower.num_tokens

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """One that adds no token of its own: the template writes `<bos>`, behind the images."""
        tokenizer: Any = super().load_tokenizer()
        tokenizer.add_bos_token = False
        tokenizer.add_eos_token = False
        return tokenizer  # type: ignore[no-any-return]

    def default_template(self) -> str:
        return TEMPLATE.replace("'<image>'", repr(self.image_token))

    def render_chat(self, chat: ChatInput, images: Sequence[ImagePieces]) -> Prompt:
        prompt = super().render_chat(chat, images)
        return replace(prompt, both_ways_prefix=len(prompt.token_ids))

    def encode_text(self, text: str) -> Prompt:
        """With the `<bos>` in front that a chat has from the template, unless it was written."""
        token_ids, bos = super().encode_text(text).token_ids, self.tokenizer.bos_token_id
        assert isinstance(bos, int)
        return self.encode_ids(token_ids if token_ids[0] == bos else (bos, *token_ids))

    def encode_ids(self, token_ids: Sequence[int]) -> Prompt:
        return replace(super().encode_ids(token_ids), both_ways_prefix=len(token_ids))

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

    def build_vision(self) -> TransformersTower:
        return TransformersTower(self._full.vision_config, None, "full")

    def build_projector(self) -> nn.Module:
        return PaliGemmaMultiModalProjector(self._full)
