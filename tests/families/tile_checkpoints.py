"""Tiny checkpoints of models that cut images into tiles: Idefics3, SmolVLM, LLaVA-NeXT and InternVL. Random weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import make_tokenizer, tiny_text_config, tiny_vision_config

# isort: split
from transformers import (
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
)

TEMPLATE = """\
{%- for message in messages -%}
{{- '<|turn|>' + message.role + ':' -}}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- 'IMAGE' -}}{%- else -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn|>assistant:' -}}{%- endif -%}
"""
"""It puts an image's placeholder, IMAGE here, next to text and to other images."""

IDEFICS3_TOKENS = [
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    "<row_1_col_1>",
    "<row_1_col_2>",
    "<row_2_col_1>",
]
"""No `<row_2_col_2>`: an image may have more tiles than the tokenizer has names for, which are spelled out then."""

IDEFICS3 = {
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessor),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessor),
}


def make_idefics3(
    folder: Path,
    kind: str,
    *,
    heads: tuple[int, int] = (4, 2),
    vision_heads: int = 2,
    splits: bool = True,
    scale_factor: int = 2,
    seed: int = 0,
    **text_changes: Any,
) -> PreTrainedModel:
    """Writes a whole checkpoint, tiles of 16 by 16 pixels, and returns transformers' model, fp32, in eval.

    The processor is Idefics3's for both, which differ in films alone: SmolVLM's wants a package that spells numbers.

    Args:
        kind: the `model_type`.
        heads: of queries, and of keys and values; each is 16 wide.
        vision_heads: of the tower, each 8 wide.
        splits: whether images are cut into tiles.
        scale_factor: patches of a token's side.
        text_changes: fields of the text config.
    """
    torch.manual_seed(seed)
    config_type, model_type, processor_type = IDEFICS3[kind]
    tokenizer = _tokenizer(IDEFICS3_TOKENS)
    config = config_type(
        text_config=_text_config(tokenizer, heads, **text_changes),
        vision_config={
            "hidden_size": 8 * vision_heads,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": vision_heads,
            "image_size": 16,
            "patch_size": 4,
            "initializer_range": 0.2,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=scale_factor,
        tie_word_embeddings=text_changes.get("tie_word_embeddings", False),
        pad_token_id=3,
    )
    model = _shaken(model_type(config))
    model.save_pretrained(folder)
    Idefics3Processor(
        processor_type(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 16}, do_image_splitting=splits, resample=2
        ),
        tokenizer,
        image_seq_len=(4 // scale_factor) ** 2,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    ).save_pretrained(folder)
    return model


RESOLUTIONS = [[12, 24], [24, 12], [24, 24], [36, 12], [12, 36]]


def make_llava_next(
    folder: Path,
    vision: str = "clip",
    *,
    patch_size: int = 4,
    names_in_memory: bool = False,
    heads: tuple[int, int] = (4, 2),
    feature_layer: int | list[int] = -2,
    seed: int = 0,
    **text_changes: Any,
) -> PreTrainedModel:
    """Writes a whole checkpoint, tiles of 12 by 12 pixels, and returns transformers' model, fp32, in eval.

    Args:
        vision: "clip" or "siglip".
        names_in_memory: the weights are named as the modules are (`model.language_model.…`), not as they are published.
        heads: of queries, and of keys and values; each is 16 wide.
        text_changes: fields of the text config.
    """
    torch.manual_seed(seed)
    tokenizer = _tokenizer([])
    strategy = "default" if vision == "clip" else "full"
    config = LlavaNextConfig(
        vision_config=tiny_vision_config(vision, image_size=12, patch_size=patch_size),
        text_config=_text_config(tokenizer, heads, **text_changes),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=strategy,
        image_grid_pinpoints=RESOLUTIONS,
        tie_word_embeddings=text_changes.get("tie_word_embeddings", False),
    )
    model = _shaken(LlavaNextForConditionalGeneration(config))
    model.save_pretrained(folder, save_original_format=not names_in_memory)
    square = {"height": 12, "width": 12}
    LlavaNextProcessor(
        LlavaNextImageProcessor(size={"shortest_edge": 12}, crop_size=square, image_grid_pinpoints=RESOLUTIONS),
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1 if vision == "clip" else 0,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    ).save_pretrained(folder)
    return model


def make_internvl(
    folder: Path,
    *,
    names_in_memory: bool = False,
    heads: tuple[int, int] = (4, 2),
    vision_heads: int = 2,
    vision_changes: Mapping[str, Any] | None = None,
    seed: int = 0,
    **text_changes: Any,
) -> PreTrainedModel:
    """Writes a whole checkpoint, up to 4 tiles of 16 by 16 pixels and 4 tokens, and returns transformers' model, fp32,
    in eval.

    Args:
        names_in_memory: the weights are named as the modules are (`model.language_model.…`), not as they are published.
        heads: of queries, and of keys and values; each is 16 wide.
        vision_heads: of the tower, each 8 wide.
        vision_changes: fields of the vision config.
        text_changes: fields of the text config, Qwen2's unless `model_type` says another.
    """
    torch.manual_seed(seed)
    marks = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<image>"}
    _tokenizer(["<img>", "</img>", "<video>"]).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, extra_special_tokens=marks | {"video_token": "<video>"})
    vision = {
        "hidden_size": 8 * vision_heads,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": vision_heads,
        "image_size": 16,
        "patch_size": 4,
        "initializer_range": 0.2,
    }
    config = InternVLConfig(
        vision_config=vision | dict(vision_changes or {}),
        text_config=_text_config(tokenizer, heads, **({"model_type": "qwen2"} | text_changes)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        tie_word_embeddings=text_changes.get("tie_word_embeddings", False),
    )
    model = _shaken(InternVLForConditionalGeneration(config))
    model.save_pretrained(folder, save_original_format=not names_in_memory)
    size = {"height": 16, "width": 16}
    InternVLProcessor(
        GotOcr2ImageProcessor(size=size, max_patches=4),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    ).save_pretrained(folder)
    return model


def _tokenizer(special_tokens: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<|turn|>", *special_tokens]})
    return tokenizer


def _text_config(tokenizer: PreTrainedTokenizerFast, heads: tuple[int, int], **changes: Any) -> Any:
    queries, keys = heads
    shape = {"hidden_size": 16 * queries, "num_attention_heads": queries, "num_key_value_heads": keys}
    return tiny_text_config(**({"vocab_size": len(tokenizer), "intermediate_size": 96} | shape | changes))


def _shaken(model: PreTrainedModel) -> PreTrainedModel:
    """Norms of ones and biases of zero would hide a wrong name."""
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()
