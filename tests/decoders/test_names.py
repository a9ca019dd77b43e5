"""Tensors of text checkpoints are known by the decoder's names, whatever they are called and merged into."""

import pytest
import torch

from vlm_serve.decoders.config import DecoderConfig
from vlm_serve.decoders.names import split_merged, text_name

# isort: split
from transformers import FalconConfig, MixtralConfig, Phi3Config

LAYER = "decoder.layers.0"


@pytest.mark.parametrize(
    ("model_type", "name", "ours"),
    [
        ("llama", "model.layers.0.post_attention_layernorm.weight", f"{LAYER}.post_attention_layernorm.weight"),
        ("llama", "lm_head.weight", "decoder.lm_head.weight"),
        ("gemma2", "model.layers.0.post_attention_layernorm.weight", f"{LAYER}.post_attention_norm.weight"),
        ("gemma2", "model.layers.0.pre_feedforward_layernorm.weight", f"{LAYER}.post_attention_layernorm.weight"),
        ("gemma3_text", "model.layers.0.post_feedforward_layernorm.weight", f"{LAYER}.post_mlp_norm.weight"),
        ("opt", "model.decoder.layers.0.self_attn.out_proj.bias", f"{LAYER}.self_attn.o_proj.bias"),
        ("opt", "decoder.layers.0.final_layer_norm.bias", f"{LAYER}.post_attention_layernorm.bias"),
        ("opt", "decoder.final_layer_norm.weight", "decoder.norm.weight"),
        ("opt", "model.decoder.final_layer_norm.weight", "decoder.norm.weight"),
        ("falcon", "transformer.h.0.self_attention.dense.weight", f"{LAYER}.self_attn.o_proj.weight"),
        ("falcon", "transformer.word_embeddings.weight", "decoder.embed_tokens.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w2.weight", f"{LAYER}.mlp.experts.3.down_proj.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", f"{LAYER}.mlp.gate.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.3.up_proj.weight", f"{LAYER}.mlp.experts.3.up_proj.weight"),
    ],
)
def test_a_name_of_a_checkpoint_is_the_decoders(model_type: str, name: str, ours: str) -> None:
    assert text_name(model_type, name) == ours


def read(config: Phi3Config | FalconConfig | MixtralConfig) -> DecoderConfig:
    return DecoderConfig.from_hf(config.to_dict())


SMALL = {"hidden_size": 12, "num_attention_heads": 6}
PHI = read(Phi3Config(**SMALL, num_key_value_heads=2))
FALCONS = {
    "of 40B": (read(FalconConfig(**SMALL, new_decoder_architecture=True, num_kv_heads=2)), "qqqkvqqqkv"),
    "of 7B": (read(FalconConfig(**SMALL)), "qqqqqqkv"),
    "RW": (read(FalconConfig(**SMALL, multi_query=False)), "qkv" * 6),
}


def test_what_is_not_merged_stays_as_it_is() -> None:
    tensor = torch.randn(3, 2)
    (pair,) = split_merged(PHI, f"{LAYER}.self_attn.q_proj.weight", tensor)
    assert pair == (f"{LAYER}.self_attn.q_proj.weight", tensor)


def test_queries_keys_and_values_end_to_end_are_parted() -> None:
    rows = torch.arange(20)[:, None]
    parts = dict(split_merged(PHI, f"{LAYER}.self_attn.qkv_proj.weight", rows))
    assert {name.split(".")[-2]: (part[0, 0].item(), len(part)) for name, part in parts.items()} == {
        "q_proj": (0, 12),
        "k_proj": (12, 4),
        "v_proj": (16, 4),
    }


@pytest.mark.parametrize("kind", FALCONS)
def test_queries_keys_and_values_in_turns_are_parted(kind: str) -> None:
    config, order = FALCONS[kind]
    rows = torch.tensor([ord(head) for head in order]).repeat_interleave(2)
    parts = dict(split_merged(config, f"{LAYER}.self_attn.qkv_proj.bias", rows))
    assert {name: "".join(map(chr, part.tolist())) for name, part in parts.items()} == {
        f"{LAYER}.self_attn.{head}_proj.bias": head * order.count(head) * 2 for head in "qkv"
    }


def test_experts_in_one_tensor_are_parted() -> None:
    config = read(MixtralConfig(num_local_experts=3))
    gate_up, down = torch.randn(3, 4, 5), torch.randn(3, 5, 2)
    parts = dict(split_merged(config, f"{LAYER}.mlp.experts.gate_up_proj", gate_up))
    parts |= dict(split_merged(config, f"{LAYER}.mlp.experts.down_proj", down))
    assert len(parts) == 9
    assert torch.equal(parts[f"{LAYER}.mlp.experts.2.gate_proj.weight"], gate_up[2, :2])
    assert torch.equal(parts[f"{LAYER}.mlp.experts.2.up_proj.weight"], gate_up[2, 2:])
    assert torch.equal(parts[f"{LAYER}.mlp.experts.1.down_proj.weight"], down[1])


def test_a_merged_tensor_of_another_shape_comes_to_the_loader_whole() -> None:
    tensor = torch.zeros(21, 1)
    assert list(split_merged(PHI, f"{LAYER}.self_attn.qkv_proj.weight", tensor)) == [
        (f"{LAYER}.self_attn.q_proj.weight", tensor)
    ]
