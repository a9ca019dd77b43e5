"""A step that gives some tokens gives for these what one does that gives all; features of images reach their layers."""

from dataclasses import replace

import pytest
import torch

from tests.checkpoints import tiny_text_config
from vlm_serve.decoders.config import DecoderConfig
from vlm_serve.decoders.decoder import Decoder
from vlm_serve.layers.context import ForwardContext, Outputs
from vlm_serve.layers.loading import pack_linears

# isort: split
from transformers import FalconConfig, Gemma2Config, MixtralConfig, OPTConfig, PretrainedConfig

TOKENS, PLACES = 9, torch.tensor([2, 3, 6])
CONFIG = DecoderConfig.from_hf(tiny_text_config(num_hidden_layers=3).to_dict())


def run(config: DecoderConfig, features: torch.Tensor | None, outputs: torch.Tensor | None = None) -> torch.Tensor:
    """The hidden states of one prompt."""
    torch.manual_seed(0)
    decoder = Decoder(config)
    for parameter in decoder.parameters():
        parameter.data.normal_(std=0.3)
    pack_linears(decoder)
    wanted = None
    if outputs is not None:
        counts = torch.tensor([0, len(outputs)], dtype=torch.int32)
        wanted = Outputs(outputs, counts, len(outputs))
    groups = range(len(config.layer_groups))  # each has a block
    shape = config.layers_per_group, len(groups), config.num_kv_heads, TOKENS, config.head_dim
    context = ForwardContext(
        positions=torch.arange(TOKENS),
        slot_mapping=tuple(TOKENS * group + torch.arange(TOKENS) for group in groups),
        block_tables=tuple(torch.tensor([[group]], dtype=torch.int32) for group in groups),
        kv_lengths=torch.tensor([TOKENS], dtype=torch.int32),
        query_start=torch.tensor([0, TOKENS], dtype=torch.int32),
        max_query_len=TOKENS,
        key_cache=torch.full(shape, torch.nan),
        value_cache=torch.full(shape, torch.nan),
        outputs=wanted,
        deepstack=None if features is None else (PLACES, features),
    )
    with torch.inference_mode():
        return decoder(torch.randn(TOKENS, config.hidden_size), context)


def test_features_are_added_after_their_layers() -> None:
    """Those of the last are there as they were given; those of the first change what the tokens after them see."""
    config = replace(CONFIG, deepstack_layers=3)
    features = torch.randn(len(PLACES), config.hidden_size)
    nothing = torch.zeros_like(features)
    plain = run(config, None)
    first = run(config, torch.stack([features, nothing, nothing])) - plain
    last = run(config, torch.stack([nothing, nothing, features])) - plain
    assert last.abs().sum(1).nonzero()[:, 0].tolist() == PLACES.tolist()
    torch.testing.assert_close(last[PLACES], features)
    assert first.abs().sum(1).nonzero()[:, 0].tolist() == list(range(PLACES[0], TOKENS))


@pytest.mark.parametrize("layers", [1, 3])
def test_features_reach_the_outputs_of_the_last_layer(layers: int) -> None:
    config = replace(CONFIG, deepstack_layers=layers)
    features = torch.randn(layers, len(PLACES), config.hidden_size)
    index = torch.arange(5, TOKENS)
    torch.testing.assert_close(run(config, features, index), run(config, features)[index])


SIZES = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
GATED = {"intermediate_size": 40, "num_key_value_heads": 2}
KINDS = {
    "attention and MLP at once": FalconConfig(**SIZES),
    "at once with a norm each": FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=2),
    "slopes": FalconConfig(**SIZES, alibi=True, parallel_attn=False),
    "learned positions": OPTConfig(**SIZES, ffn_dim=40, max_position_embeddings=20),
    "norms after": Gemma2Config(**SIZES, **GATED, head_dim=8, sliding_window=3),
    "experts": MixtralConfig(**SIZES, **GATED, num_local_experts=3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_outputs_are_what_they_are_among_all(kind: str) -> None:
    hf_config: PretrainedConfig = KINDS[kind]
    config = DecoderConfig.from_hf(hf_config.to_dict())
    index = torch.arange(TOKENS - 2, TOKENS)
    torch.testing.assert_close(run(config, None, index), run(config, None)[index])
