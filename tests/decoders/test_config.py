"""A text config is read as transformers reads it, and what is not served in it is refused by name."""

from typing import Any

import pytest

from tests.checkpoints import tiny_text_config
from vlm_serve.decoders.config import AttentionKind, DecoderConfig
from vlm_serve.errors import CheckpointError

# isort: split
from transformers import AutoConfig


def read(**changes) -> DecoderConfig:
    """Of a config as transformers fills it in; what it would refuse to write is put in after."""
    broken = changes.pop("broken", {})
    return DecoderConfig.from_hf(tiny_text_config(**changes).to_dict() | broken)


MIXED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 8}, (8, 8)),
        ({"model_type": "mistral", "sliding_window": None}, (None, None)),
        ({"model_type": "mistral"}, (4096, 4096)),
        ({"model_type": "qwen2", "sliding_window": 8}, (None, None)),
        ({"model_type": "qwen2", **MIXED}, (None, 8)),
        ({"model_type": "qwen2", **MIXED, "layer_types": ["sliding_attention", "full_attention"]}, (8, None)),
        ({"model_type": "qwen2", **MIXED, "layer_types": ["full_attention"] * 2}, (None, None)),
        ({"model_type": "llama"}, (None, None)),
        ({"model_type": "llama", "sliding_window": 8}, (None, None)),
    ],
    ids=[
        "Mistral",
        "Mistral without",
        "Mistral by default",
        "Qwen2, not used",
        "Qwen2 from a layer on",
        "Qwen2 by layer_types",
        "Qwen2, all full",
        "Llama",
        "Llama ignores it",
    ],
)
def test_windows_are_those_of_the_checkpoint(changes, windows):
    assert read(**changes).windows == windows


def test_a_window_that_a_published_config_names_and_does_not_use_is_none():
    assert read(model_type="qwen2", broken={"sliding_window": 32_768, "layer_types": None}).windows == (None, None)


def test_qwen2_has_biases_on_queries_keys_and_values_alone():
    config = read(model_type="qwen2")
    assert (config.attention_bias, config.attention_output_bias) == (True, False)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"layer_types": ["full_attention"]}, "for each of 2 layers"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "full_attention, sliding_attention"),
        ({"sliding_window": 0}, "count of positions"),
    ],
    ids=["too few", "not known", "a window of nothing"],
)
def test_a_pattern_that_is_not_served_is_refused_by_name(broken, message):
    with pytest.raises(CheckpointError, match=message):
        read(model_type="qwen2", **MIXED, broken=broken)


def test_the_place_of_a_layer_is_its_group_and_its_index_in_it():
    kinds = tuple(AttentionKind.FULL if index % 3 == 2 else AttentionKind.SLIDING for index in range(6))
    config = DecoderConfig("x", 1, 1, 6, 1, 1, 1, 1, 1, 1e-5, 1e4, sliding_window=8, layer_types=kinds)
    assert [config.place_of(layer) for layer in range(6)] == [(1, 0), (1, 1), (0, 0), (2, 0), (2, 1), (0, 1)]
    assert config.layers_per_group == 2


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("opt", {"do_layer_norm_before": False}, "'opt' with do_layer_norm_before=False"),
        ("opt", {"word_embed_proj_dim": 512}, "'opt' with word_embed_proj_dim=512"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "'gemma3_text' with use_bidirectional_attention=True"),
        ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}, "'falcon' with parallel_attn=False"),
        ("qwen3_vl_text", {"rope_parameters": {"mrope_section": [8, 8, 8]}}, r"\[8, 8, 8\]; it must divide 64"),
        ("mamba", {}, "'mamba' are not known. Known: 'llama'"),
    ],
    ids=["OPT 350M's norms", "OPT 350M's embeddings", "EmbeddingGemma", "Falcon", "a wrong M-RoPE", "no decoder"],
)
def test_what_is_not_served_is_refused_by_name(model_type: str, changes: dict[str, Any], message: str) -> None:
    config = AutoConfig.for_model(model_type, **changes).to_dict()
    with pytest.raises(CheckpointError, match=message):
        DecoderConfig.from_hf(config)


def test_a_scaling_of_positions_that_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="'spiral' is not known"):
        read(broken={"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}})


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048}, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 4096),
        ({"rope_type": "dynamic", "factor": 4.0}, 4096),
    ],
    ids=["yarn past max_position_embeddings", "yarn up to it", "linear", "dynamic"],
)
def test_the_context_is_what_the_checkpoint_is_for(rope: dict[str, Any], positions: int) -> None:
    config = read(rope_parameters=rope | {"rope_theta": 1e4})
    assert config.max_positions == positions
    assert (config.rope_scaling is None) == (rope["rope_type"] == "dynamic")


def test_a_published_config_of_before_transformers_5_is_read_the_same() -> None:
    new = read(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    old = read(broken={"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert new == old


@pytest.mark.parametrize(("limit", "stretches_from"), [(131_072, 4096), (4096, None)])
def test_a_second_set_of_frequencies_is_for_what_is_past_the_original_context(
    limit: int, stretches_from: int | None
) -> None:
    factors = [1.0] * 16
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors}
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": limit}
    config = AutoConfig.for_model("phi3", original_max_position_embeddings=4096, rope_parameters=rope, **sizes)
    assert DecoderConfig.from_hf(config.to_dict()).stretches_from == stretches_from
