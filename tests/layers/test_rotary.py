"""Rotary frequencies, their axes and ALiBi's slopes are those of transformers."""

from typing import Any

import pytest
import torch

from vlm_serve.decoders.config import DecoderConfig
from vlm_serve.layers.rotary import Rotary, alibi_slopes, frequency_axes, rotary_frequencies

# isort: split
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.falcon.modeling_falcon import build_alibi_tensor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768},
    "yarn with an own factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 0.7,
    },
    "yarn as DeepSeek's": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
    },
    "yarn of whole dimensions": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
}


def assert_equals_transformers(config: Any, *, length: int | None = None) -> None:
    own = DecoderConfig.from_hf(config.to_dict())
    kind = config.rope_parameters["rope_type"]
    expected, amplitude = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    is_long = length is not None and own.stretches_from is not None and length > own.stretches_from
    frequencies = rotary_frequencies(own.rotary_dim, own.rope_theta, own.rope_scaling, is_long=is_long)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert own.rope_scaling is not None
    assert own.rope_scaling.amplitude == pytest.approx(amplitude)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_frequencies_equal_transformers(kind: str, head_dim: int) -> None:
    rope = {"rope_theta": 500_000.0} | SCALINGS[kind]
    assert_equals_transformers(LlamaConfig(head_dim=head_dim, max_position_embeddings=131_072, rope_parameters=rope))


@pytest.mark.parametrize("length", [4096, 4097])
@pytest.mark.parametrize("share", [1.0, 0.75])
def test_both_sets_of_longrope_equal_transformers(share: float, length: int) -> None:
    count = int(96 * share) // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": share,
        "short_factor": [1.0 + index / count for index in range(count)],
        "long_factor": [1.0 + index for index in range(count)],
    }
    config = Phi3Config(max_position_embeddings=131_072, original_max_position_embeddings=4096, rope_parameters=rope)
    assert_equals_transformers(config, length=length)


@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        (Qwen2VLTextConfig(), Qwen2VLRotaryEmbedding),
        (Qwen2_5_VLTextConfig(), Qwen2_5_VLRotaryEmbedding),
        (Qwen3VLTextConfig(), Qwen3VLTextRotaryEmbedding),
        (Qwen3VLTextConfig(head_dim=36, rope_parameters={"mrope_section": [6, 6, 6]}), Qwen3VLTextRotaryEmbedding),
        (Qwen3VLTextConfig(head_dim=32, rope_parameters={"mrope_section": [4, 6, 6]}), Qwen3VLTextRotaryEmbedding),
    ],
    ids=["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "even shares", "little time"],
)
def test_rotation_in_three_axes_equals_transformers(config: Any, theirs: type[torch.nn.Module]) -> None:
    own = DecoderConfig.from_hf(config.to_dict())
    positions = torch.randint(0, 5000, (3, 40))
    axes = frequency_axes(own.mrope_section, interleaved=own.mrope_interleaved)
    rotary = Rotary(own.rotary_dim, own.rope_theta, own.rope_scaling, axes)
    expected = theirs(config)(torch.empty(0), positions[:, None])
    for part, other in zip(rotary(positions, torch.float32), expected, strict=True):
        torch.testing.assert_close(part[:, 0], other[0])
    alike = positions[:1].expand(3, -1)
    for part, other in zip(rotary(alike, torch.float32), rotary(positions[0], torch.float32), strict=True):
        assert torch.equal(part, other)


@pytest.mark.parametrize("heads", [1, 3, 4, 7, 8, 12, 32, 71])
def test_slopes_of_alibi_equal_transformers(heads: int) -> None:
    second = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    assert torch.equal(torch.tensor(alibi_slopes(heads)).bfloat16().float(), second)
