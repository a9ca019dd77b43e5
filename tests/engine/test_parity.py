"""Parity is the specification: whatever the engine does with a request, its logits are transformers'.

Tiny random LLaVA checkpoints, fp32, against transformers and PEFT run in the same test.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.checkpoints import make_llava
from tests.engine.adapters import make_adapter
from tests.engine.harness import Harness, Run, assert_parity, picture, reference_logits
from vlm_serve.engine.batch import ImageKey
from vlm_serve.families.base import Prompt
from vlm_serve.kernels import dispatch

QUESTION = "What does the image show?"
REPEATED = "The heart is normal and the lungs are normal and the heart is normal and the lungs are normal."


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
    """Row 5 of engines.md, too: each image has as many placeholders as its encoder gives embeddings."""
    folder, model = checkpoint
    harness = Harness(folder)
    prompt = prompts(harness)[kind]
    (run,) = harness.run(prompt, max_tokens=16, prompt_logprobs=True)
    assert_parity(model, run)
    embeddings = harness.engine.runner._embeddings
    assert [len(embeddings[ImageKey(span.inputs.digest, "")]) for span in prompt.images] == [
        span.inputs.num_tokens for span in prompt.images
    ]
    is_image = {at for span in prompt.images for at in range(span.offset, span.end)}
    placeholder = model.config.image_token_id
    assert {at for at, token in enumerate(prompt.token_ids) if token == placeholder} == is_image


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


def test_parity_of_exact_ties_in_whatever_batch(tmp_path):
    """Each row of the head has one weight alone, which five tokens share: their logits are equal to the last bit,
    however a matrix product is cut up, and transformers' choice is the first of them.
    """
    model = make_llava(tmp_path)
    model.lm_head.weight.data = torch.eye(64).repeat(5, 1)
    model.save_pretrained(tmp_path)
    harness = Harness(tmp_path, max_num_seqs=17)
    batch = [harness.chat("word " * index, QUESTION) for index in range(17)]
    for run in harness.run(batch[0]) + harness.run(*batch):
        assert_parity(model, run)
        ids = torch.tensor([run.prompt.token_ids])
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        answer = answer[0, ids.shape[1] :].tolist()
        assert run.token_ids[: len(answer)] == answer
        assert max(run.token_ids) < 64
        expected = reference_logits(model, run)
        assert ((expected == expected.amax(-1, keepdim=True)).sum(-1) == 5).all()


def assert_ends(chunks: list[tuple[int, int]], length: int, budget: int) -> None:
    """A prompt is computed in chunks as large as the budget lets them be."""
    assert [end for _, end in chunks if end <= length] == [*range(budget, length, budget), length]


@pytest.mark.parametrize("name", [None, "everything"])
def test_parity_when_chunked_at_every_split_point(adapted, name):
    folder, directory, references = adapted
    harness = Harness(folder, adapters=directory, enable_prefix_caching=False, max_num_seqs=1)
    prompt = harness.chat(picture(1), "Is it ", picture(2), "?")
    for budget in range(1, len(prompt.token_ids) + 1):
        harness.set(max_num_batched_tokens=budget)
        (run,) = harness.run(prompt, max_tokens=3, adapters=[name], prompt_logprobs=True)
        assert_ends(run.chunks, len(prompt.token_ids), budget)
        assert_parity(references[name], run)


def both_ways(prompt: Prompt) -> Prompt:
    """The prompt with its images' spans atomic, for the engine and for the reference."""
    spans = [replace(span, inputs=replace(span.inputs, attends_both_ways=True)) for span in prompt.images]
    return replace(prompt, images=tuple(spans))


def parts_a_span(prompt: Prompt, position: int) -> bool:
    return any(span.offset < position < span.end for span in prompt.images)


def assert_parts_no_image(run: Run) -> None:
    """No chunk begins or ends inside one."""
    for begin, end in run.chunks:
        assert not parts_a_span(run.prompt, begin)
        assert not parts_a_span(run.prompt, end)


def assert_cuts_are_moved_no_farther_than_they_must(run: Run, budget: int) -> None:
    """A chunk is past the budget only if it is an image, and below it only before an image or at the prompt's end."""
    spans = {(span.offset, span.end) for span in run.prompt.images}
    early = {offset for offset, _ in spans} | {len(run.prompt.token_ids)}
    for begin, end in run.chunks:
        if begin < len(run.prompt.token_ids) and (begin, end) not in spans:
            assert end - begin == budget or (end - begin < budget and end in early)


def test_a_cut_inside_a_span_that_attends_both_ways_is_moved(clip):
    """Row 26 of engines.md: chunks move around such a span, and everything else still chunks."""
    folder, model = clip
    harness = Harness(folder, enable_prefix_caching=False, max_num_seqs=1)
    causal = harness.chat("Is it ", picture(1), "or ", picture(2), "?")
    prompt, moved = both_ways(causal), 0
    for budget in range(1, len(prompt.token_ids) + 1):
        harness.set(max_num_batched_tokens=budget)
        assert harness.run(causal, max_tokens=1)[0].chunks[0] == (0, budget)
        (run,) = harness.run(prompt, max_tokens=3, prompt_logprobs=True)
        (cut,) = [span.offset for span in prompt.images if span.offset < budget < span.end] or [budget]
        assert run.chunks[0] == (0, cut)
        moved += cut != budget
        assert_parts_no_image(run)
        assert_cuts_are_moved_no_farther_than_they_must(run, budget)
        assert_parity(model, run)
    assert moved == 2 * 15


def test_a_prefix_hit_never_ends_inside_a_span_that_attends_both_ways(clip):
    folder, model = clip
    inside = 0
    for words in range(4):
        found = []
        for mark in (both_ways, lambda prompt: prompt):
            harness = Harness(folder, max_num_seqs=1)
            first, second = (
                mark(harness.chat("a " * words, picture(1), question)) for question in (QUESTION, "Is there a mass?")
            )
            harness.run(first)
            (run,) = harness.run(second)
            assert_parity(model, run)
            found.append(run.cached_tokens)
        hit, causal_hit = found
        assert hit == causal_hit or parts_a_span(second, causal_hit)
        assert not parts_a_span(second, hit)
        inside += parts_a_span(second, causal_hit)
    assert inside > 0


def test_parity_cached_and_cold(clip):
    folder, model = clip
    harness = Harness(folder)
    prompt = harness.chat(picture(1), QUESTION)
    cold, warm = harness.run(prompt)[0], harness.run(prompt)[0]
    assert (cold.cached_tokens, warm.cached_tokens) == (0, (len(prompt.token_ids) - 1) // 4 * 4)
    assert warm.token_ids == cold.token_ids
    (again,) = harness.run(prompt, prompt_logprobs=True)  # what is cached has none
    for run in (cold, warm, again):
        assert_parity(model, run)


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
    """Rows 2 and 16 of engines.md: no caller's word is a key, and no tenant hits what is another's."""
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


@pytest.mark.parametrize("mark", [both_ways, lambda prompt: prompt], ids=["both ways", "causal"])
def test_parity_when_preempted_and_resumed(clip, mark):
    folder, model = clip
    harness = Harness(folder, kv_blocks=40, max_model_len=100, enable_prefix_caching=False, encoder_cache_tokens=40)
    prompts = [mark(harness.chat(picture(index), QUESTION)) for index in range(4)]
    runs = harness.run(*prompts, max_tokens=24, prompt_logprobs=[False, True] * 2)
    assert harness.engine.stats.num_preemptions > 0
    for run in runs:
        if mark is both_ways:
            assert_parts_no_image(run)
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
    """Row 7 of engines.md: the engine knows an adapter by the digest of its files, whatever its name."""
    folder, directory, references = adapted
    harness = Harness(folder, adapters=directory)
    prompt = harness.chat(picture(1), QUESTION)
    for name in references:
        (run,) = harness.run(prompt, adapters=[name])
        assert run.cached_tokens == 0
        assert_parity(references[name], run)


def test_a_step_without_adapters_runs_the_plain_path(adapted, monkeypatch):
    """Row 12 of engines.md: those that are loaded cost a request for the base model nothing."""
    folder, directory, references = adapted
    harness = Harness(folder, adapters=directory)
    harness.run(harness.chat(QUESTION), adapters=["everything"])
    calls = []
    apply_lora = dispatch.apply_lora
    monkeypatch.setattr(dispatch, "apply_lora", lambda *arguments: calls.append(1) or apply_lora(*arguments))
    (run,) = harness.run(harness.chat(picture(1), QUESTION))
    assert_parity(references[None], run)
    assert not calls
    harness.run(harness.chat(QUESTION), adapters=["everything"])
    assert calls


def test_32_requests_at_once_ragged_half_with_images_half_with_an_adapter_equal_each_alone(adapted):
    """Row 20 of engines.md: the same answer whatever else is in the batch."""
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


SETTINGS = {
    "prefix caching": {},
    "no prefix caching": {"enable_prefix_caching": False},
    "small chunks": {"max_num_batched_tokens": 20, "max_encoder_tokens": 16},
    "n-gram": {"speculative_tokens": 3},
    "n-gram, small chunks, no prefix caching": {
        "speculative_tokens": 5,
        "max_num_batched_tokens": 20,
        "enable_prefix_caching": False,
    },
    "preempted and resumed": {"kv_blocks": 120, "max_model_len": 200},
    "preempted and resumed, n-gram": {"kv_blocks": 120, "max_model_len": 200, "speculative_tokens": 3},
}


@pytest.fixture(scope="module")
def repeating(tmp_path_factory):
    """A model that repeats itself, so that what stood there before is a good guess; and it with an adapter."""
    folder, directory = tmp_path_factory.mktemp("llava"), tmp_path_factory.mktemp("adapters")
    model = make_llava(folder, initializer_range=0.05)
    adapted = make_adapter(model, directory / "one", rank=4, seed=0, targets=EVERYTHING)
    return folder, directory, {None: model, "one": adapted}


@pytest.mark.parametrize("size", [1, 17])
@pytest.mark.parametrize("setting", SETTINGS)
def test_parity_in_every_setting(repeating, setting, size):
    """Of ragged prompts with an image and without, with an adapter and without, cold and warm. Of a batch every second
    one asks for its prompt's log-probabilities.
    """
    folder, directory, references = repeating
    config = SETTINGS[setting]
    harness = Harness(folder, adapters=directory, **({"max_num_seqs": 17, "kv_blocks": 2048} | config))
    names = [None, "one", None, "one", None] * 4
    batch = [
        harness.chat(*([picture(index)] * (index % 4 // 2)), REPEATED[: 20 + 5 * index], " " + REPEATED)
        for index in range(17)
    ]
    alone = size == 1
    groups = [[index] for index in range(4)] if alone else [list(range(17))]
    for indices in groups:
        chosen = {"adapters": [names[index] for index in indices], "max_tokens": [24 + index for index in indices]}
        prompts = [batch[index] for index in indices]
        asked = [index % 2 == 0 or alone for index in indices]
        cold = harness.run(*prompts, **chosen, prompt_logprobs=asked)
        warm = harness.run(*prompts, **chosen)
        for index, first, second in zip(indices, cold, warm, strict=True):
            assert_parity(references[names[index]], first)
            assert_parity(references[names[index]], second)
            assert first.token_ids == second.token_ids
        assert all(run.cached_tokens == 0 for run, is_asked in zip(cold, asked, strict=True) if is_asked)
        if alone:
            assert (warm[0].cached_tokens > 0) == config.get("enable_prefix_caching", True)
        if "max_num_batched_tokens" in config:
            assert all(len([end for _, end in run.chunks if end <= len(run.prompt.token_ids)]) > 1 for run in cold)
    stats = harness.engine.stats
    assert (stats.spec_accepted_tokens > 0) == ("speculative_tokens" in config)
    assert (stats.num_preemptions > 0) == ("kv_blocks" in config and not alone)
