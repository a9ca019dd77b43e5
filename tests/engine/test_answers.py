"""What a request asks for beside tokens: several answers, ends, log-probabilities, an embedding, guesses."""

import numpy as np
import pytest

from tests.engine.books import Machine, assert_books_agree, assert_empty, fake_logprobs
from tests.engine.requests import image, request
from tests.engine.test_scheduler import draw, finish, scheduler, step
from vlm_serve.engine.batch import Failure, ScheduledBatch, StepResult
from vlm_serve.engine.encoder_cache import EncoderCache
from vlm_serve.engine.scheduler import Scheduler
from vlm_serve.types import FinishReason, TokenOutput


def outputs_of(one: Scheduler, limit: int = 500) -> list[TokenOutput]:
    """Runs on a machine that holds the scheduler to its word."""
    machine, outputs = Machine(one), []
    for _ in range(limit):
        if not one.has_work:
            return outputs
        batch = one.schedule()
        outputs += one.update(batch, machine.run(batch))
        assert_books_agree(one)
    raise AssertionError("it never came to an end")


def answers_of(outputs: list[TokenOutput]) -> dict[int, list[int]]:
    answers: dict[int, list[int]] = {}
    for output in outputs:
        answers.setdefault(output.index, []).extend(output.token_ids)
    return answers


@pytest.mark.parametrize("caching", [True, False], ids=["prefix caching", "none"])
def test_the_answers_to_a_prompt_share_its_full_blocks(caching):
    one = scheduler(enable_prefix_caching=caching, max_num_batched_tokens=64)
    one.add(request("a", 18, n=4, images=[(3, image(1))]))
    first, _ = step(one)
    assert first.counts.tolist() == [18]
    second, _ = step(one)
    assert second.counts.tolist() == [1, 2, 2, 2]
    tables = [sequence.block_table for sequence in one.running]
    assert all(table[:4] == tables[0][:4] for table in tables)
    assert len({table[4] for table in tables}) == 4
    assert one.stats().mm_cache_queries == 1
    assert one.stats().kv_blocks_used == 4 + 4
    finish(one)
    assert_empty(one)


def test_an_image_that_is_cut_stays_on_the_device_until_it_is_passed():
    """Row 4 of engines.md: eviction never takes what a running request is in the middle of."""
    one = scheduler(max_num_batched_tokens=8, encoder_cache_tokens=8)
    one.add(request("a", 16, images=[(4, image(1, num_tokens=8))]))
    assert step(one)[0].counts.tolist() == [8]
    one.add(request("b", 8, images=[(0, image(2, num_tokens=8))]))
    assert not one.images.can_add(1)
    step(one)
    assert one.images.can_add(8)
    finish(one)
    assert (one.stats().mm_cache_queries, one.stats().mm_cache_hits) == (2, 0)


def test_the_image_that_gives_way_is_one_that_nobody_needs():
    """Row 4 of engines.md, in the books of the encoder cache themselves."""
    cache = EncoderCache(12)
    for key in (("old", ""), ("new", "")):
        assert cache.add(key, 6) == []
        cache.pin(key)
    cache.unpin(("new", ""))
    assert cache.add(("next", ""), 6) == [("new", "")]


def test_the_adapter_that_gives_up_its_slot_is_one_that_nobody_uses():
    one = scheduler(max_adapters=2)
    one.add(request("a", 4, adapter="x", max_tokens=9))
    step(one)
    one.add(request("b", 4, adapter="y", max_tokens=1))
    step(one)
    one.add(request("c", 4, adapter="z"))
    batch, _ = step(one)
    assert batch.load_adapters == ((1, "z"),)
    finish(one)


def test_a_request_ends_when_all_its_answers_have():
    one = scheduler()
    one.add(request("a", 9, n=3, max_tokens=5))
    outputs = outputs_of(one)
    assert {index: len(tokens) for index, tokens in answers_of(outputs).items()} == {0: 5, 1: 5, 2: 5}
    assert sorted(output.index for output in outputs if output.finish_reason) == [0, 1, 2]
    assert_empty(one)


def test_more_answers_than_rows_take_turns():
    one = scheduler(max_num_seqs=2)
    one.add(request("a", 9, n=7))
    assert answers_of(outputs_of(one)).keys() == set(range(7))
    assert_empty(one)


def test_answer_i_of_a_seeded_request_draws_with_the_seed_plus_i():
    one = scheduler()
    one.add(request("a", 9, n=3, seed=2**64 - 1))
    seeds = [new.draw for _ in range(2) for new in step(one)[0].new_rows]
    assert seeds == [2**64 - 1, 0, 1]


@pytest.mark.parametrize("steps", [0, 1, 3], ids=["queued", "in prefill", "in decode"])
@pytest.mark.parametrize("index", [0, 1])
def test_one_answer_is_aborted_and_the_others_go_on(index, steps):
    one = scheduler(max_num_batched_tokens=8)
    one.add(request("a", 12, n=3, max_tokens=6))
    for _ in range(steps):
        step(one)
    one.abort("a", index)
    assert_books_agree(one)
    ended = {output.index for output in outputs_of_draws(one) if output.finish_reason}
    assert ended == {0, 1, 2} - {index}
    assert_empty(one)


def outputs_of_draws(one: Scheduler) -> list[TokenOutput]:
    outputs: list[TokenOutput] = []
    while one.has_work:
        outputs += step(one)[1]
    return outputs


def test_a_request_whose_answers_are_aborted_one_by_one_has_ended():
    one = scheduler()
    one.add(request("a", 12, n=2))
    step(one)
    one.abort("a", 1)
    one.abort("a", 0)
    one.abort("a", 0)
    assert_empty(one)
    one.add(request("a", 12))


def test_a_fault_ends_a_request_with_all_its_answers():
    """Row 3 of engines.md: one bad request ends alone."""
    one = scheduler(max_num_seqs=1)
    one.add(request("a", 4, n=3))
    one.add(request("b", 4, priority=1))
    outputs = one.fail(one.schedule(), "sorry")
    assert [(output.request_id, output.index) for output in outputs] == [("a", 0), ("a", 1), ("a", 2)]
    assert list(finish(one)) == ["b"]


def test_an_answer_that_cannot_go_on_ends_its_request_and_no_other():
    """Row 3 of engines.md, for a grammar whose matcher fails."""
    one = scheduler()
    one.add(request("a", 4))
    one.add(request("b", [5] * 4))
    batch = one.schedule()
    outputs = one.update(batch, StepResult(((), (7,)), failed={int(batch.rows[0]): Failure("no word fits", "stop")}))
    assert [(o.request_id, o.error, o.error_param, o.finish_reason) for o in outputs] == [
        ("b", None, None, None),
        ("a", "no word fits", "stop", FinishReason.ERROR),
    ]
    assert_books_agree(one)
    assert list(finish(one)) == ["b"]
    assert_empty(one)


def test_a_stop_token_ends_the_answer_and_is_named():
    one = scheduler()
    one.add(request("a", 4, stop_token_ids=[7, 1000], ignore_eos=True, eos=(5,)))
    _, (output,) = step(one)
    assert (output.finish_reason, output.stop_token) == (FinishReason.STOP, 1000)


def test_ignore_eos_ignores_the_end_token_alone():
    one = scheduler()
    one.add(request("a", 4, ignore_eos=True, eos=(1000,), max_tokens=3))
    assert finish(one) == {"a": [1000] * 3}


def test_nothing_ends_an_answer_before_min_tokens():
    one = scheduler()
    one.add(request("a", 4, stop_token_ids=[1000], eos=(1000,), min_tokens=3, max_tokens=9))
    assert finish(one) == {"a": [1000] * 3}


def test_a_request_that_pools_gives_its_embedding_and_no_token():
    one = scheduler()
    one.add(request("a", 128, pooling=True, max_tokens=None))
    outputs = []
    while one.has_work:
        batch = one.schedule()
        rows = batch.rows[batch.samples].tolist()
        embeddings = {row: np.arange(3, dtype=np.float32) for row in rows}
        outputs += one.update(batch, StepResult(((),) * len(rows), embeddings=embeddings))
    (output,) = outputs
    assert output.embedding.tolist() == [0, 1, 2]
    assert (output.token_ids, output.finish_reason) == ((), FinishReason.STOP)
    assert output.queue_seconds is not None
    assert_empty(one)


def test_prompt_logprobs_of_all_chunks_come_once_in_order():
    one = scheduler(max_num_batched_tokens=8)
    one.add(request("a", 20, prompt_logprobs=0, max_tokens=3))
    first, *others = outputs_of(one)
    assert first.prompt_logprobs == tuple(fake_logprobs(at, at) for at in range(1, 20))
    assert not any(output.prompt_logprobs for output in others)


def test_a_prompt_in_the_cache_is_computed_again_for_its_logprobs():
    one = scheduler()
    one.add(request("warm", 20))
    outputs_of(one)
    one.add(request("a", 20, prompt_logprobs=0, n=3))
    outputs = outputs_of(one)
    assert [len(output.prompt_logprobs) for output in outputs if output.prompt_logprobs] == [19]
    assert outputs[0].cached_tokens == 0
    assert one.stats().prefix_cache_hits == 0


def test_a_preemption_in_the_middle_of_a_prompt_doubles_none_of_its_logprobs():
    one = scheduler(max_num_batched_tokens=8)
    one.add(request("a", 20, prompt_logprobs=0))
    machine = Machine(one)
    for _ in range(2):
        batch = one.schedule()
        one.update(batch, machine.run(batch))
    batch = one.schedule()
    machine.lose(batch)
    one.suspect(batch)
    outputs = []
    while one.has_work:
        batch = one.schedule()
        outputs += one.update(batch, machine.run(batch))
    assert outputs[0].prompt_logprobs == tuple(fake_logprobs(at, at) for at in range(1, 20))


def test_logprobs_go_with_their_tokens_and_those_past_the_end_are_dropped():
    one = scheduler(speculative_tokens=3)
    one.add(request("a", [1, 2, 3, 1, 2, 3], logprobs=0, eos=(9,)))
    batch = one.schedule()
    entries = tuple(fake_logprobs(token, token) for token in (5, 9, 6))
    (output,) = one.update(batch, StepResult(((5, 9, 6),), (entries,)))
    assert (output.token_ids, output.logprobs) == ((5, 9), entries[:2])
    assert output.finish_reason is FinishReason.STOP


def test_the_first_tokens_tell_how_long_a_request_waited_and_was_prefilled():
    now = [10.0]
    one = scheduler(max_num_seqs=1, clock=lambda: now[0])
    one.add(request("a", 20, n=2))
    now[0] = 12.0
    step(one)
    now[0] = 15.0
    _, (first,) = step(one)
    assert (first.queue_seconds, first.prefill_seconds) == (2.0, 3.0)
    assert all(output.queue_seconds is None for output in outputs_of_draws(one))


def accept(batch: ScheduledBatch, right: int, token: int = 77) -> StepResult:
    """So many of each draft are right."""
    drafts = batch.drafts or ((),) * len(batch.rows)
    return StepResult(
        tuple((*draft[:right], token) for draft, samples in zip(drafts, batch.samples, strict=True) if samples)
    )


def speculating(prompt=(1, 2, 3, 4, 5, 1, 2), **asked) -> Scheduler:
    """A request whose next step has a draft: its first token was 3."""
    one = scheduler(**({"speculative_tokens": 3} | asked.pop("config", {})))
    one.add(request("a", prompt, **({"max_tokens": 20} | asked)))
    batch = one.schedule()
    one.update(batch, draw(batch, 3))
    return one


@pytest.mark.parametrize("right", [0, 1, 3])
def test_as_many_tokens_of_a_draft_are_taken_as_were_right(right):
    one = speculating()
    batch = one.schedule()
    assert (batch.drafts, batch.counts.tolist(), batch.samples.tolist()) == (((4, 5, 1),), [4], [True])
    (output,) = one.update(batch, accept(batch, right))
    assert output.token_ids == (*(4, 5, 1)[:right], 77)
    assert one.running[0].computed == 7 + 1 + right
    assert one.running[0].remaining == 1
    stats = one.stats()
    assert (stats.spec_draft_tokens, stats.spec_accepted_tokens) == (3, right)
    assert_books_agree(one)


def test_nothing_is_guessed_unless_asked_for():
    one = speculating(config={"speculative_tokens": 0})
    batch = one.schedule()
    assert (batch.drafts, batch.counts.tolist()) == ((), [1])


@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"logprobs": 0},
        {"min_tokens": 2},
        {"grammar": "root ::= x"},
        {"bad_word_ids": ((1,),)},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_nothing_is_guessed_for_an_answer_whose_tokens_depend_on_those_before(asked):
    assert not speculating(**asked).schedule().drafts


def test_a_draft_never_reaches_past_max_tokens():
    one = speculating(max_tokens=3)
    batch = one.schedule()
    assert batch.drafts == ((4,),)
    (output,) = one.update(batch, accept(batch, 1))
    assert output.finish_reason is FinishReason.LENGTH
    assert_empty(one)


def test_a_draft_takes_only_what_the_budget_has_left():
    one = speculating(config={"max_num_batched_tokens": 8})
    one.add(request("b", [50 + at for at in range(6)]))
    assert one.schedule().drafts == ((4,), ())


def test_a_draft_takes_no_block_that_is_not_free_and_preempts_nobody():
    one = scheduler(speculative_tokens=3, num_blocks=4, max_model_len=16)
    one.add(request("a", (1, 2, 3, 4, 5, 1, 2), max_tokens=9))
    one.add(request("b", [9] * 7, max_tokens=9))
    batch = one.schedule()
    one.update(batch, StepResult(((3,), (8,))))
    batch = one.schedule()
    assert (batch.drafts, one.num_preemptions) == ((), 0)


def test_an_end_token_in_a_draft_ends_the_answer_there():
    one = speculating(eos=(5,))
    batch = one.schedule()
    (output,) = one.update(batch, accept(batch, 3))
    assert (output.token_ids, output.finish_reason, output.stop_token) == ((4, 5), FinishReason.STOP, 5)
    assert_empty(one)


def test_a_draft_never_has_an_image_in_it():
    prompt = [1, 2, 50, 50, 50, 50, 4, 1]
    one = scheduler(speculative_tokens=3)
    one.add(request("a", prompt, images=[(2, image(1))], max_tokens=9))
    batch = one.schedule()
    one.update(batch, draw(batch, 2))
    assert one.schedule().drafts == ()


def test_a_suspect_is_given_no_draft():
    one = speculating()
    one.suspect(one.schedule())
    assert one.schedule().drafts == ()


def test_the_requests_of_a_batch_are_each_named_once():
    one = scheduler(max_num_batched_tokens=32)
    one.add(request("a", 4, n=3))
    one.add(request("b", [5] * 4))
    step(one)
    assert one.request_ids(one.schedule()) == ("a", "b")
