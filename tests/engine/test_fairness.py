"""Who goes first: better classes, then tenants in turn, and nobody for ever."""

import pytest

from tests.engine.books import assert_books_agree, assert_empty
from tests.engine.requests import image, request
from tests.engine.test_scheduler import finish, scheduler, step
from vlm_serve.engine.preemption import MAX_PREEMPTIONS, enough_of, give_way
from vlm_serve.engine.scheduler import PATIENCE, Scheduler
from vlm_serve.engine.sequence import Sequence
from vlm_serve.engine.tenants import GENERATED_WEIGHT, TokenCounters

STAT = -1


def running(one: Scheduler) -> list[str]:
    return [sequence.request.request_id for sequence in one.running]


def test_stat_goes_before_routine_that_came_first():
    one = scheduler(max_num_seqs=1)
    one.add(request("routine", 4))
    one.add(request("stat", 4, priority=STAT))
    assert list(finish(one)) == ["stat", "routine"]


def test_a_stat_request_takes_the_row_of_the_latest_routine_one():
    one = scheduler(max_num_seqs=2)
    for name in ("first", "second"):
        one.add(request(name, 4, max_tokens=9))
    step(one)
    one.add(request("stat", 4, priority=STAT))
    step(one)
    assert running(one) == ["first", "stat"]
    assert {name: len(answer) for name, answer in finish(one).items()} == {"first": 7, "stat": 3, "second": 8}
    assert_empty(one)


def test_a_stat_request_takes_the_blocks_of_routine_ones():
    one = scheduler(num_blocks=10, max_model_len=40)
    for index in range(4):
        one.add(request(index, [index] * 7, max_tokens=9))
    step(one)
    step(one)
    one.add(request("stat", [9] * 20, priority=STAT))
    while "stat" not in running(one):
        step(one)
    assert running(one)[:-1] == ["0", "1"]
    assert set(finish(one)) == {"0", "1", "2", "3", "stat"}
    assert_empty(one)


def test_a_stat_request_takes_the_adapter_slot_of_routine_ones():
    one = scheduler(max_adapters=1)
    one.add(request("routine", 4, adapter="x", max_tokens=9))
    one.add(request("base", 4, max_tokens=9))
    step(one)
    one.add(request("stat", 4, adapter="y", priority=STAT))
    step(one)
    assert running(one) == ["base", "stat"]
    finish(one)
    assert_empty(one)


def test_nobody_gives_way_to_a_stat_request_that_would_find_too_few_blocks_all_the_same():
    one = scheduler(num_blocks=10, max_model_len=40)
    one.add(request("first", [1] * 20, max_tokens=9, priority=STAT))
    one.add(request("routine", [2] * 8, max_tokens=9))
    while len(one.running) < 2:
        step(one)
    one.add(request("second", [3] * 24, priority=STAT))
    step(one)
    assert running(one) == ["first", "routine"]
    assert finish(one).keys() == {"routine", "second", "first"}
    assert_empty(one)


def test_nobody_gives_way_for_a_slot_to_one_that_finds_no_blocks():
    one = scheduler(num_blocks=10, max_model_len=40, max_adapters=1)
    one.add(request("first", [1] * 20, max_tokens=9, priority=STAT))
    one.add(request("routine", [2] * 4, max_tokens=20, adapter="x"))
    while len(one.running) < 2:
        step(one)
    one.add(request("second", [3] * 24, adapter="y", priority=STAT))
    step(one)
    assert running(one) == ["first", "routine"]
    finish(one)
    assert_empty(one)


def test_nobody_gives_way_to_a_stat_image_that_finds_no_room_in_the_cache():
    one = scheduler(max_num_seqs=2, max_model_len=64, encoder_cache_tokens=40)
    one.add(request("routine", 4, max_tokens=40))
    step(one)
    one.add(request("first", [7] * 40, images=[(0, image(1, num_tokens=40))], max_tokens=2, priority=STAT))
    step(one)
    one.add(request("second", [8] * 8, images=[(0, image(2))], max_tokens=2, priority=STAT))
    for _ in range(2):  # the first one's image is not passed yet
        _, outputs = step(one)
        assert "routine" in {output.request_id for output in outputs}
        assert (running(one)[0], one.num_preemptions) == ("routine", 0)
    step(one)
    assert (running(one), one.num_preemptions) == (["second"], 1)
    finish(one)
    assert_empty(one)


def test_nobody_gives_way_to_a_stat_image_that_the_step_has_no_budget_for():
    one = scheduler(max_num_seqs=2, max_encoder_tokens=4)
    for name in ("a", "b"):
        one.add(request(name, 1, max_tokens=9))
    step(one)
    for seed in (1, 2):
        one.add(request(f"stat-{seed}", [seed] * 6, images=[(0, image(seed))], priority=STAT))
    _, outputs = step(one)
    assert {output.request_id for output in outputs} == {"a", "stat-1"}
    step(one)
    assert (running(one), one.num_preemptions) == (["stat-1", "stat-2"], 2)


def test_a_stat_image_takes_the_room_of_a_routine_one_and_of_nobody_else():
    one = scheduler(max_model_len=64, encoder_cache_tokens=40)
    one.add(request("text", [7] * 4, max_tokens=9, priority=1))
    step(one)
    one.add(request("read", 50, images=[(0, image(1, num_tokens=40))]))
    step(one)
    one.add(request("stat", [8] * 8, images=[(0, image(2))], priority=STAT))
    batch, _ = step(one)
    assert running(one) == ["text", "stat"]
    assert (len(batch.encode), one.num_preemptions) == (1, 1)
    finish(one)
    assert_empty(one)


def test_a_stat_request_has_the_token_of_the_routine_one_that_gives_way():
    one = scheduler(max_num_seqs=2, max_num_batched_tokens=2)
    for name in ("a", "b"):
        one.add(request(name, 1, max_tokens=9))
    step(one)
    one.add(request("stat", [7] * 3, priority=STAT))
    batch, _ = step(one)
    assert running(one) == ["a", "stat"]
    assert batch.counts.tolist() == [1, 1]


@pytest.mark.parametrize(("rows", "routine"), [(2, 40), (8, 4)], ids=["rows are taken", "rows are free"])
def test_nobody_gives_way_to_a_stat_request_that_the_step_has_no_token_for(rows, routine):
    one = scheduler(max_num_seqs=rows)
    one.add(request("routine", routine, max_tokens=20))
    step(one)
    one.add(request("first", [7] * 60, priority=STAT))
    step(one)
    one.add(request("second", [8] * 4, priority=STAT))
    step(one)
    assert (running(one), one.num_preemptions) == (["routine", "first"], 0)


def test_for_a_slot_the_fewest_give_way():
    one = scheduler(max_adapters=2)
    for name in ("x0", "x1", "y0"):
        one.add(request(name, 4, adapter=name[0], max_tokens=9))
    step(one)
    one.add(request("stat", 4, adapter="z", priority=STAT))
    step(one)
    assert running(one) == ["x0", "x1", "stat"]


def test_one_that_cannot_grow_even_with_what_others_have_gives_way_alone():
    one = scheduler(num_blocks=14, max_model_len=48)
    one.add(request("routine", [9] * 3, max_tokens=20))
    for name in ("a", "b", "c"):
        one.add(request(name, [int(name, 16)] * 3, max_tokens=20, priority=STAT))
    step(one)
    one.add(request("large", [7] * 40, priority=STAT))
    while "large" not in running(one):
        step(one)
    while "large" in running(one):
        step(one)
    assert one.blocks.num_free < 10
    assert (one.num_preemptions, "routine" in running(one)) == (1, True)
    assert len(finish(one)) == 5
    assert_empty(one)


def test_as_few_give_way_as_suffice_and_none_where_all_do_not():
    everyone = [Sequence.create(request(name, 4), 4) for name in "abcd"]
    for needed in range(5):
        assert enough_of(everyone, lambda some, needed=needed: len(some) >= needed) == everyone[:needed]
    assert enough_of(everyone, lambda some: len(some) >= 5) is None


def test_routine_never_takes_from_stat_nor_from_routine():
    one = scheduler(max_num_seqs=2)
    one.add(request("stat", 4, priority=STAT, max_tokens=9))
    one.add(request("routine", 4, max_tokens=9))
    step(one)
    one.add(request("later", 4))
    step(one)
    assert running(one) == ["stat", "routine"]
    assert one.num_preemptions == 0


def test_a_stat_prompt_is_computed_before_a_routine_one_that_runs():
    one = scheduler()
    one.add(request("routine", 100, max_tokens=1))
    step(one)
    one.add(request("stat", [7] * 16, max_tokens=1, priority=STAT))
    _, (output,) = step(one)
    assert output.request_id == "stat"


def test_routine_decoding_goes_on_in_every_step_of_a_stat_prefill():
    one = scheduler()
    one.add(request("routine", 4, max_tokens=20))
    step(one)
    one.add(request("stat", [7] * 60, priority=STAT))
    for _ in range(4):
        _, outputs = step(one)
        assert "routine" in {output.request_id for output in outputs}


def test_a_full_cache_preempts_the_worst_class_first_and_in_it_the_latest():
    one = scheduler(num_blocks=9, max_model_len=32)
    for name, priority in (("worst", 5), ("first", 0), ("second", 0)):
        one.add(request(name, [priority + len(name)] * 8, max_tokens=20, priority=priority))
    gone = []
    while one.has_work and len(gone) < 2:
        before = running(one)
        step(one)
        gone += [name for name in before if name not in running(one)]
    assert gone == ["worst", "second"]
    assert {len(answer) for answer in finish(one).values()} <= set(range(1, 21))
    assert_empty(one)


def tokens_by_tenant(one: Scheduler, steps: int) -> dict[str, int]:
    served: dict[str, int] = {}
    for _ in range(steps):
        for output in step(one)[1]:
            tenant = output.request_id.split("-")[0]
            served[tenant] = served.get(tenant, 0) + len(output.token_ids)
    return served


def test_a_tenant_that_sends_much_does_not_hold_up_one_that_sends_little():
    one = scheduler(max_num_seqs=2)
    for index in range(50):
        one.add(request(f"heavy-{index}", 4, tenant="heavy"))
    step(one)
    one.add(request("light-0", 4, tenant="light"))
    ended = []
    while "light-0" not in ended:
        ended += [output.request_id for output in step(one)[1] if output.finish_reason]
    assert len(ended) <= 4


@pytest.mark.parametrize("lengths", [(4, 4), (2, 12)], ids=["alike", "of different lengths"])
def test_tenants_with_a_backlog_are_served_alike_by_tokens_not_by_requests(lengths):
    one = scheduler(max_num_seqs=2)
    for index in range(200):
        for tenant, max_tokens in zip("ab", lengths, strict=True):
            one.add(request(f"{tenant}-{index}", [index], tenant=tenant, max_tokens=max_tokens))
    served = tokens_by_tenant(one, 300)
    counters = one.waiting.counters
    assert abs(counters["a"] - counters["b"]) <= 2 * GENERATED_WEIGHT * max(lengths) + 2
    assert 0.7 < served["a"] / served["b"] < 1.4


def test_within_a_tenant_who_came_first_goes_first():
    one = scheduler(max_num_seqs=1)
    for index in range(6):
        one.add(request(index, 4, tenant="ab"[index % 2]))
    order = list(finish(one))
    assert [name for name in order if int(name) % 2] == ["1", "3", "5"]
    assert [name for name in order if not int(name) % 2] == ["0", "2", "4"]


def test_to_have_been_idle_is_no_credit():
    counters = TokenCounters()
    counters.charge("busy", prompt=1000)
    counters.charge("busier", generated=1000)
    counters.lift("idle", ["busy", "busier"])
    assert counters["idle"] == 1000
    counters.charge("idle", prompt=5000)
    counters.lift("idle", ["busy"])
    assert counters["idle"] == 6000
    counters.leave("busier")
    counters.lift("new", [])
    assert counters["new"] == 2000


def test_a_tenant_that_comes_back_from_idle_is_lifted_to_the_least_active():
    one = scheduler(max_num_seqs=1)
    for index in range(20):
        one.add(request(f"busy-{index}", 8, tenant="busy"))
    for _ in range(20):
        step(one)
    one.add(request("back-0", 4, tenant="back"))
    assert one.waiting.counters["back"] == one.waiting.counters["busy"] > 0


def test_a_tenant_that_comes_when_nobody_waits_is_lifted_to_the_last_who_did():
    one = scheduler()
    one.add(request("busy", 8, tenant="busy"))
    step(one)
    one.add(request("new", 4, tenant="new"))
    assert one.waiting.counters["new"] == one.waiting.counters["busy"] > 0


def test_what_is_found_in_the_cache_costs_the_tenant_nothing():
    one = scheduler()
    for name, computed in (("cold", 10), ("warm", 2)):
        before = one.waiting.counters["t"]
        one.add(request(name, 10, tenant="t", max_tokens=1))
        step(one)
        assert one.waiting.counters["t"] - before == computed + GENERATED_WEIGHT


def test_a_preemption_costs_the_tenant_nothing():
    one = scheduler(num_blocks=12, max_model_len=40)
    for index in range(6):
        one.add(request(index, [index] * 8, max_tokens=20, tenant=str(index)))
    finish(one)
    assert one.num_preemptions > 0
    assert {one.waiting.counters[str(index)] for index in range(6)} == {8 + GENERATED_WEIGHT * 20}


def endless(one: Scheduler, name: str, waits_for: str, **of_each) -> int:
    """Keeps four requests like `of_each` waiting until `waits_for` has ended; how many steps that took."""
    for count in range(3_000):
        while sum(sequence.request.request_id.startswith(name) for sequence in one.waiting) < 4:
            one._counter = getattr(one, "_counter", 0) + 1
            one.add(request(f"{name}{one._counter}", [one._counter] * 4, **of_each))
        _, outputs = step(one)
        assert_books_agree(one)
        if any(output.request_id == waits_for and output.finish_reason for output in outputs):
            return count
    raise AssertionError(f"{waits_for} starves")


def test_routine_does_not_starve_behind_stat_without_end():
    one = scheduler(max_num_seqs=2)
    one.add(request("routine", [1] * 4, tenant="quiet"))
    assert PATIENCE < endless(one, "stat", "routine", priority=STAT) < 2 * PATIENCE


def test_a_routine_prompt_that_runs_does_not_starve_behind_stat_prompts_without_end():
    one = scheduler(max_num_seqs=4, max_num_batched_tokens=4)
    one.add(request("routine", 40, tenant="quiet"))
    step(one)
    assert endless(one, "stat", "routine", priority=STAT, max_tokens=1) < 3 * PATIENCE


def test_one_that_gives_way_again_and_again_joins_the_class_it_gives_way_to():
    one = scheduler(max_num_seqs=1)
    one.add(request("routine", 4, max_tokens=30))
    for index in range(MAX_PREEMPTIONS):
        step(one)
        assert running(one) == ["routine"]
        one.add(request(f"stat-{index}", 4, max_tokens=1, priority=STAT))
        _, outputs = step(one)
        assert outputs[0].request_id == f"stat-{index}"
    step(one)
    one.add(request("stat-last", 4, priority=STAT))
    step(one)
    assert running(one) == ["routine"]


def test_to_give_way_to_ones_own_class_changes_none():
    victim, same, better = (Sequence.create(request("r", 4, priority=priority), 4) for priority in (0, 0, STAT))
    for winner in [same] * MAX_PREEMPTIONS + [better] * (MAX_PREEMPTIONS - 1):
        give_way(victim, winner)
        assert victim.priority == 0
    give_way(victim, better)
    assert victim.priority == STAT


def test_a_class_of_which_somebody_comes_in_in_every_step_is_not_passed_over():
    """One-token prompts, each of them a step: the class moves on, though its first waits for a slot."""
    one = scheduler(max_adapters=1)
    one.add(request("stat", 4, adapter="hot", max_tokens=PATIENCE + 9, priority=STAT))
    one.add(request("cold", 4, adapter="cold"))
    for index in range(PATIENCE + 5):
        one.add(request(index, 1, max_tokens=1))
        step(one)
    assert [(sequence.request.request_id, sequence.priority) for sequence in one.waiting] == [("cold", 0)]


def test_an_adapter_that_finds_no_slot_lets_others_pass_for_a_time_and_then_they_wait():
    """Row 10 of engines.md: hot adapters hold every slot."""
    one = scheduler(max_adapters=1, max_num_seqs=3)
    one.add(request("hot0", 4, adapter="hot", max_tokens=6))
    step(one)
    one.add(request("cold", 4, adapter="cold"))
    one.add(request("base", 4))
    step(one)
    assert running(one) == ["hot0", "base"]
    one.add(request("hot-behind", 4, adapter="hot"))
    step(one)
    assert running(one) == ["hot0", "base", "hot-behind"]
    assert endless(one, "hot", "cold", adapter="hot", max_tokens=6) < PATIENCE + 30


def test_base_requests_pass_an_adapter_that_waits_however_long():
    one = scheduler(max_adapters=1, max_num_seqs=3)
    one.add(request("hot", 4, adapter="hot", max_tokens=PATIENCE + 50))
    step(one)
    one.add(request("cold", 4, adapter="cold"))
    for _ in range(PATIENCE + 2):
        step(one)
    one.add(request("base", 4))
    step(one)
    assert running(one) == ["hot", "base"]


def test_an_image_without_room_lets_text_pass_and_no_other_image():
    one = scheduler(max_encoder_tokens=6, encoder_cache_tokens=64, max_num_batched_tokens=64)
    one.add(request("first", 8, images=[(0, image(1))]))
    one.add(request("second", 8, images=[(0, image(2))]))
    one.add(request("third", 8, images=[(0, image(3, num_tokens=2))]))
    one.add(request("text", [9] * 4))
    step(one)
    assert running(one) == ["first", "text"]
    step(one)
    assert running(one)[2] == "second"


def test_no_image_comes_in_past_one_that_waits_for_room_in_the_cache():
    """Row 4 of engines.md."""
    one = scheduler(max_encoder_tokens=16, encoder_cache_tokens=8)
    one.add(request("first", 20, images=[(16, image(1, num_tokens=3))]))
    step(one)
    one.add(request("large", [7] * 14, images=[(6, image(2, num_tokens=8))]))
    one.add(request("small", [8] * 4, images=[(0, image(3, num_tokens=3))]))
    one.add(request("text", [9] * 4))
    assert step(one)[0].counts.tolist() == [4, 6, 4]
    assert running(one) == ["first", "large", "text"]
    step(one)
    assert step(one)[0].counts.tolist() == [1, 1, 1, 4]


def test_a_large_image_does_not_starve_behind_small_ones_without_end():
    """Rows 4 and 6 of engines.md: the encoder cache under load."""
    one = scheduler(encoder_cache_tokens=8, max_encoder_tokens=4)
    for index in range(3):
        one.add(request(f"small{index}", 4, images=[(0, image(index, num_tokens=3))]))
    step(one)
    one.add(request("large", 12, images=[(0, image(100, num_tokens=8))], tenant="quiet"))
    small = [(0, image(7, num_tokens=3))]
    assert endless(one, "small1", "large", images=small) < 60


def test_nobody_comes_in_past_one_that_waits_for_blocks():
    one = scheduler(num_blocks=10, max_model_len=40)
    one.add(request("runs", [1] * 20, max_tokens=9))
    while one.running == [] or one.running[0].remaining > 1:
        step(one)
    one.add(request("large", [2] * 30, max_tokens=2))
    one.add(request("small", [3] * 4, max_tokens=2, priority=1))
    step(one)
    assert running(one) == ["runs"]
    assert list(finish(one)) == ["runs", "large", "small"]
