"""A memory budget becomes blocks, and the plan says truly what fits."""

from dataclasses import replace

import pytest
import torch

from tests.checkpoints import make_llava, tiny_text_config
from vlm_serve.config import GIB, MIB, EngineConfig, ModelConfig
from vlm_serve.decoders.config import AttentionKind, DecoderConfig
from vlm_serve.engine.engine import Engine
from vlm_serve.engine.kv_cache import KVCache, KVPlan, plan_blocks
from vlm_serve.errors import ConfigurationError
from vlm_serve.families import load_family

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LLAMA = DecoderConfig.from_hf(tiny_text_config().to_dict())
PER_TOKEN = 2 * 2 * 2 * 16 * 4
"""Bytes: keys and values, layers, heads, their dimension, float32."""


def plan(memory: int | float | None, decoder: DecoderConfig = LLAMA, device: torch.device = CPU, **config) -> KVPlan:
    return plan_blocks(decoder, EngineConfig(kv_cache_memory=memory, **config), torch.float32, device)


def sliding(window: int, kinds: str) -> DecoderConfig:
    types = tuple(AttentionKind.SLIDING if kind == "s" else AttentionKind.FULL for kind in kinds)
    return replace(LLAMA, num_layers=len(kinds), sliding_window=window, layer_types=types)


def test_bytes_become_blocks():
    made = plan(MIB)
    assert (made.num_blocks, made.memory, made.tokens) == (MIB // (16 * PER_TOKEN), MIB, MIB // PER_TOKEN)
    assert made.sequences_of(1000) == made.num_blocks // 63
    assert made.longest(100_000) == made.tokens
    assert made.longest(500) == 500


def test_the_tensors_take_what_was_planned():
    for decoder in (LLAMA, sliding(8, "ssssf"), sliding(8, "ss")):
        made = plan(MIB, decoder)
        cache = KVCache.allocate(decoder, made.num_blocks, 16, torch.float32, CPU)
        assert cache.keys.nbytes + cache.values.nbytes == made.memory <= MIB
        assert made.memory > MIB - made.block_bytes


def test_a_cpu_has_a_gibibyte_unless_told():
    assert plan(None).memory == GIB


@pytest.mark.parametrize(("share", "expected"), [(0.5, 2 * GIB), (1.0, 4 * GIB), (None, int(3.6 * GIB))])
def test_a_share_is_of_what_the_weights_leave_free(monkeypatch, share, expected):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * GIB, 80 * GIB))
    made = plan(share, device=GPU)
    assert 0 <= expected - made.memory < made.block_bytes


def test_a_share_of_a_cpus_memory_is_refused_with_the_remedy():
    with pytest.raises(ConfigurationError, match="bytes, such as 2GiB"):
        plan(0.8)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, 80.0])
def test_a_share_is_above_nothing_and_at_most_all(share):
    with pytest.raises(ConfigurationError, match="share"):
        EngineConfig(kv_cache_memory=share)


def test_too_little_memory_is_refused_with_the_remedy():
    with pytest.raises(ConfigurationError, match="Raise --kv-cache-memory"):
        plan(16 * PER_TOKEN)


def test_sliding_layers_let_more_and_longer_sequences_in():
    mixed = plan(MIB, sliding(64, "sssf"), max_num_batched_tokens=64)
    whole = plan(MIB, replace(LLAMA, num_layers=4))
    assert mixed.memory == whole.memory
    assert mixed.sequences_of(512) > 1.5 * whole.sequences_of(512)
    assert mixed.longest(100_000) > 2 * whole.longest(100_000)
    assert plan(MIB, sliding(64, "ssss"), max_num_batched_tokens=64).longest(100_000) == 100_000


def test_the_plan_is_told_in_sequences_of_lengths_that_are_served():
    made = KVPlan(2731, 16, 24_576 * 16, (None,), 512)
    assert made.describe(100_000) == "1.0 GiB: 43,696 tokens; 42 sequences of 1,024, 5 of 8,192"
    assert made.describe(2048) == "1.0 GiB: 43,696 tokens; 42 sequences of 1,024, 21 of 2,048"
    assert made.describe(512) == "1.0 GiB: 43,696 tokens; 85 sequences of 512"
    assert KVPlan(100, 16, 1024, (None,), 512).describe(1024) == "0.1 MiB: 1,600 tokens; 1 sequence of 1,024"


def test_the_plan_is_printed_at_start_up(tmp_path):
    make_llava(tmp_path)
    phases = []
    Engine.build(
        load_family(tmp_path),
        ModelConfig(str(tmp_path), None, "float32", "cpu"),
        EngineConfig(kv_cache_memory=4 * MIB),
        on_phase=lambda name, seconds: phases.append(name),
    )
    assert "kv cache (4.0 MiB: 8,192 tokens; 8 sequences of 1,024, 2 of 4,096)" in phases
