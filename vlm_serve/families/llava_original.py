"""LLaVA as its authors save it (`model.mm_projector.0.weight`): LLaVA-Med and others trained with their code.

Such a folder holds neither the tower's config nor an image processor, only the tower's name, and where the tower was
not trained, none of its weights. A folder `vision_tower` in it may hold the tower as it was published.
"""

import ast
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AddedToken,
    AutoConfig,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
)

from vlm_serve.clinical.image import ClinicalImage
from vlm_serve.decoders.decoder import Decoder
from vlm_serve.digests import folder_digest
from vlm_serve.errors import CheckpointError
from vlm_serve.families.base import IDENTITY_FILES, VisionLanguageModel, read_json, read_tokenizer, uninitialized
from vlm_serve.families.folder import check_no_strip, config_errors, read_config, read_image_processor
from vlm_serve.families.llava import LlavaFamily
from vlm_serve.families.llava_next import LlavaNextFamily
from vlm_serve.families.names import TOWER, whole_model_name
from vlm_serve.families.sentencepiece import SPACE
from vlm_serve.layers.loading import Tell, load_checkpoint, weight_files
from vlm_serve.types import ImagePieces

TEXT_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
"""The decoder by `model_type`."""

CLIP_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}

TOWERS: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14": CLIP_LARGE | {"image_size": 224},
    "clip-vit-large-patch14-336": CLIP_LARGE | {"image_size": 336},
    "siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 384,
    },
}
"""Their configs, by the last part of `mm_vision_tower`, which may be a path of the machine that trained."""

TOWER_FOLDER = "vision_tower"

SELECTIONS = {"patch": "default", "cls_patch": "full"}

PREFIXES = {
    "model.vision_tower.vision_tower.": TOWER,
    "model.mm_projector.0.": "projector.linear_1.",
    "model.mm_projector.2.": "projector.linear_2.",
    "model.image_newline": "projector.image_newline",
    "model.": "decoder.",
    "lm_head.": "decoder.lm_head.",
}

NOT_THE_TOWERS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
"""What a CLIP or SigLIP model as published holds beside its tower."""

MISTRAL_TEMPLATE = """\
{%- set said = namespace(system='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- for part in message.content if part.type == 'text' -%}
{%- set said.system = '<<SYS>>\\n' + part.text + '\\n<</SYS>>\\n\\n' -%}
{%- endfor -%}
{%- elif message.role == 'user' -%}
{{- '[INST] ' + said.system -}}
{%- set said.system = '' -%}
{%- for part in message.content if part.type == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
{{- ' [/INST]' -}}
{%- else -%}
{%- for part in message.content if part.type == 'text' -%}{{- ' ' + part.text + ' ' + eos_token -}}{%- endfor -%}
{%- endif -%}
{%- endfor -%}
"""
"""The form in which LLaVA-Med 1.5 was tuned (arXiv 2306.00890's code, `mistral_instruct`)."""


class OriginalLlavaFamily(LlavaFamily):
    """See `ModelFamily`."""

    model_types = tuple(TEXT_TYPES)
    aspect_ratios: tuple[str, ...] = ("square", "pad")
    patch_merges: tuple[str, ...] = ("flat",)
    tower_names = "model.vision_tower.vision_tower.vision_model.…"
    """Of the tower's tensors in a whole checkpoint."""

    @classmethod
    def matches(cls, config: Mapping[str, Any]) -> bool:
        return super().matches(config) and ("mm_vision_tower" in config or config["model_type"] != "llava")

    def _read_config(self) -> Any:
        """The config in transformers' form."""
        self._check_config()
        ours = dict(self.config)
        vision = self._vision_config()
        selection = SELECTIONS[ours.get("mm_vision_select_feature", "patch")]
        if vision is not None and vision.model_type == "siglip_vision_model":
            selection = "full"  # it has no class token to drop
        text = {name: value for name, value in ours.items() if not name.startswith(("mm_", "image_", "architectures"))}
        with config_errors(self.folder):
            return self._whole_config(
                vision_config=vision,
                text_config=text | {"model_type": TEXT_TYPES[ours["model_type"]]},
                image_token_index=self.tokenizer.convert_tokens_to_ids("<image>"),
                projector_hidden_act="gelu",
                vision_feature_layer=ours.get("mm_vision_select_layer", -2),
                vision_feature_select_strategy=selection,
                tie_word_embeddings=ours.get("tie_word_embeddings", False),
            )

    def _whole_config(self, **settings: Any) -> Any:
        return LlavaConfig(**settings)

    def _check_config(self) -> None:
        adapter = read_json(self.folder / "adapter_config.json")
        if adapter:
            raise CheckpointError(
                f"{self.folder} is an adapter of {adapter.get('base_model_name_or_path')}, no whole model. Merge it "
                "into that with its authors' script (scripts/merge_lora_weights.py), as safetensors; or make a folder "
                f"of that base, where {self._needed}, and put this adapter, as adapter_model.safetensors, into the "
                "folder of --adapters."
            )
        for field, default, known in (
            ("mm_projector_type", "linear", ["mlp2x_gelu"]),
            ("mm_vision_select_feature", "patch", tuple(SELECTIONS)),
            ("image_aspect_ratio", "square", self.aspect_ratios),
            ("mm_patch_merge_type", "flat", self.patch_merges),
            ("mm_use_im_start_end", False, [False]),
        ):
            if (value := self.config.get(field, default)) not in known:
                raise CheckpointError(
                    f"{field} is {value!r}; of checkpoints in LLaVA's own form those with "
                    f"{', '.join(map(repr, known))} are served. Convert it to transformers' form."
                )
        for field, types, wanted in (
            ("mm_vision_tower", (str, type(None)), "a name"),
            ("mm_vision_tower_config", (str, type(None)), "a file's name"),
            ("mm_vision_select_layer", (int,), "one whole number, such as -2"),
        ):
            if field in self.config and type(value := self.config[field]) not in types:
                raise CheckpointError(
                    f"{field} in {self.folder}/config.json is {repr(value)[:80]}; it must be {wanted}. Take the file "
                    "from the same checkpoint as the weights."
                )

    @property
    def _needed(self) -> str:
        return (
            "config.json and the tokenizer lie beside safetensors files that hold the decoder (model.layers.…, "
            "model.embed_tokens, model.norm, lm_head), the projector (model.mm_projector.0 and .2) and the tower "
            f"({self.tower_names})"
        )

    @property
    def _tower_folder(self) -> Path:
        return self.folder / TOWER_FOLDER

    def _vision_config(self) -> Any:
        if (self._tower_folder / "config.json").is_file():
            config = read_config(self._tower_folder)
            return getattr(config, "vision_config", config)
        name = self.config.get("mm_vision_tower")
        settings = TOWERS.get(Path(str(name)).name)
        if settings is None:
            raise CheckpointError(
                f"mm_vision_tower is {name!r}; known are {', '.join(TOWERS)}. Put another's own folder, with its "
                f"config.json and safetensors files, into {self._tower_folder}."
            )
        return AutoConfig.for_model(**settings)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """With a placeholder, which LLaVA's own code has outside of it. By its own file alone: `AutoTokenizer` would
        warn that it does not know the config's model type.
        """
        tokenizer = read_tokenizer(PreTrainedTokenizerFast, self.folder)
        if "<image>" not in tokenizer.get_vocab():
            tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
        return tokenizer

    def default_template(self) -> str:
        return MISTRAL_TEMPLATE if self.decoder_config.architecture == "mistral" else super().default_template()

    @cached_property
    def _image_processor(self) -> Any:
        if (self._tower_folder / "preprocessor_config.json").is_file():
            return read_image_processor(self._tower_folder)
        side = self._tower.image_size
        square = {"height": side, "width": side}
        if self._full.vision_config.model_type == "siglip_vision_model":
            return SiglipImageProcessor(size=square)
        return CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square)

    @cached_property
    def _after_image(self) -> ImagePieces:
        """What LLaVA's own code has behind an image: it makes tokens of the text there by itself, and SentencePiece
        puts a space in front of every text.
        """

        def tokens(text: str) -> list[int]:
            return list(self.tokenizer.encode(text, add_special_tokens=False))

        _, *behind = tokens(f"{self.image_token}{SPACE}\n")
        return (SPACE,) if behind == tokens("\n") != tokens(f"{self.image_token}\n")[1:] else ()

    def process_image(self, image: ClinicalImage) -> ImagePieces:
        """As the tower takes it; with `image_aspect_ratio` `pad`, first made a square with bars of the mean colour."""
        if self.config.get("image_aspect_ratio") == "pad":
            check_no_strip(image.pixels)  # its square would take gigabytes
            colour = [int(255 * mean) for mean in self._image_processor.image_mean]
            image = replace(image, pixels=as_square(image.pixels, colour))
        return (*super().process_image(image), *self._after_image)

    def rename(self, name: str) -> str | None:
        return whole_model_name(name, self.decoder_config.architecture, self._tower, PREFIXES)

    def rename_published(self, name: str) -> str | None:
        """Our name of a tensor of the tower's own folder; see `rename`."""
        if name.startswith(NOT_THE_TOWERS):
            return None
        return self.rename(f"model.vision_tower.vision_tower.{name}")

    @cached_property
    def model_digest(self) -> str:
        """Of the tower's own folder, too."""
        patterns = [f"{place}{pattern}" for place in ("", f"{TOWER_FOLDER}/") for pattern in IDENTITY_FILES]
        return folder_digest(self.folder, patterns)

    def build(self, dtype: torch.dtype, device: torch.device, tell: Tell = lambda what: None) -> VisionLanguageModel:
        """See `ModelFamily.build`; the tower is read from its own folder where there is one."""
        if not self._tower_folder.is_dir():
            self._check_weights()
            return super().build(dtype, device, tell)
        self.untie_a_head_of_its_own()
        with uninitialized(dtype, device):
            vision, projector, decoder = self.build_vision(), self.build_projector(), Decoder(self.decoder_config)
        rest = nn.ModuleDict({"projector": projector, "decoder": decoder})
        load_checkpoint(self.folder, rest, self.rename, self.split, self.quantization, tell)
        load_checkpoint(self._tower_folder, nn.ModuleDict({"vision": vision}), self.rename_published, tell=tell)
        return self.assemble(vision, projector, decoder).requires_grad_(False).eval()

    def _check_weights(self) -> None:
        if not any(self.folder.glob("*.safetensors")):
            raise CheckpointError(
                f"{self.folder} has no safetensors files, and no pickle is opened. Save it so that {self._needed}."
            )
        names: list[str] = []
        for file in weight_files(self.folder):
            with safe_open(file, framework="pt") as tensors:
                names += tensors.keys()
        if not any((self.rename(name) or "").startswith(TOWER) for name in names):
            raise CheckpointError(
                f"{self.folder} has no weights of its vision tower, {self.config.get('mm_vision_tower')!r}, which "
                f"LLaVA's own code fetches by that name. Put the safetensors files and the config of that model into "
                f"{self._tower_folder}."
            )


class OriginalLlavaNextFamily(OriginalLlavaFamily, LlavaNextFamily):
    """LLaVA 1.6 (NeXT) as its authors save it. See `ModelFamily`."""

    model_types = OriginalLlavaFamily.model_types
    aspect_ratios = ("anyres",)
    patch_merges = ("spatial_unpad",)

    @classmethod
    def matches(cls, config: Mapping[str, Any]) -> bool:
        return super().matches(config) and config.get("image_aspect_ratio") == "anyres"

    def _whole_config(self, **settings: Any) -> Any:
        pinpoints: Any = self.config.get("image_grid_pinpoints")
        try:
            pairs = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
            resolutions = [[int(height), int(width)] for width, height in pairs]  # theirs have the width first
        except (SyntaxError, TypeError, ValueError, OverflowError):
            raise CheckpointError(
                f"image_grid_pinpoints is {pinpoints!r}; it must be a list of widths and heights in pixels."
            ) from None
        return LlavaNextConfig(image_grid_pinpoints=resolutions, **settings)

    @cached_property
    def _image_processor(self) -> Any:
        side, tower = self._tower.image_size, super()._image_processor
        return LlavaNextImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=tower.image_mean,
            image_std=tower.image_std,
        )


def as_square(pixels: np.ndarray, colour: list[int]) -> np.ndarray:
    """uint8 `[rows, columns, 3]` in the middle of a square of a colour, whose side is the longer of theirs."""
    rows, columns, _ = pixels.shape
    side = max(rows, columns)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = colour
    top, left = (side - rows) // 2, (side - columns) // 2
    square[top : top + rows, left : left + columns] = pixels
    return square
