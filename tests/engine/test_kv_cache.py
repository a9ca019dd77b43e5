"""A memory budget becomes blocks, and the plan says truly what fits."""

from dataclasses import replace

import pytest
import torch

from tests.checkpoints import make_llava, tiny_text_config
from tests.engine.harness import Harness
from vlm_serve.config import GIB, MIB, EngineConfig, ModelConfig
from vlm_serve.decoders.config import AttentionKind, DecoderConfig
from vlm_serve.engine.engine import Engine
from vlm_serve.engine.kv_cache import KVCache, KVPlan, plan_blocks
from vlm_serve.errors import ConfigurationError
from vlm_serve.families import load_family
from vlm_serve.types import Request, SamplingParams

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


def test_the_plan_says_what_no_layer_uses():
    """Ten layers that see all and 52 that slide are seven groups of ten, of which the last has two."""
    uneven = plan(MIB, sliding(8, "f" * 10 + "s" * 52))
    assert uneven.padding == pytest.approx(8 / 70)
    assert uneven.describe(512).startswith("1.0 MiB, 11% of it padding: ")
    for even in (LLAMA, sliding(8, "sssf"), sliding(8, "ss")):
        assert plan(MIB, even).padding == 0


def test_an_engine_wastes_two_percent_of_its_blocks_at_most_at_a_thousand_tokens(tmp_path, record_testsuite_property):
    """By the figures that a real engine tells of itself after each step; places live are counted here, too."""
    make_llava(tmp_path)
    lengths = range(960, 1000, 5)
    harness = Harness(tmp_path, kv_blocks=640, block_size=EngineConfig().block_size, max_num_seqs=8)
    engine = harness.engine
    engine.runner.run = harness._run_batch  # unrecorded
    for length in lengths:
        prompt = tuple((7 * length + 3 * at) % 300 + 5 for at in range(length))
        engine.add(Request(str(length), prompt, SamplingParams(max_tokens=80, temperature=0, ignore_eos=True)))
    drawn, waste = dict.fromkeys(map(str, lengths), 0), []
    while engine.has_work:
        output = engine.step()
        for one in output.outputs:
            drawn[one.request_id] += len(one.token_ids)
        if min(drawn.values()) > 0 and max(drawn.values()) < 80:
            stats = output.stats
            assert stats.kv_tokens_live == sum(length + drawn[str(length)] - 1 for length in lengths)
            assert stats.kv_tokens_allocated == stats.kv_blocks_used * 16
            waste.append(1 - stats.kv_tokens_live / stats.kv_tokens_allocated)
    assert len(waste) > 40
    record_testsuite_property("kv_waste", max(waste))
    assert max(waste) <= 0.02


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
