"""Tiny checkpoints of every model of text alone that is served, with random weights, made by transformers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import VOCAB_SIZE, make_tokenizer

# isort: split
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}

GATED: dict[str, Any] = {"intermediate_size": 48}


@dataclass(frozen=True)
class Row:
    """A kind of model: its `model_type`, what its config says, and what every config of its kind calls key-value heads.

    `fault` are fields of a `DecoderConfig` that are wrong for it.
    """

    model_type: str
    fault: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    kv_heads: str = "num_key_value_heads"


SLIDING_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8, "final_logit_softcapping": 5.0}
FALCON_40B = {"new_decoder_architecture": True}

ROWS = {
    "Llama 2": Row("llama", {"rope_theta": 20_000.0}, GATED),
    "Llama 3": Row(
        "llama",
        {"rope_scaling": None},
        GATED
        | {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "Mistral": Row("mistral", {"sliding_window": 9}, GATED | {"sliding_window": 8}),
    "Qwen2": Row(
        "qwen2",
        {"layer_types": (), "sliding_window": None},
        GATED | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "Qwen3": Row("qwen3", {"norm_eps": 0.1}, GATED | {"head_dim": 12}),
    "SmolLM3": Row("smollm3", {"unrotated_layers": ()}, GATED | {"no_rope_layer_interval": 2}),
    "Phi-3": Row("phi3", {"rope_theta": 20_000.0}, GATED),
    "Phi-4 mini": Row(
        "phi3",
        {"partial_rotary_factor": 1.0},
        GATED
        | {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}},
    ),
    "Gemma": Row("gemma", {"embedding_scale": None}, GATED | {"head_dim": 16}),
    "Gemma 2": Row(
        "gemma2",
        {"attention_softcap": None},
        # Eager, because transformers before 5.23 loses the cap of scores under SDPA.
        GATED | SLIDING_GEMMA | {"attn_logit_softcapping": 3.0, "attn_implementation": "eager"},
    ),
    "Gemma 3": Row(
        "gemma3_text",
        {"local_rope_theta": 1_000_000.0},
        GATED
        | SLIDING_GEMMA
        | {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
    "OPT": Row("opt", {"activation": "gelu"}, {"ffn_dim": 48, "init_std": 0.2}, kv_heads=""),
    "Galactica": Row(
        "opt",
        {"attention_scale": 1.0},
        {"ffn_dim": 48, "init_std": 0.2, "enable_bias": False, "activation_function": "gelu"},
        kv_heads="",
    ),
    "Falcon 7B": Row("falcon", {"rope_theta": 20_000.0}, kv_heads=""),
    "Falcon 40B": Row("falcon", {"norm_eps": 0.1}, FALCON_40B, kv_heads="num_kv_heads"),
    "Falcon 2": Row("falcon", {"activation": "relu"}, FALCON_40B | {"num_ln_in_parallel_attn": 1}, "num_kv_heads"),
    "Falcon RW": Row(
        "falcon",
        {"position": "rope"},
        {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "tie_word_embeddings": False},
        kv_heads="",
    ),
    "Mixtral": Row("mixtral", {"norm_topk_prob": False}, GATED | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "Qwen3-MoE": Row(
        "qwen3_moe",
        {"norm_topk_prob": True},
        GATED
        | {
            "head_dim": 12,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [1],
        },
    ),
}

SHAPES = {"MHA": (4, 4), "three heads, GQA 3": (3, 1), "GQA 4": (8, 2), "GQA 7": (7, 1)}
"""Query and key-value heads."""


def make_text(
    folder: Path, row: str, heads: tuple[int, int] = (4, 2), *, in_memory: bool = False, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """Writes a checkpoint of the row and returns transformers' model, fp32, in eval.

    Args:
        heads: of queries and of keys and values; where the architecture has its own rule for these, it decides.
        in_memory: the tensors are laid out as the modules', experts merged, and not as on the hub.
        changes: fields of the config that differ.
    """
    torch.manual_seed(seed)
    kind, (queries, keys) = ROWS[row], heads
    settings = COMMON | {"num_attention_heads": queries, "hidden_size": 8 * queries} | kind.settings
    if kind.kv_heads:
        settings[kind.kv_heads] = keys
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind.model_type, **(settings | changes))).eval()
    assert isinstance(model, PreTrainedModel)
    for parameter in model.parameters():  # norms of ones and biases of zero would hide a wrong name
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder, save_original_format=not in_memory)
    make_tokenizer().save_pretrained(folder)
    return model
