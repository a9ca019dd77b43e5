"""Tiny Qwen2-VL, Qwen2.5-VL and Qwen3-VL checkpoints with random weights, tokenizer and template of their form."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import vlm_serve.encoders  # noqa: F401 - before transformers: it mends torchvision
from tests.checkpoints import WORDS

# isort: split
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
VOCAB_SIZE = 320

CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\\nYou are a radiologist.<|im_end|>\\n' -}}{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- else -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

KINDS: dict[str, tuple[type, type, type, type]] = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor, Qwen2VLVideoProcessor),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, Qwen3VLVideoProcessor),
}


@cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = VOCAB_SIZE - len(SPECIAL_TOKENS)
    tokenizer.train_from_iterator(
        WORDS.splitlines(), trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def make_qwen_vl(
    folder: Path,
    kind: str,
    *,
    heads: tuple[int, int] = (4, 2),
    vision_heads: int = 2,
    names_in_memory: bool = False,
    tie_word_embeddings: bool = False,
    seed: int = 0,
    **text_changes: Any,
) -> PreTrainedModel:
    """Writes a whole checkpoint and returns transformers' model, fp32, in eval.

    Args:
        kind: the `model_type`.
        heads: of queries, and of keys and values; each is 16 wide.
        vision_heads: of the tower, each 16 wide, too.
        names_in_memory: the weights are named as the modules are (`model.language_model.…`), not as they are published
            (for Qwen2-VL and Qwen2.5-VL `model.…` and `visual.…`).
        text_changes: fields of the text config.
    """
    torch.manual_seed(seed)
    config_type, model_type, processor_type, video_type = KINDS[kind]
    hidden = 16 * heads[0]
    interleaved = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    sections = interleaved if kind == "qwen3_vl" else {"mrope_section": [2, 3, 3]}
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, **sections},
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind == "qwen3_vl":
        text["head_dim"] = 16
    tokenizer = make_qwen_tokenizer()
    config = config_type(
        text_config=text | text_changes,
        vision_config=_vision_config(kind, vision_heads, hidden),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=tie_word_embeddings,
    )
    model = model_type(config).eval()
    for parameter in model.parameters():  # norms of ones and biases of zero would hide a wrong name
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder, save_original_format=not names_in_memory)
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    limits = {"size": {"shortest_edge": 16 * 16, "longest_edge": 40 * 40}}
    processor_type(
        image_processor=Qwen2VLImageProcessor(**sizes, **limits),
        tokenizer=tokenizer,
        video_processor=video_type(**sizes),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return model


def make_qwen_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE of `VOCAB_SIZE` tokens, which puts none in front."""
    vocabulary, merges = _vocabulary()
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS,
    )


def _vision_config(kind: str, heads: int, hidden_size: int) -> dict[str, Any]:
    """A tower of 3 layers over patches of 4 by 4 pixels, four of which are merged."""
    width = 16 * heads
    config: dict[str, Any] = {
        "depth": 3,
        "num_heads": heads,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "initializer_range": 0.2,
    }
    if kind == "qwen2_vl":
        return config | {"embed_dim": width, "hidden_size": hidden_size}
    config |= {"hidden_size": width, "intermediate_size": 48, "out_hidden_size": hidden_size}
    if kind == "qwen2_5_vl":
        return config | {"window_size": 16, "fullatt_block_indexes": [1]}
    return config | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]}
