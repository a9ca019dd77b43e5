"""The scheduler keeps its budgets, loses no block, and lets every request end."""

import time

import pytest

from tests.engine.books import assert_books_agree, assert_empty
from tests.engine.requests import image, request
from vlm_serve.config import EngineConfig
from vlm_serve.engine.batch import ScheduledBatch, StepResult
from vlm_serve.engine.scheduler import Scheduler
from vlm_serve.errors import ConfigurationError, ContextLengthError, InvalidRequestError
from vlm_serve.types import FinishReason, TokenOutput


def scheduler(*, num_blocks=64, max_model_len=128, windows=(None,), clock=time.perf_counter, **config) -> Scheduler:
    defaults = {"block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 16, "max_encoder_tokens": 8}
    defaults |= {"encoder_cache_tokens": 16, "max_adapters": 2}
    engine_config = EngineConfig(**(defaults | config))
    return Scheduler(engine_config, num_blocks=num_blocks, max_model_len=max_model_len, windows=windows, clock=clock)


def draw(batch: ScheduledBatch, token: int = 1000) -> StepResult:
    return StepResult(((token,),) * int(batch.samples.sum()))


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
    """Row 18 of engines.md: neither prefill nor encoder work stalls decoding."""
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


def test_images_are_encoded_a_few_a_step_and_nobody_who_decodes_waits_for_them():
    """Row 18 of engines.md: encoder work has a budget, and between its pieces everybody gets a token."""
    one = scheduler(max_num_batched_tokens=64, max_encoder_tokens=8, encoder_cache_tokens=64)
    one.add(request("decodes", 4, max_tokens=50))
    step(one)
    one.add(request("many", [9] * 48, images=[(8 * at, image(at)) for at in range(6)], max_tokens=1))
    encoded = []
    while len(one.running) > 1 or len(encoded) < 2:
        batch, outputs = step(one)
        encoded.append(len(batch.encode))
        assert "decodes" in {output.request_id for output in outputs}
    assert encoded == [2, 2, 2]


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


def test_a_request_is_counted_once_however_many_answers_it_has():
    one = scheduler(max_num_seqs=2)
    one.add(request("a", 9, n=4))
    stats = one.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting) == (0, 1)
    step(one)
    step(one)
    one.add(request("b", [5] * 9, n=2))
    stats = one.stats()
    assert (len(one.running), len(one.waiting)) == (2, 4)
    assert (stats.num_requests_running, stats.num_requests_waiting) == (1, 1)


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


def test_nobody_comes_in_past_a_suspect_that_waits_for_room():
    one = scheduler(num_blocks=12, max_model_len=48)
    one.add(request("long", [1] * 36))
    step(one)
    one.add(request("stat", [2] * 13, max_tokens=6, priority=-1))
    batch = one.schedule()
    assert batch.counts.tolist() == [13, 3]
    one.suspect(batch)
    one.add(request("small", [3] * 4))
    for _ in range(6):
        batch, (output,) = step(one)  # beside its blocks there is room for the small one, not for the long one
        assert (output.request_id, len(batch.rows)) == ("stat", 1)
    assert list(finish(one)) == ["long", "small"]
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
    """Row 6 of engines.md: an image larger than the encoder cache is refused before it is queued."""
    one = scheduler()
    with pytest.raises(error):
        one.add(bad)
    assert not one.has_work


@pytest.mark.parametrize(
    "senseless",
    [
        {"speculative_tokens": -1},
        {"block_size": 0},
        {"max_num_seqs": 0},
        {"max_num_seqs": 9, "max_num_batched_tokens": 8},
        {"max_encoder_tokens": 0},
        {"encoder_cache_tokens": -1},
        {"max_adapters": 0},
        {"max_adapter_rank": 0},
        {"max_model_len": 1},
        {"kv_cache_memory": 0},
        {"kv_cache_memory": -1},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused_by_name(senseless):
    with pytest.raises(ConfigurationError, match=next(iter(senseless))):
        EngineConfig(**senseless)
