"""A span that attends both ways is computed in one step, cached as a whole or not at all, and starves nobody.

Row 26 of engines.md: such a span is atomic; chunks move around it, everything else still chunks.
"""

import pytest

from tests.engine.books import Machine, assert_books_agree, assert_empty
from tests.engine.requests import image, request
from tests.engine.test_block_manager import BLOCK, compute, hit, sequence
from tests.engine.test_scheduler import finish, scheduler, step
from vlm_serve.engine.block_manager import BlockManager, most_blocks
from vlm_serve.engine.scheduler import Scheduler
from vlm_serve.errors import ContextLengthError, InvalidRequestError


def span(offset: int, length: int, seed: int = 1):
    return offset, image(seed, length, attends_both_ways=True)


def large(**config) -> Scheduler:
    """A scheduler whose images may be large."""
    return scheduler(**({"max_encoder_tokens": 64, "encoder_cache_tokens": 64, "max_num_seqs": 1} | config))


def counts(one: Scheduler) -> list[list[int]]:
    """Of each step until everybody has an answer."""
    machine, all_counts = Machine(one), []
    while one.has_work:
        batch = one.schedule()
        all_counts.append(batch.counts.tolist())
        one.update(batch, machine.run(batch))
        assert_books_agree(one)
    assert_empty(one)
    return all_counts


@pytest.mark.parametrize("budget", range(1, 33))
def test_a_cut_inside_a_span_moves_to_before_it(budget):
    one = large(max_num_batched_tokens=budget)
    one.add(request("a", 32, images=[span(10, 12)], max_tokens=1))
    (first,), *_ = counts(one)
    assert first == (10 if 10 < budget < 22 else budget)
    one.add(request("b", [9] * 32, images=[(10, image(1, 12))], max_tokens=1))
    assert one.schedule().counts.tolist() == [budget], "a causal image is cut anywhere"


def test_a_span_that_comes_next_passes_the_budget_and_nothing_else_does():
    one = large(max_num_batched_tokens=8)
    one.add(request("a", 40, images=[span(4, 20), span(24, 5, seed=2), span(31, 3, seed=3)], max_tokens=1))
    assert counts(one) == [[4], [20], [7], [8], [1]]


def test_a_prompt_that_is_a_span_is_computed_at_once():
    one = large(max_num_batched_tokens=1)
    one.add(request("a", 20, images=[span(0, 20)], max_tokens=1))
    assert counts(one) == [[20]]


@pytest.mark.parametrize("budget", [1, 5, 64])
def test_a_prefix_that_attends_both_ways_is_computed_at_once_with_all_its_images(budget):
    """Whatever the budgets of tokens and of the encoder; what follows it is chunked again."""
    one = large(max_num_batched_tokens=budget, max_encoder_tokens=3)
    images = [(at, image(at, 4)) for at in (0, 4, 8)]
    one.add(request("a", 26, images=images, both_ways_prefix=18, max_tokens=1))
    (first,), *_ = counts(one)
    assert first == (26 if budget == 64 else 18)
    assert one.images.held == 12


@pytest.mark.parametrize("priority", [0, -1])
def test_images_of_a_prefix_come_together_or_not_at_all(priority):
    """There is room for one of the two while another's is in use: neither is encoded until there is for both, or what
    is in use gives way to a better class.
    """
    one = large(max_num_batched_tokens=8, encoder_cache_tokens=12, max_num_seqs=2)
    one.add(request("causal", [7] * 20, images=[(2, image(9, 8))], max_tokens=1))
    machine, encoded = Machine(one), []

    def next_step():
        batch = one.schedule()
        encoded.append({inputs.digest for _, inputs in batch.encode})
        one.update(batch, machine.run(batch))
        assert_books_agree(one)

    next_step()
    images = [(0, image(1, 4)), (4, image(2, 4))]
    one.add(request("prefix", 12, images=images, both_ways_prefix=12, max_tokens=1, priority=priority))
    while one.has_work:
        next_step()
    causal, pair = {image(9, 8).digest}, {image(1, 4).digest, image(2, 4).digest}
    assert encoded[:3] == ([causal, set(), pair] if priority == 0 else [causal, pair, causal])
    assert_empty(one)


def test_images_of_a_prefix_that_do_not_fit_together_are_refused():
    one = large(encoder_cache_tokens=10)
    images = [(0, image(1, 4)), (4, image(2, 4)), (8, image(3, 4))]
    with pytest.raises(InvalidRequestError, match="take 12 tokens, all at once"):
        one.add(request("a", 16, images=images, both_ways_prefix=16))
    same = [(0, image(1, 4)), (4, image(1, 4)), (8, image(3, 4))]
    one.add(request("b", 16, images=same, both_ways_prefix=16))
    one.add(request("c", 16, images=images))


def test_blocks_of_a_prefix_are_those_of_the_whole_of_it():
    """The first tokens and the image are alike; what comes after them in the prefix is not, or is not of it."""
    manager = BlockManager(32, BLOCK)
    tokens = [*range(3 * BLOCK), 90]
    spans = [(1, image(1, BLOCK))]

    def hits(known, prefix, images=spans):
        return BLOCK * len(manager.find_prefix(sequence(known, images=images, both_ways_prefix=prefix)))

    compute(manager, sequence(tokens, images=spans, both_ways_prefix=2 * BLOCK))
    assert hits(tokens, 2 * BLOCK) == 3 * BLOCK
    assert hits([*tokens[: 2 * BLOCK], *[7] * BLOCK, 90], 2 * BLOCK) == 2 * BLOCK, "it ends with the prefix"
    assert hits([*tokens[: 2 * BLOCK - 1], 91, *tokens[2 * BLOCK :]], 2 * BLOCK) == 0
    assert hits(tokens, 2 * BLOCK, [(1, image(2, BLOCK))]) == 0
    for prefix in (0, 1, BLOCK, 2 * BLOCK + 1, 3 * BLOCK + 1):
        assert hits(tokens, prefix) == 0


def test_a_token_that_one_who_gives_way_leaves_pays_for_a_span_past_the_budget_first():
    """A budget of six, one token of it kept back for the routine answer; its row, but no token, goes to the urgent one
    behind two spans."""
    one = large(max_num_batched_tokens=6, max_num_seqs=3)
    one.add(request("routine", 1, max_tokens=9, priority=1))
    machine = Machine(one)
    one.update(batch := one.schedule(), machine.run(batch))
    for name in ("a", "b", "c"):
        one.add(request(name, 4, images=[span(0, 4)], max_tokens=1))
    batch = one.schedule()
    assert one.num_preemptions == 0
    assert sorted(batch.counts.tolist()) == [1, 4, 4]
    one.update(batch, machine.run(batch))
    while one.has_work:
        one.update(batch := one.schedule(), machine.run(batch))
    assert_empty(one)


def test_a_span_past_the_budget_takes_no_token_from_those_that_decode():
    one = large(max_num_seqs=4, max_num_batched_tokens=4)
    for name in "abc":
        one.add(request(name, 1, max_tokens=9, priority=1))
    step(one)
    one.add(request("long", 20, images=[span(0, 20)], max_tokens=1))
    batch, outputs = step(one)
    assert sorted(batch.counts.tolist()) == [1, 1, 1, 20]
    assert {output.request_id for output in outputs} == {"a", "b", "c", "long"}


def test_after_a_span_past_the_budget_nobody_else_is_prefilled_in_that_step():
    one = large(max_num_seqs=4, max_num_batched_tokens=8)
    one.add(request("long", 20, images=[span(0, 20)], max_tokens=2))
    one.add(request("other", [9] * 12, max_tokens=2))
    assert counts(one) == [[20], [1, 7], [5], [1]]


def test_what_gives_way_after_a_span_past_the_budget_lets_no_second_one_pass_in_that_step():
    one = large(max_num_seqs=3, max_num_batched_tokens=4)
    for name in "ab":
        one.add(request(name, 1, max_tokens=9, priority=1))
    step(one)
    for name, seed in (("first", 1), ("second", 2)):
        one.add(request(name, [seed] * 20, images=[span(0, 20, seed)], max_tokens=1))
    batch, _ = step(one)
    assert sorted(batch.counts.tolist()) == [1, 1, 20], "the row that second could have keeps its token"
    assert one.num_preemptions == 0
    batch, outputs = step(one)
    assert sorted(batch.counts.tolist()) == [1, 1, 20]
    assert {output.request_id for output in outputs} == {"a", "b", "second"}


def test_one_that_gives_way_itself_after_a_span_past_the_budget_lets_no_second_one_pass_in_that_step():
    one = large(num_blocks=4, max_num_seqs=4, max_num_batched_tokens=5)
    one.add(request("a", 1, max_tokens=9, priority=1))
    one.add(request("b", 3, max_tokens=9, priority=1))
    step(one)
    step(one)
    one.add(request("first", 8, images=[span(0, 8)], max_tokens=1))
    one.add(request("second", 4, images=[span(0, 4, seed=2)], max_tokens=1, priority=1, tenant="another"))
    batch, outputs = step(one)
    assert one.num_preemptions == 1
    assert {output.request_id for output in outputs} == {"a", "first"}
    assert sorted(batch.counts.tolist()) == [1, 8]


def test_a_chunk_ends_before_a_span_whose_image_finds_no_room():
    one = large(max_encoder_tokens=8, max_num_batched_tokens=32)
    one.add(request("a", 24, images=[span(0, 6), span(10, 6, seed=2)], max_tokens=1))
    assert counts(one) == [[10], [14]]


@pytest.mark.parametrize("windows", [(None,), (None, 6)])
@pytest.mark.parametrize("offset", range(12))
@pytest.mark.parametrize("length", [2, 5, 9])
def test_a_prefix_hit_ends_before_a_span_or_behind_it(windows, offset, length):
    blocks = BlockManager(64, BLOCK, windows=windows)
    images = [span(offset, length), span(offset + length, 3, seed=2)]
    blocks.release(compute(blocks, sequence(24, images=images)))
    for known in range(offset + length + 3, 25):
        found = len(blocks.find_prefix(sequence(known, images=images))) * BLOCK
        allowed = [
            end for end in range(0, known, BLOCK) if not any(at < end < at + inputs.num_tokens for at, inputs in images)
        ]
        assert found in allowed
        if windows == (None,):
            assert found == allowed[-1]


@pytest.mark.parametrize("n", [1, 2])
def test_a_fork_of_a_prompt_that_ends_in_a_span_begins_before_it(n):
    images = [span(6, 9)]
    blocks = BlockManager(64, BLOCK, enable_prefix_caching=False)
    parent = compute(blocks, sequence(16, images=images, n=n))
    assert blocks.find_fork(parent, sequence(16, images=images, n=n)) == parent.block_table[:1]
    windowed = BlockManager(64, BLOCK, windows=(None, 4), enable_prefix_caching=False)
    parent = compute(windowed, sequence(16, images=images, n=n))
    assert windowed.find_fork(parent, sequence(16, images=images, n=n)) == [], "the window has passed what it would see"


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        pytest.param(span(6, 20), span(6, 20, seed=2), id="other pixels"),
        pytest.param(span(6, 20), span(6, 21), id="one token more at its end"),
        pytest.param(span(6, 20), (6, image(1, 20)), id="causal"),
    ],
)
def test_every_block_of_a_span_hashes_the_whole_span(mine, theirs):
    """The digest of an image is over all its pixels, its size and how it attends, and it is in the hash of each block
    that the image overlaps: the first has two of the span's tokens, and is another if the span ends otherwise.
    """
    ours, others = sequence(32, images=[mine]), sequence(32, images=[theirs])
    assert hit(BlockManager(16, BLOCK), ours, others) == 1
    for index in range(1, 7):
        assert ours.block_hashes[index] not in others.block_hashes
    blocks = BlockManager(16, BLOCK)
    hashed = [[blocks._hash(one, index) for index in range(8)] for one in (ours, others)]
    assert [one == other for one, other in zip(*hashed, strict=True)] == [True] + [False] * 7


@pytest.mark.parametrize("length", [3, 8, 12, 21, 30])
@pytest.mark.parametrize("windows", [(5,), (None, 5), (3, 9)])
def test_a_request_that_is_admitted_is_served_with_no_block_to_spare(windows, length):
    """A span longer than the budget holds more of a window's blocks than the context was planned for."""
    enough = most_blocks(36, 4, windows, max(4, length))
    for num_blocks in (enough, enough - 1):
        one = large(num_blocks=num_blocks, windows=windows, max_num_batched_tokens=4)
        asked = request("a", 33, images=[span(2, length)], max_tokens=3, n=2)
        if num_blocks < enough:
            with pytest.raises(ContextLengthError, match="smaller image"):
                one.add(asked)
            return
        one.add(asked)
        counts(one)
        assert one.num_preemptions == 0


def test_a_sequence_is_let_in_only_if_a_windows_blocks_for_its_whole_span_are_there():
    blocks = BlockManager(most_blocks(60, BLOCK, (5,), 20), BLOCK, windows=(5,), max_chunk=4)
    assert blocks.can_admit(sequence(60, images=[span(10, 20)]), [])
    compute(blocks, sequence(12), chunk=4)
    assert blocks.can_admit(sequence(60, images=[(10, image(1, 20))]), [])
    assert not blocks.can_admit(sequence(60, images=[span(10, 20)]), [])


def test_one_that_is_preempted_before_its_span_computes_it_whole_when_it_comes_back():
    one = large(num_blocks=10, max_model_len=40, max_num_seqs=3, max_num_batched_tokens=8)
    for index in range(3):
        one.add(request(index, [index] * 14, images=[span(3, 10, seed=index)], max_tokens=12))
    assert max(len(row) for row in counts(one)) > 1
    assert one.num_preemptions > 0


def test_suspects_with_a_span_are_run_alone_and_whole():
    one = large(max_num_seqs=4, max_num_batched_tokens=8)
    for index in range(3):
        one.add(request(index, [index] * 14, images=[span(3, 10, seed=index)], max_tokens=2))
    batch = one.schedule()
    one.suspect(batch)
    assert len(finish(one)) == 3
    assert_empty(one)
