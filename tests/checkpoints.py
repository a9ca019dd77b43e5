"""Tiny checkpoints with random weights, made by transformers: what the parity tests of every floor compare with.

Nothing is downloaded: the tokenizer is trained here, on a few words, with real special tokens and a template.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from vlm_serve.encoders.projector import MlpProjector  # the package before transformers: it mends torchvision
from vlm_serve.encoders.timm_tower import TimmTower

# isort: split
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

IMAGE_TOKEN = "<image>"
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", IMAGE_TOKEN, "<|turn|>"]
VOCAB_SIZE = 320
WORDS = """The chest radiograph shows clear lungs and a normal heart. No effusion, no pneumothorax, no fracture.
What does the image show? Is there a mass in the left upper lobe? Compare with the study of 2019-04-30."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('Unknown role ' + message.role) -}}
{%- endif -%}
{{- '<|turn|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<image>\\n' -}}{%- else -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn|>assistant\\n' -}}{%- endif -%}
"""

TOOL_TEMPLATE = """\
{%- if tools -%}
{{- '<|turn|>system\\nCall a function: <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call>\\n' -}}
{%- for tool in tools -%}{{- (tool | tojson) + '\\n' -}}{%- endfor -%}
{%- endif -%}
""" + CHAT_TEMPLATE.replace("'assistant']", "'assistant', 'tool']").replace(
    "{{- '\\n' -}}\n{%- endfor -%}",
    """\
{%- for call in message.tool_calls or [] -%}
{{- '<tool_call>\\n' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) -}}
{{- '\\n</tool_call>' -}}
{%- endfor -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if note is defined -%}{{- note -}}{%- endif -%}""",
)
"""Tells of functions and calls as Qwen's does, and says a variable of the request's, `note`."""


@cache
def _backend() -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS.splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer.to_str()


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` tokens that puts `<s>` (1) in front; `</s>` is 2, `<image>` 4."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=[IMAGE_TOKEN, "<|turn|>"],
        chat_template=chat_template,
        model_max_length=4096,
    )


def tiny_text_config(model_type: str = "llama", **changes: Any) -> PretrainedConfig:
    """A decoder, of Llama's type unless it says another: hidden 64, 2 layers, 4 query and 2 key-value heads of 16."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "initializer_range": 0.2,
    }
    kinds = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
    return kinds[model_type](**(settings | changes))


def tiny_vision_config(vision: str, image_size: int = 28, patch_size: int = 7, layers: int = 3) -> PretrainedConfig:
    """A CLIP or SigLIP tower: hidden 32, 4 heads, 16 patches an image."""
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": patch_size,
    }
    if vision == "clip":
        return CLIPVisionConfig(**settings, projection_dim=32, initializer_range=0.2)
    assert vision == "siglip"
    return SiglipVisionConfig(**settings, vision_use_head=False)


def make_llava(
    folder: Path,
    vision: str = "clip",
    *,
    names: Literal["saved", "hub", "in_memory"] = "saved",
    sharded: bool = False,
    feature_layer: int | list[int] = -2,
    strategy: str | None = None,
    chat_template: str | None = CHAT_TEMPLATE,
    seed: int = 0,
    **text_changes: Any,
) -> LlavaForConditionalGeneration:
    """Writes a whole `LlavaForConditionalGeneration` checkpoint and returns transformers' model, fp32, in eval.

    Args:
        folder: made if need be.
        vision: "clip" or "siglip".
        names: of the weights. "saved" is what `save_pretrained` writes, "hub" what the older checkpoints have
            (`vision_tower.vision_model.…`), "in_memory" the modules' own (`model.language_model.…`).
        sharded: several safetensors files with an index.
        strategy: `vision_feature_select_strategy`; None is the one that suits the tower.
        text_changes: fields of the text config that differ from `tiny_text_config`.
    """
    torch.manual_seed(seed)
    strategy = strategy or ("default" if vision == "clip" else "full")
    tokenizer = make_tokenizer(chat_template)
    config = LlavaConfig(
        vision_config=tiny_vision_config(vision),
        text_config=tiny_text_config(**text_changes),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=strategy,
        image_seq_length=16,
    )
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # norms of ones and biases of zero would hide a wrong name
        parameter.data += 0.02 * torch.randn_like(parameter)
    shard_size = "100KB" if sharded else "1GB"
    model.save_pretrained(folder, max_shard_size=shard_size, save_original_format=names != "in_memory")
    if names == "hub":
        _rename_as_on_the_hub(folder)
    size = {"height": 28, "width": 28}
    image_processor = (
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size)
        if vision == "clip"
        else SiglipImageProcessor(size=size)
    )
    LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1 if vision == "clip" else 0,
        chat_template=chat_template,
    ).save_pretrained(folder)
    return model


def make_timm_vlm(
    folder: Path,
    vision: str = "test_vit",
    *,
    image_size: int = 160,
    grid: tuple[int, int] = (4, 4),
    **text_changes: Any,
) -> LlamaForCausalLM:
    """Writes a checkpoint of the embedded default's form, and returns its decoder as transformers has it, fp32.

    Args:
        vision: one of timm's own tiny models for tests.
        text_changes: fields of the text config that differ from `tiny_text_config`.
    """
    torch.manual_seed(0)
    decoder = LlamaForCausalLM(tiny_text_config(**text_changes)).eval()
    tower = TimmTower(vision, grid)
    projector = MlpProjector(tower.out_features, decoder.config.hidden_size)
    tensors = decoder.state_dict()
    tensors |= {f"vision.{name}": tensor for name, tensor in tower.model.state_dict().items()}
    tensors |= {f"projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    if decoder.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    config = {
        "model_type": "vlm_serve_timm",
        "text_config": decoder.config.to_dict(),
        "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "vision": {"model": vision, "image_size": image_size, "grid": grid, "mean": [0.5] * 3, "std": [0.5] * 3},
        "projector": {"in_features": tower.out_features, "activation": "gelu"},
        "notice": "A tiny model with random weights.",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return decoder


def _rename_as_on_the_hub(folder: Path) -> None:
    """Gives the tensors the names of the published LLaVA checkpoints: the tower inside a `vision_model`."""

    def hub_name(name: str) -> str:
        return name.replace("vision_tower.", "vision_tower.vision_model.")

    for file in folder.glob("*.safetensors"):
        save_file({hub_name(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text())
        content["weight_map"] = {hub_name(name): file for name, file in content["weight_map"].items()}
        index.write_text(json.dumps(content))
