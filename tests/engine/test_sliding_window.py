"""Layers that see a sliding window agree with transformers, and hold no more of the cache than the window.

Tiny random checkpoints, fp32: Mistral, whose layers all slide, and Qwen2, of which some see all.
"""

import pytest

from tests.checkpoints import make_llava
from tests.engine.harness import Harness, assert_parity, picture
from tests.engine.requests import request
from vlm_serve.engine.block_manager import most_blocks
from vlm_serve.engine.engine import Engine
from vlm_serve.engine.sequence import Sequence
from vlm_serve.families import load_family
from vlm_serve.families.base import Prompt

WINDOW = 8
QUESTION = "What does the image show? Is there a mass in the left upper lobe?"
SLIDING, FULL = "sliding_attention", "full_attention"
KINDS = {
    "all slide": {"model_type": "mistral", "sliding_window": WINDOW},
    "one in three full": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "num_hidden_layers": 6,
        "layer_types": [SLIDING, SLIDING, FULL] * 2,
    },
    "five to one": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "num_hidden_layers": 6,
        "layer_types": [SLIDING] * 5 + [FULL],
    },
}


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("windowed")
    return folder, make_llava(folder, **KINDS[request.param])


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("windowed")
    return folder, make_llava(folder, **KINDS["all slide"])


def test_parity_of_ragged_batches(checkpoint):
    folder, model = checkpoint
    harness = Harness(folder, max_num_seqs=7, max_num_batched_tokens=40)
    prompts = [harness.chat("word " * (index % 5), QUESTION[: 5 + 9 * index]) for index in range(6)]
    prompts.append(harness.chat(picture(1), QUESTION))
    asked = [index % 2 == 0 for index in range(7)]
    for run in harness.run(*prompts, max_tokens=[10 + index for index in range(7)], prompt_logprobs=asked):
        assert len(run.prompt.token_ids) > WINDOW
        assert_parity(model, run)
    assert max(len(step.rows) for step in harness.steps) > 4


def test_parity_when_chunked_at_every_split_point(checkpoint):
    folder, model = checkpoint
    harness = Harness(folder, enable_prefix_caching=False, max_num_seqs=1)
    prompt = harness.chat(QUESTION[:30])
    for chunk in range(1, len(prompt.token_ids) + 1):
        harness.set(max_num_batched_tokens=chunk)
        (run,) = harness.run(prompt, max_tokens=3, prompt_logprobs=True)
        assert max(batch.num_tokens for batch in harness.steps) == chunk
        assert_parity(model, run)


@pytest.mark.parametrize("chunk", [4, 512])
def test_parity_cached_and_cold(checkpoint, chunk):
    folder, model = checkpoint
    harness = Harness(folder, max_num_seqs=1, max_num_batched_tokens=chunk)
    prompt = harness.chat(QUESTION)
    cold, warm = harness.run(prompt)[0], harness.run(prompt)[0]
    assert (cold.cached_tokens, warm.cached_tokens) == (0, (len(prompt.token_ids) - 1) // 4 * 4)
    (other,) = harness.run(harness.chat(QUESTION[:40] + "fracture?"))
    assert 0 < other.cached_tokens < warm.cached_tokens
    (again,) = harness.run(prompt, prompt_logprobs=True)
    for run in (cold, warm, other, again):
        assert_parity(model, run)


def forget(harness: Harness, prompt: Prompt, group: int, index: int) -> None:
    """One block of a cached prompt is handed out to somebody else."""
    books, probe = harness.engine.scheduler.blocks, Sequence.create(request("-", prompt.token_ids), 1)
    books.find_prefix(probe)
    books._hash_of.pop(books._block_of.pop((group, probe.block_hashes[index])))


def test_parity_of_a_hit_that_lacks_blocks(checkpoint):
    folder, model = checkpoint
    harness = Harness(folder, max_num_seqs=1)
    windows = harness.engine.scheduler.blocks.windows
    prompt = harness.chat(QUESTION)
    blocks = (len(prompt.token_ids) - 1) // 4
    harness.run(prompt, max_tokens=2)
    # A query that follows n blocks sees those before it from n - 2 on.
    found = {blocks - 1: blocks - 1, blocks - 2: blocks - 2, blocks - 3: blocks, 0: blocks}
    for lost, cached in found.items():
        forget(harness, prompt, len(windows) - 1, lost)
        (run,) = harness.run(prompt, max_tokens=2)
        assert run.cached_tokens == cached * 4
        assert_parity(model, run)
    if windows[0] is None:
        forget(harness, prompt, 0, 5)
        (run,) = harness.run(prompt, max_tokens=2)
        assert run.cached_tokens == 5 * 4
        assert_parity(model, run)


def test_parity_when_preempted_and_resumed(checkpoint):
    folder, model = checkpoint
    windows = [group.window for group in load_family(folder).decoder_config.layer_groups]
    just_one = -(-most_blocks(130, 4, windows, max_chunk=16) // len(windows))
    limits = {"max_model_len": 130, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    harness = Harness(folder, kv_blocks=just_one, enable_prefix_caching=False, **limits)
    runs = harness.run(*[harness.chat(QUESTION[: 8 * index]) for index in range(1, 4)], max_tokens=90)
    if None in windows:  # a few windows fit, two whole contexts do not
        assert harness.engine.stats.num_preemptions > 0
    for run in runs:
        assert_parity(model, run)


def blocks_after_each_step(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled while the harness runs."""
    used = []
    step = Engine.step

    def watched(engine: Engine):
        output = step(engine)
        used.append(output.stats.kv_blocks_used)
        return output

    monkeypatch.setattr(Engine, "step", watched)
    return used


def test_an_answer_of_500_tokens_holds_the_window_and_a_block(mistral, monkeypatch):
    folder, model = mistral
    harness = Harness(folder, max_num_seqs=1)
    used = blocks_after_each_step(harness, monkeypatch)
    (run,) = harness.run(harness.chat(QUESTION), max_tokens=500)
    assert len(used) == 500
    assert max(used) <= WINDOW // 4 + 1
    assert used[-1] == 0
    assert_parity(model, run)


def test_an_answer_may_be_longer_than_the_whole_cache(mistral):
    folder, model = mistral
    harness = Harness(folder, kv_blocks=7, max_num_seqs=1, max_num_batched_tokens=8)
    (run,) = harness.run(harness.chat(QUESTION), max_tokens=120)
    assert harness.engine.scheduler.blocks.num_blocks * 4 < 120
    assert harness.engine.stats.num_preemptions == 0
    assert_parity(model, run)


def test_layers_that_see_all_hold_all_and_the_others_the_window(checkpoint, monkeypatch):
    folder, _ = checkpoint
    harness = Harness(folder, max_num_seqs=1)
    windows = harness.engine.scheduler.blocks.windows
    used = blocks_after_each_step(harness, monkeypatch)
    prompt = harness.chat(QUESTION)
    harness.run(prompt, max_tokens=60)
    whole = -(-(len(prompt.token_ids) + 58) // 4)
    assert used[-2] <= sum(whole if window is None else WINDOW // 4 + 1 for window in windows)
