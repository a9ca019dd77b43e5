"""Configs as they are published, at their full size: every tensor of transformers' model has its place in ours.

Nothing is computed: both models lie on torch's meta device.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vlm_serve.families import load_family
from vlm_serve.layers import loading

# isort: split
from transformers import AutoConfig, AutoModelForImageTextToText

META = torch.device("meta")


@dataclass(frozen=True)
class Published:
    """What a checkpoint's config.json and preprocessor_config.json say, and what is known of it.

    `parameters` are counted by the hub; `decoder` are fields of `DecoderConfig`.
    """

    parameters: int
    max_tokens_per_image: int
    decoder: dict[str, Any]
    config: dict[str, Any]
    processor: dict[str, Any] = field(default_factory=dict)


SIGLIP_LARGE = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "vision_use_head": False,
}

CLIP_LARGE = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}

QWEN_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}

PUBLISHED = {
    "MedGemma 4B": Published(
        4_300_079_472,
        256,
        {"num_heads": 8, "num_kv_heads": 4, "head_dim": 256, "rope_theta": 1e6, "local_rope_theta": 1e4},
        {
            "model_type": "gemma3",
            "boi_token_index": 255999,
            "eoi_token_index": 256000,
            "image_token_index": 262144,
            "mm_tokens_per_image": 256,
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "torch_dtype": "bfloat16",
            "vision_config": SIGLIP_LARGE | {"image_size": 896},
        },
        {
            "image_processor_type": "Gemma3ImageProcessor",
            "do_pan_and_scan": None,
            "size": {"height": 896, "width": 896},
        },
    ),
    "LLaVA-1.5 7B": Published(
        7_063_427_072,
        576,
        {"num_heads": 32, "num_kv_heads": 32, "head_dim": 128, "rope_theta": 1e4, "max_positions": 4096},
        {
            "model_type": "llava",
            "image_token_index": 32000,
            "pad_token_id": 32001,
            "projector_hidden_act": "gelu",
            "text_config": {
                "max_position_embeddings": 4096,
                "model_type": "llama",
                "rms_norm_eps": 1e-05,
                "torch_dtype": "float16",
                "vocab_size": 32064,
            },
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "vision_config": CLIP_LARGE,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "vocab_size": 32064,
        },
    ),
    "LLaVA-NeXT Mistral 7B": Published(
        7_566_747_648,
        576 + 48 * 49,
        {"num_heads": 32, "num_kv_heads": 8, "rope_theta": 1e6, "sliding_window": None, "max_positions": 32768},
        {
            "model_type": "llava_next",
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
            "image_token_index": 32000,
            "projector_hidden_act": "gelu",
            "text_config": {
                "intermediate_size": 14336,
                "max_position_embeddings": 32768,
                "model_type": "mistral",
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-05,
                "rope_theta": 1000000.0,
                "sliding_window": None,
                "torch_dtype": "bfloat16",
                "vocab_size": 32064,
            },
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "use_image_newline_parameter": True,
            "vision_config": CLIP_LARGE,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "vocab_size": 32064,
        },
    ),
    "PaliGemma 2 3B": Published(
        3_032_242_416,
        256,
        {"num_heads": 8, "num_kv_heads": 4, "head_dim": 256, "logit_softcap": 30.0, "attention_softcap": 50.0},
        {
            "model_type": "paligemma",
            "hidden_size": 2304,
            "image_token_index": 257152,
            "num_hidden_layers": 26,
            "projection_dim": 2304,
            "text_config": {
                "attn_logit_softcapping": 50.0,
                "cache_implementation": "hybrid",
                "final_logit_softcapping": 30.0,
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_activation": "gelu_pytorch_tanh",
                "hidden_size": 2304,
                "intermediate_size": 9216,
                "model_type": "gemma2",
                "num_attention_heads": 8,
                "num_hidden_layers": 26,
                "num_image_tokens": 256,
                "num_key_value_heads": 4,
                "query_pre_attn_scalar": 256,
                "sliding_window": 4096,
                "torch_dtype": "bfloat16",
                "vocab_size": 257216,
            },
            "torch_dtype": "bfloat16",
            "vision_config": SIGLIP_LARGE | {"num_image_tokens": 256, "num_positions": 256, "projection_dim": 2304},
        },
    ),
    "Qwen2-VL 2B": Published(
        2_208_985_600,
        16384,
        {"num_heads": 12, "num_kv_heads": 2, "rope_theta": 1e6, "mrope_section": (16, 24, 24), "sliding_window": None},
        {
            "model_type": "qwen2_vl",
            "hidden_act": "silu",
            "hidden_size": 1536,
            "image_token_id": 151655,
            "intermediate_size": 8960,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "num_attention_heads": 12,
            "num_hidden_layers": 28,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "vision_config": {
                "depth": 32,
                "embed_dim": 1280,
                "hidden_size": 1536,
                "in_chans": 3,
                "mlp_ratio": 4,
                "num_heads": 16,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "spatial_patch_size": 14,
                "temporal_patch_size": 2,
            },
            "vision_token_id": 151654,
            "vocab_size": 151936,
        },
        QWEN_PROCESSOR,
    ),
    "Qwen2.5-VL 7B": Published(
        8_292_166_656,
        16384,
        {"num_heads": 28, "num_kv_heads": 4, "rope_theta": 1e6, "mrope_section": (16, 24, 24), "max_positions": 128000},
        {
            "model_type": "qwen2_5_vl",
            "hidden_act": "silu",
            "hidden_size": 3584,
            "image_token_id": 151655,
            "intermediate_size": 18944,
            "max_position_embeddings": 128000,
            "max_window_layers": 28,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "vision_config": {
                "depth": 32,
                "fullatt_block_indexes": [7, 15, 23, 31],
                "hidden_act": "silu",
                "hidden_size": 1280,
                "in_chans": 3,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 3584,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "spatial_patch_size": 14,
                "temporal_patch_size": 2,
                "tokens_per_second": 2,
                "window_size": 112,
            },
            "vocab_size": 152064,
        },
        QWEN_PROCESSOR,
    ),
    "Qwen3-VL 4B": Published(
        4_437_815_808,
        16384,
        {"num_heads": 32, "num_kv_heads": 8, "mrope_section": (24, 20, 20), "rope_theta": 5e6, "deepstack_layers": 3},
        {
            "model_type": "qwen3_vl",
            "image_token_id": 151655,
            "text_config": {
                "attention_bias": False,
                "dtype": "bfloat16",
                "head_dim": 128,
                "hidden_act": "silu",
                "hidden_size": 2560,
                "intermediate_size": 9728,
                "max_position_embeddings": 262144,
                "model_type": "qwen3_vl_text",
                "num_attention_heads": 32,
                "num_hidden_layers": 36,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-06,
                "rope_scaling": {
                    "mrope_interleaved": True,
                    "mrope_section": [24, 20, 20],
                    "rope_type": "default",
                },
                "rope_theta": 5000000,
                "tie_word_embeddings": True,
                "vocab_size": 151936,
            },
            "tie_word_embeddings": True,
            "vision_config": {
                "deepstack_visual_indexes": [5, 11, 17],
                "depth": 24,
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_size": 1024,
                "in_channels": 3,
                "intermediate_size": 4096,
                "model_type": "qwen3_vl",
                "num_heads": 16,
                "num_position_embeddings": 2304,
                "out_hidden_size": 2560,
                "patch_size": 16,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        },
        {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "size": {"longest_edge": 16777216, "shortest_edge": 65536},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
        },
    ),
    "SmolVLM 256M": Published(
        256_484_928,
        64 * 17,
        {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "rope_theta": 1e5, "max_positions": 8192},
        {
            "model_type": "idefics3",
            "image_token_id": 49190,
            "scale_factor": 4,
            "text_config": {
                "_flash_attn_2_enabled": True,
                "architectures": ["VLlama3ForCausalLM"],
                "head_dim": 64,
                "hidden_size": 576,
                "intermediate_size": 1536,
                "is_llama_config": True,
                "max_position_embeddings": 8192,
                "model_type": "llama",
                "num_attention_heads": 9,
                "num_hidden_layers": 30,
                "num_key_value_heads": 3,
                "pad_token_id": 2,
                "perceiver_config": {"attention_dropout": 0.0, "model_type": "vllama3"},
                "qk_layer_norms": False,
                "rms_norm_eps": 1e-05,
                "rope_interleaved": False,
                "rope_theta": 100000,
                "torch_dtype": "bfloat16",
                "vocab_size": 49280,
            },
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vision_config": {
                "hidden_size": 768,
                "image_size": 512,
                "max_image_size": {"longest_edge": 512},
                "model_type": "idefics3",
                "num_attention_heads": 12,
                "patch_size": 16,
                "size": {"longest_edge": 2048},
                "tie_word_embeddings": False,
                "use_base_siglip": False,
            },
            "vocab_size": 49280,
        },
        {
            "image_processor_type": "Idefics3ImageProcessor",
            "do_image_splitting": True,
            "max_image_size": {"longest_edge": 512},
            "size": {"longest_edge": 2048},
        },
    ),
    "InternVL3 1B": Published(
        938_193_024,
        256 * 13,
        {"num_heads": 14, "num_kv_heads": 2, "rope_theta": 1e6, "max_positions": 32768},
        {
            "model_type": "internvl",
            "downsample_ratio": 0.5,
            "image_seq_length": 256,
            "image_token_id": 151667,
            "projector_hidden_act": "gelu",
            "text_config": {
                "architectures": ["Qwen2ForCausalLM"],
                "hidden_size": 896,
                "intermediate_size": 4864,
                "max_position_embeddings": 32768,
                "max_window_layers": 21,
                "model_type": "qwen2",
                "num_attention_heads": 14,
                "num_hidden_layers": 24,
                "num_key_value_heads": 2,
                "rms_norm_eps": 1e-06,
                "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
                "rope_theta": 1000000.0,
                "sliding_window": None,
                "torch_dtype": "bfloat16",
                "use_sliding_window": False,
                "vocab_size": 151674,
            },
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vision_config": {
                "architectures": ["InternVLVisionModel"],
                "attention_bias": True,
                "hidden_size": 1024,
                "image_size": [448, 448],
                "intermediate_size": 4096,
                "layer_scale_init_value": 0.1,
                "model_type": "internvl_vision",
                "norm_type": "layer_norm",
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": [14, 14],
                "use_mean_pooling": True,
                "use_qk_norm": False,
            },
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
        },
        {
            "image_processor_type": "GotOcr2ImageProcessor",
            "crop_to_patches": False,
            "max_patches": 12,
            "min_patches": 1,
            "size": {"height": 448, "width": 448},
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_a_published_model_has_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    known = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(known.config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(known.processor))
    save_file({}, tmp_path / "model.safetensors")
    with META:
        reference = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    assert sum(parameter.numel() for parameter in reference.parameters()) == known.parameters
    monkeypatch.setattr(loading, "read_weights", lambda *_: iter(reference.state_dict().items()))
    family = load_family(tmp_path)
    family.build(torch.bfloat16, META)
    assert {field: getattr(family.decoder_config, field) for field in known.decoder} == known.decoder
    assert family.max_tokens_per_image == known.max_tokens_per_image
