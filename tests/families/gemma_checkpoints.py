"""Tiny Gemma3 and PaliGemma 2 checkpoints with random weights, tokenizer and template of their form."""

from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import VOCAB_SIZE, make_tokenizer, tiny_vision_config

# isort: split
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
)

GEMMA3_TOKENS = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}

GEMMA3_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|turn|>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}
{%- if message.content is string -%}
{{- message.content | trim -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<start_of_image>' -}}{%- else -%}{{- part.text | trim -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn|>model\\n' -}}{%- endif -%}
"""


def _with_tokens(tokens: dict[str, str], chat_template: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer of the other tests with these special tokens past its vocabulary."""
    base = make_tokenizer(chat_template)
    return PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<|turn|>"],
        extra_special_tokens=tokens,
        chat_template=chat_template,
        model_max_length=4096,
    )


def _save(model: Any, folder: Path, in_memory: bool) -> None:
    for parameter in model.parameters():  # norms of ones and biases of zero would hide a wrong name
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder, save_original_format=not in_memory)


def make_gemma3(
    folder: Path,
    *,
    heads: int = 4,
    kv_heads: int = 1,
    pan_and_scan: bool = False,
    in_memory: bool = False,
    tied: bool = True,
    seed: int = 0,
    **text_changes: Any,
) -> Gemma3ForConditionalGeneration:
    """Writes a checkpoint and returns transformers' model, fp32, in eval: four tokens an image, two layers that slide
    and one that does not, with a theta each, the other's stretched.

    Args:
        pan_and_scan: whether the processor's config has it on, for crops of 20 pixels or more.
        in_memory: the weights have the modules' own names (`model.language_model.…`) and not those of the hub.
        tied: whether the output head is the word embeddings.
        text_changes: fields of the text config that differ.
    """
    torch.manual_seed(seed)
    tokenizer = _with_tokens(GEMMA3_TOKENS, GEMMA3_TEMPLATE)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE + 8,
        "hidden_size": 14 * heads,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
        "query_pre_attn_scalar": 24,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**(settings | text_changes)),
        vision_config=tiny_vision_config("siglip"),
        mm_tokens_per_image=4,
        tie_word_embeddings=tied,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    model.model.multi_modal_projector.mm_input_projection_weight.data.normal_(std=0.3)
    _save(model, folder, in_memory)
    crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20} if pan_and_scan else {}
    image_processor = Gemma3ImageProcessor(size={"height": 28, "width": 28}, **crops)
    Gemma3Processor(image_processor, tokenizer, GEMMA3_TEMPLATE, image_seq_length=4).save_pretrained(folder)
    return model


def make_paligemma(
    folder: Path,
    text: str = "gemma2",
    *,
    heads: int = 4,
    kv_heads: int = 1,
    in_memory: bool = False,
    **text_changes: Any,
) -> PaliGemmaForConditionalGeneration:
    """Writes a checkpoint without a chat template, as they are published, and returns transformers' model, fp32, in
    eval: 16 tokens an image, and every other layer sees the last eight positions alone.

    Args:
        text: "gemma2", or "gemma" for the first PaliGemma.
        in_memory, text_changes: as in `make_gemma3`.
    """
    torch.manual_seed(0)
    image_processor = SiglipImageProcessor(size={"height": 28, "width": 28})
    image_processor.image_seq_length = 16
    tokenizer = _with_tokens({"image_token": "<image>"}, None)
    processor = PaliGemmaProcessor(image_processor, tokenizer)  # it adds 1152 tokens for places and masks
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 8,
        "hidden_size": 14 * heads,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    if text == "gemma2":
        # transformers before 5.23 does not cap PaliGemma's logits.
        settings |= {"query_pre_attn_scalar": 24, "sliding_window": 8, "final_logit_softcapping": None}
    made = {"gemma": GemmaConfig, "gemma2": Gemma2Config}[text](**(settings | text_changes))
    config = PaliGemmaConfig(
        text_config=made,
        vision_config=tiny_vision_config("siglip"),
        projection_dim=made.hidden_size,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = PaliGemmaForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")  # transformers before 5.23 loses Gemma 2's cap of scores under SDPA
    _save(model, folder, in_memory)
    processor.save_pretrained(folder)
    tokenizer.add_bos_token = True  # as published; the processor switches it off for itself
    tokenizer.save_pretrained(folder)
    return model
