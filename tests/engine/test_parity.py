"""Parity is the specification: whatever the engine does with a request, its logits are transformers'.

Tiny random LLaVA checkpoints, fp32, against transformers and PEFT run in the same test.
"""

import numpy as np
import pytest

from tests.checkpoints import make_llava
from tests.engine.adapters import make_adapter
from tests.engine.harness import Harness, assert_parity, picture

QUESTION = "What does the image show?"


@pytest.fixture(scope="module", params=["clip", "siglip"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    return folder, make_llava(folder, request.param)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    return folder, make_llava(folder, "clip")


def prompts(harness: Harness) -> dict:
    return {
        "text": harness.chat(QUESTION),
        "one image": harness.chat(picture(1), QUESTION),
        "three images": harness.chat(
            "Compare ", picture(1, 40, 28), " with ", picture(2), picture(3, 28, 60), " please."
        ),
    }


@pytest.mark.parametrize("kind", ["text", "one image", "three images"])
def test_parity_of_a_conversation(checkpoint, kind):
    folder, model = checkpoint
    harness = Harness(folder)
    (run,) = harness.run(prompts(harness)[kind], max_tokens=16)
    assert_parity(model, run)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48, "head_dim": 16},
        {"num_attention_heads": 7, "num_key_value_heads": 7, "hidden_size": 56},
        {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 12, "hidden_size": 64},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 20_000.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
    ids=["GQA 3", "seven heads", "head_dim 12", "tied", "biases", "GELU", "linear RoPE", "llama3 RoPE"],
)
def test_parity_of_the_decoders_kinds(tmp_path, changes):
    model = make_llava(tmp_path, "clip", **changes)
    harness = Harness(tmp_path)
    for run in harness.run(*prompts(harness).values()):
        assert_parity(model, run)


def test_parity_when_chunked_at_every_split_point(clip):
    folder, model = clip
    harness = Harness(folder, enable_prefix_caching=False, max_num_seqs=1)
    prompt = harness.chat(picture(1), "Is it ", picture(2), "?")
    for chunk in range(1, len(prompt.token_ids) + 1):
        harness.set(max_num_batched_tokens=chunk)
        (run,) = harness.run(prompt, max_tokens=3)
        assert max(batch.num_tokens for batch in harness.steps) == chunk
        assert_parity(model, run)


def test_parity_cached_and_cold(clip):
    folder, model = clip
    harness = Harness(folder)
    prompt = harness.chat(picture(1), QUESTION)
    cold, warm = harness.run(prompt)[0], harness.run(prompt)[0]
    assert (cold.cached_tokens, warm.cached_tokens) == (0, (len(prompt.token_ids) - 1) // 4 * 4)
    assert warm.token_ids == cold.token_ids
    assert_parity(model, cold)
    assert_parity(model, warm)


def test_a_follow_up_on_a_cached_image_encodes_nothing_and_keeps_parity(clip):
    folder, model = clip
    harness = Harness(folder)
    harness.run(harness.chat(picture(1), QUESTION))
    assert harness.images_encoded == 1
    (follow_up,) = harness.run(harness.chat(picture(1), "Is there a mass?"))
    assert harness.images_encoded == 0
    assert follow_up.cached_tokens > 16
    assert_parity(model, follow_up)


def test_alike_prompts_with_other_images_or_tenants_share_nothing(clip):
    folder, model = clip
    harness = Harness(folder)
    harness.run(harness.chat(picture(1), QUESTION), salt="one")
    (other_image,) = harness.run(harness.chat(picture(2), QUESTION), salt="one")
    assert other_image.cached_tokens < 16
    assert_parity(model, other_image)
    (other_tenant,) = harness.run(harness.chat(picture(1), QUESTION), salt="two")
    assert (other_tenant.cached_tokens, harness.images_encoded) == (0, 1)


def test_parity_of_ragged_batches(checkpoint):
    folder, model = checkpoint
    harness = Harness(folder, max_num_seqs=17, max_num_batched_tokens=96, max_encoder_tokens=48)
    batch = [harness.chat(*([picture(index)] * (index % 3)), "word " * (index % 5), QUESTION) for index in range(17)]
    for run in harness.run(*batch, max_tokens=[10 + index % 7 for index in range(17)]):
        assert_parity(model, run)
    assert max(len(step.rows) for step in harness.steps) > 8
    assert max(len(step.encode) for step in harness.steps) > 1


def test_parity_when_preempted_and_resumed(clip):
    folder, model = clip
    harness = Harness(folder, kv_blocks=40, max_model_len=100, enable_prefix_caching=False, encoder_cache_tokens=40)
    runs = harness.run(*[harness.chat(picture(index), QUESTION) for index in range(4)], max_tokens=24)
    assert harness.engine.stats.num_preemptions > 0
    for run in runs:
        assert_parity(model, run)


ATTENTION = r".*language_model.*\.(q|k|v|o)_proj"
EVERYTHING = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
ADAPTERS = {
    "attention": {"rank": 4, "targets": ATTENTION},
    "everything": {"rank": 16, "targets": EVERYTHING, "use_rslora": True},
    "values": {"rank": 9, "targets": r".*language_model.*\.v_proj"},
    "patterns": {
        "rank": 8,
        "targets": EVERYTHING,
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"layers.1.mlp.down_proj": 30, "q_proj": 5},
    },
}


@pytest.fixture(scope="module")
def adapted(clip, tmp_path_factory):
    folder, model = clip
    directory = tmp_path_factory.mktemp("adapters")
    references = {
        name: make_adapter(model, directory / name, seed=seed, **settings)
        for seed, (name, settings) in enumerate(ADAPTERS.items())
    }
    return folder, directory, {None: model} | references


@pytest.mark.parametrize("name", ADAPTERS)
def test_parity_of_an_adapter_with_peft(adapted, name):
    folder, directory, references = adapted
    harness = Harness(folder, adapters=directory)
    (run,) = harness.run(harness.chat(picture(1), QUESTION), adapters=[name])
    assert_parity(references[name], run)
    with pytest.raises(AssertionError):
        assert_parity(references[None], run)


def test_parity_of_adapters_mixed_in_one_batch_with_the_base(adapted):
    folder, directory, references = adapted
    harness = Harness(folder, adapters=directory, max_num_batched_tokens=64, max_adapters=3)
    names = [*references] * 3
    batch = [harness.chat(*([picture(index % 2)] * (index % 3)), QUESTION) for index in range(len(names))]
    runs = harness.run(*batch, adapters=names, max_tokens=[3 + index % 6 for index in range(len(names))])
    assert max(len(step.rows) for step in harness.steps) > 4
    for run, name in zip(runs, names, strict=True):
        assert_parity(references[name], run)


def test_the_same_prompt_with_another_adapter_shares_no_block(adapted):
    folder, directory, references = adapted
    harness = Harness(folder, adapters=directory)
    prompt = harness.chat(picture(1), QUESTION)
    for name in references:
        (run,) = harness.run(prompt, adapters=[name])
        assert run.cached_tokens == 0
        assert_parity(references[name], run)


def test_32_requests_at_once_ragged_half_with_images_half_with_an_adapter_equal_each_alone(adapted):
    folder, directory, references = adapted
    harness = Harness(
        folder, adapters=directory, kv_blocks=2048, max_num_seqs=32, max_num_batched_tokens=256, max_encoder_tokens=128
    )
    rng = np.random.default_rng(0)
    batch = [
        harness.chat(*([picture(index)] if index % 2 else []), "word " * int(rng.integers(1, 30)), QUESTION)
        for index in range(32)
    ]
    names = ["everything" if index % 4 < 2 else None for index in range(32)]
    limits = [int(rng.integers(14, 30)) for _ in range(32)]
    together = harness.run(*batch, adapters=names, max_tokens=limits)
    assert max(len(step.rows) for step in harness.steps) == 32
    alone = Harness(folder, adapters=directory, enable_prefix_caching=False)
    for prompt, name, limit, run in zip(batch, names, limits, together, strict=True):
        (single,) = alone.run(prompt, adapters=[name], max_tokens=limit)
        assert single.token_ids == run.token_ids
        assert_parity(references[name], run)
