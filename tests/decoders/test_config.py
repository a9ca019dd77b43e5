"""Which layers slide, and how far they see, is read as transformers reads it."""

import pytest

from tests.checkpoints import tiny_text_config
from vlm_serve.decoders.config import AttentionKind, DecoderConfig
from vlm_serve.errors import CheckpointError


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
