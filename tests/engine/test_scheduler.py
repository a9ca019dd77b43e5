"""The scheduler keeps its budgets, loses no block, and lets every request end."""

import random

import numpy as np
import pytest

from tests.engine.requests import image, request
from vlm_serve.config import EngineConfig
from vlm_serve.engine.batch import ScheduledBatch
from vlm_serve.engine.scheduler import Scheduler
from vlm_serve.errors import ContextLengthError, InvalidRequestError
from vlm_serve.types import FinishReason, TokenOutput


def scheduler(*, num_blocks=64, max_model_len=128, **config) -> Scheduler:
    defaults = {"block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 16, "max_encoder_tokens": 8}
    defaults |= {"encoder_cache_tokens": 16, "max_adapters": 2}
    return Scheduler(EngineConfig(**(defaults | config)), num_blocks=num_blocks, max_model_len=max_model_len)


def draw(batch: ScheduledBatch, token: int = 1000) -> np.ndarray:
    return np.full(int(batch.samples.sum()), token, dtype=np.int64)


def step(one: Scheduler) -> tuple[ScheduledBatch, tuple[TokenOutput, ...]]:
    batch = one.schedule()
    assert batch is not None
    return batch, one.update(batch, draw(batch))


def finish(one: Scheduler, limit: int = 2_000) -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {}
    for _ in range(limit):
        if not one.has_work:
            return answers
        for output in step(one)[1]:
            answers.setdefault(output.request_id, []).extend(output.token_ids)
    raise AssertionError("it never came to an end")


def assert_empty(one: Scheduler) -> None:
    assert one.blocks.num_free == one.blocks.num_blocks
    assert len(one._free_rows) == one.config.max_num_seqs
    assert one.adapters.pinned == 0
    assert one.images.can_add(one.images.capacity)


def test_a_long_prompt_is_cut_into_chunks_of_the_budget():
    one = scheduler()
    one.add(request("a", 40, max_tokens=2))
    assert [step(one)[0].counts.tolist() for _ in range(4)] == [[16], [16], [8], [1]]
    assert not one.has_work
    assert_empty(one)


def test_a_token_is_drawn_only_when_all_known_ones_are_computed():
    one = scheduler()
    one.add(request("a", 20))
    assert step(one)[0].samples.tolist() == [False]
    assert step(one)[0].samples.tolist() == [True]


def test_decoding_goes_on_in_every_step_of_anothers_prefill():
    one = scheduler(max_encoder_tokens=4)
    one.add(request("long", 100, images=[(2, image(1)), (8, image(2))], max_tokens=1))
    one.add(request("a", 4, max_tokens=50))
    one.add(request("b", 4, max_tokens=50))
    first, _ = step(one)  # the second image finds no room, and two others come in behind the long prompt
    assert first.counts.tolist() == [8, 4, 4]
    for _ in range(6):
        batch, outputs = step(one)
        assert {"a", "b"} <= {output.request_id for output in outputs}
        assert batch.counts.tolist() == [14, 1, 1]


def test_the_budgets_of_tokens_rows_and_image_tokens_are_kept():
    one = scheduler()
    for index in range(20):
        one.add(request(index, 12, images=[(3, image(index))]))
    while one.has_work:
        batch, _ = step(one)
        assert batch.num_tokens <= 16
        assert len(set(batch.rows.tolist())) == len(batch.rows) <= 8
        assert sum(inputs.num_tokens for _, inputs in batch.encode) <= 8
        assert one.images.held <= 16
    assert_empty(one)


def test_an_image_larger_than_a_steps_budget_is_encoded_alone():
    one = scheduler(max_encoder_tokens=2)
    one.add(request("a", 12, images=[(0, image(1)), (5, image(2))]))
    assert len(step(one)[0].encode) == 1
    finish(one)


def test_a_chunk_ends_just_before_an_image_that_finds_no_room():
    one = scheduler(max_num_batched_tokens=64)
    one.add(request("a", 30, images=[(2, image(1)), (10, image(2)), (20, image(3))]))
    first, _ = step(one)
    assert (first.counts.tolist(), len(first.encode)) == ([20], 2)
    second, _ = step(one)
    assert (second.counts.tolist(), len(second.encode)) == ([10], 1)


def test_a_cached_image_is_not_encoded_again():
    one = scheduler(enable_prefix_caching=False)
    for name in "ab":
        one.add(request(name, 12, images=[(3, image(7))], max_tokens=1))
        batch, _ = step(one)
        assert len(batch.encode) == (name == "a")
    assert (one.stats().mm_cache_queries, one.stats().mm_cache_hits) == (2, 1)


def test_an_image_inside_a_cached_prefix_is_not_even_asked_for():
    one = scheduler()
    for name in "ab":
        one.add(request(name, 16, images=[(3, image(7))], max_tokens=1))
        finish(one)
    assert one.stats().mm_cache_queries == 1
    assert one.stats().prefix_cache_hits == 12


def test_another_tenants_cached_image_is_encoded_again():
    one = scheduler(enable_prefix_caching=False)
    for salt in "ab":
        one.add(request(salt, 12, images=[(3, image(7))], max_tokens=1, salt=salt))
        assert len(step(one)[0].encode) == 1


def test_a_full_cache_preempts_the_latest_and_every_answer_is_whole():
    one = scheduler(num_blocks=12, max_model_len=40)
    for index in range(6):
        one.add(request(index, [index] * 8, max_tokens=20))
    answers = finish(one)
    assert one.num_preemptions > 0
    assert {len(tokens) for tokens in answers.values()} == {20}
    assert list(answers) == [str(index) for index in range(6)]
    assert_empty(one)


def test_more_adapters_than_slots_take_turns():
    one = scheduler()
    for index in range(6):
        one.add(request(index, 8, adapter=str(index), max_tokens=3))
    used = set()
    while one.has_work:
        batch, _ = step(one)
        used.update(slot for slot, _ in batch.load_adapters)
        assert one.adapters.pinned <= 2
    assert used == {0, 1}
    assert_empty(one)


def test_an_adapter_that_finds_no_slot_lets_base_requests_pass_but_no_other_adapter():
    one = scheduler(max_adapters=1)
    for name, adapter in (("a", "x"), ("b", "y"), ("c", "x"), ("d", None)):
        one.add(request(name, 4, adapter=adapter, max_tokens=5))
    step(one)
    assert [sequence.request.request_id for sequence in one.running] == ["a", "d"]
    order = [output.request_id for _ in range(20) if one.has_work for output in step(one)[1]]
    assert order.index("b") < order.index("c")
    assert_empty(one)


def test_suspects_run_one_at_a_time_and_keep_what_they_have_generated():
    one = scheduler()
    for name in "abc":
        one.add(request(name, 4, max_tokens=4))
    step(one)
    batch = one.schedule()
    one.suspect(batch)
    assert_books_agree(one)
    one.add(request("new", 4))
    drawn = []
    for _ in range(3):
        alone, (output,) = step(one)
        drawn.append(output.request_id)
        assert len(alone.rows) == 1
    assert drawn == ["a", "b", "c"]
    assert len(step(one)[0].rows) == 4
    answers = finish(one)
    assert {name: len(answers[name]) for name in "abc"} == {"a": 1, "b": 1, "c": 1}
    assert_empty(one)


def test_an_end_token_ends_the_answer():
    one = scheduler()
    one.add(request("a", 4, max_tokens=10, eos=(1000,)))
    _, (output,) = step(one)
    assert (output.finish_reason, output.token_ids) == (FinishReason.STOP, (1000,))
    assert_empty(one)


@pytest.mark.parametrize("steps", [0, 1, 3, 5], ids=["queued", "in prefill", "after prefill", "in decode"])
def test_an_aborted_request_gives_everything_back(steps):
    one = scheduler()
    one.add(request("a", 40, images=[(3, image(1))], adapter="x", max_tokens=50))
    for _ in range(steps):
        step(one)
    one.abort("a")
    one.abort("a")
    assert not one.has_work
    assert_empty(one)


def test_a_failed_step_ends_its_requests_and_no_other():
    one = scheduler(max_num_batched_tokens=8)
    one.add(request("a", 8, images=[(3, image(1))], adapter="x"))
    one.add(request("b", 8))
    batch = one.schedule()
    outputs = one.fail(batch, "sorry")
    assert [(o.request_id, o.finish_reason, o.error) for o in outputs] == [("a", FinishReason.ERROR, "sorry")]
    assert len(finish(one)["b"]) == 4
    assert_empty(one)
    one.add(request("c", 8, images=[(3, image(1))], adapter="x"))
    again = one.schedule()
    assert (len(again.encode), len(again.load_adapters)) == (1, 1)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (request("a", 128), ContextLengthError),
        (request("a", 100, max_tokens=29), ContextLengthError),
        (request("a", 0), InvalidRequestError),
        (request("a", 40, images=[(0, image(1, num_tokens=17))]), InvalidRequestError),
    ],
    ids=["prompt too long", "answer too long", "empty", "image larger than the cache"],
)
def test_what_can_never_be_served_is_refused_at_admission(bad, error):
    one = scheduler()
    with pytest.raises(error):
        one.add(bad)
    assert not one.has_work


def assert_books_agree(one: Scheduler) -> None:
    held = [block for sequence in one.running for block in sequence.block_table]
    assert all(sequence.computed == 0 and not sequence.block_table for sequence in one.waiting)
    blocks = one.blocks
    for block in range(blocks.num_blocks):
        assert blocks._references[block] == held.count(block)
        assert (block in blocks._free) == (held.count(block) == 0)
    assert {block: known for known, block in blocks._block_of.items()} == blocks._hash_of
    pinned = [key for sequence in one.running for key in sequence.pinned_images]
    assert one.images._pins == {key: pinned.count(key) for key in pinned}
    assert one.images._held == sum(one.images._sizes.values()) <= one.images.capacity
    waiting = [sequence.is_suspect for sequence in one.waiting]
    assert waiting == sorted(waiting, reverse=True)
    assert one.images._pinned == sum(one.images._sizes[key] for key in set(pinned))
    adapters = [s.request.adapter for s in one.running if s.request.adapter]
    assert one.adapters._pins == {name: adapters.count(name) for name in adapters}


@pytest.mark.parametrize("seed", range(30))
def test_random_loads_keep_the_books_and_come_to_an_end(seed):
    rng = random.Random(seed)
    one = scheduler(num_blocks=rng.choice([32, 40, 64]), encoder_cache_tokens=rng.choice([8, 16, 40]))
    alive: set[str] = set()
    for tick in range(150):
        if rng.random() < 0.4:
            length = rng.randrange(1, 60)
            count = rng.randrange(0, 1 + length // 6)
            images = [(index * 6, image(rng.randrange(4))) for index in range(count)]
            alive.add(str(tick))
            one.add(
                request(
                    tick,
                    [rng.randrange(2) for _ in range(length)],
                    images=images,
                    max_tokens=rng.randrange(1, 30),
                    adapter=rng.choice([None, None, "x", "y", "z"]),
                    salt=rng.choice("ab"),
                )
            )
        if alive and rng.random() < 0.1:
            one.abort(alive.pop())
        if (batch := one.schedule()) is not None:
            if rng.random() < 0.05:
                rng.choice([one.suspect, lambda failed: one.fail(failed, "a fault")])(batch)
            else:
                one.update(batch, draw(batch, rng.randrange(2)))
        assert_books_agree(one)
    finish(one)
    assert_empty(one)
