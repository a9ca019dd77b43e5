"""A cached block is found by whoever may share it, and by nobody else; none is lost, and few places are wasted."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, combinations, product

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.engine.requests import image, request
from vlm_serve.config import EngineConfig
from vlm_serve.engine.batch import NULL_BLOCK
from vlm_serve.engine.block_manager import BlockManager, first_seen, most_blocks
from vlm_serve.engine.sequence import Sequence

BLOCK = 4


def sequence(*args, n: int = 1, **kwargs) -> Sequence:
    asked = request("r", *args, **kwargs)
    return Sequence.create(replace(asked, sampling=replace(asked.sampling, n=n)), max_tokens=4)


def step(blocks: BlockManager, one: Sequence, count: int) -> None:
    """Computes the sequence's next `count` tokens, as the scheduler has it done."""
    before = one.computed
    blocks.grow(one, before + count)
    one.computed += count
    blocks.publish(one, before)


def compute(blocks: BlockManager, one: Sequence, chunk: int | None = None) -> Sequence:
    """Runs a sequence's whole prompt through the books."""
    blocks.admit(one, blocks.find_prefix(one))
    while one.remaining:
        step(blocks, one, min(chunk or one.remaining, one.remaining))
    return one


def decode(blocks: BlockManager, one: Sequence, count: int) -> None:
    for index in range(count):
        one.token_ids.append(index)
        step(blocks, one, 1)


def held(one: Sequence, group: int) -> list[int]:
    """The places in its table of which the sequence has a block of this group."""
    return [index for index, entry in enumerate(one.block_table) if entry[group] != NULL_BLOCK]


def powerset(items: range) -> Iterator[tuple[int, ...]]:
    return chain.from_iterable(combinations(items, size) for size in range(len(items) + 1))


@pytest.fixture
def blocks() -> BlockManager:
    return BlockManager(16, BLOCK)


def hit(blocks: BlockManager, first: Sequence, second: Sequence) -> int:
    """How many blocks the second finds of the first, which has ended."""
    blocks.release(compute(blocks, first))
    return len(blocks.find_prefix(second))


def test_the_same_prompt_is_found_but_for_its_last_token(blocks):
    assert hit(blocks, sequence(12), sequence(12)) == 2
    assert len(blocks.find_prefix(sequence(13))) == 3


def test_a_prompt_that_parts_ways_is_found_up_to_the_block_before(blocks):
    assert hit(blocks, sequence(12), sequence([0, 1, 2, 3, 4, 99, 6, 7, 8, 9])) == 1


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        pytest.param({"images": [(2, image(1))]}, {"images": [(2, image(2))]}, id="another image"),
        pytest.param({"images": [(2, image(1))]}, {}, id="no image"),
        pytest.param({"images": [(2, image(1))]}, {"images": [(1, image(1))]}, id="the image elsewhere"),
        pytest.param({"adapter": "a" * 64}, {}, id="the base model"),
        pytest.param({"adapter": "a" * 64}, {"adapter": "b" * 64}, id="another adapter"),
        pytest.param({"salt": "one"}, {"salt": "two"}, id="another tenant"),
    ],
)
def test_blocks_that_depend_on_more_than_tokens_are_not_shared(blocks, mine, theirs):
    assert hit(blocks, sequence(12, **mine), sequence(12, **theirs)) == 0
    assert len(blocks.find_prefix(sequence(12, **mine))) == 2


def test_an_image_changes_the_blocks_from_its_own_on_and_none_before(blocks):
    first = sequence(16, images=[(6, image(1))])
    assert hit(blocks, first, sequence(16, images=[(6, image(2))])) == 1


def test_a_block_is_found_only_once_it_is_computed(blocks):
    one = sequence(12)
    blocks.admit(one, [])
    blocks.grow(one, 12)
    assert blocks.find_prefix(sequence(12)) == []
    one.computed = 6
    blocks.publish(one, 0)
    assert len(blocks.find_prefix(sequence(12))) == 1


def test_sequences_share_a_prefix_and_the_last_one_frees_it(blocks):
    first = compute(blocks, sequence(12))
    second = compute(blocks, sequence(12))
    assert second.block_table[:2] == first.block_table[:2]
    assert blocks.num_free == 16 - 4
    blocks.release(first)
    assert blocks.num_free == 16 - 3
    blocks.release(second)
    assert blocks.num_free == 16


def test_free_blocks_without_content_are_handed_out_before_cached_ones(blocks):
    blocks.release(compute(blocks, sequence(12)))
    other = sequence([7] * 52)
    blocks.admit(other, [])
    blocks.grow(other, 52)  # 13 blocks, all that hold nothing
    assert len(blocks.find_prefix(sequence(13))) == 3


def test_a_freed_block_without_content_is_handed_out_before_cached_ones_freed_earlier():
    blocks = BlockManager(3, BLOCK)
    blocks.release(compute(blocks, sequence(8)))
    blocks.release(compute(blocks, sequence([7] * 3)))
    compute(blocks, sequence([8] * 3))
    assert len(blocks.find_prefix(sequence(9))) == 2


def test_a_block_handed_out_again_is_no_longer_found(blocks):
    blocks.release(compute(blocks, sequence(12)))
    other = sequence([7] * 64)
    blocks.admit(other, [])
    blocks.grow(other, 64)
    assert blocks.find_prefix(sequence(13)) == []


def test_a_cached_prefix_that_nobody_holds_counts_against_the_room(blocks):
    blocks.release(compute(blocks, sequence(64)))
    prefix = blocks.find_prefix(sequence(64))
    assert len(prefix) == 15
    assert blocks.can_admit(sequence(64), prefix)
    assert not blocks.can_admit(sequence(65), prefix)


@pytest.mark.parametrize("windows", [(None,), (None, 6)])
def test_the_room_without_others_is_what_there_is_once_they_have_left(windows):
    told = set()
    for gone, length in product(powerset(range(3)), range(1, 60, 3)):
        blocks = BlockManager(10 * len(windows), BLOCK, windows=windows)
        shared = [compute(blocks, sequence(13)) for _ in range(2)]
        running = [*shared, compute(blocks, sequence([7] * 9)), compute(blocks, sequence([8] * 3))]
        probe, grows, leave = sequence(length), running[-1], [running[index] for index in gone]
        prefix = blocks.find_prefix(probe)
        answers = blocks.can_admit(probe, prefix, without=leave), blocks.can_grow(grows, length, without=leave)
        for one in leave:
            blocks.release(one)
        assert answers == (blocks.can_admit(probe, prefix), blocks.can_grow(grows, length))
        told.add(answers)
    assert len(told) == 4


def test_forks_share_the_full_blocks_of_the_prompt_without_prefix_caching():
    blocks = BlockManager(16, BLOCK, enable_prefix_caching=False)
    parent, child = compute(blocks, sequence(14, n=2)), sequence(14, n=2)
    assert blocks.find_prefix(child) == []
    assert blocks.can_admit(child, blocks.find_fork(parent, child))
    blocks.admit(child, blocks.find_fork(parent, child))
    assert (child.computed, child.cached_tokens) == (12, 12)
    assert child.block_table == parent.block_table[:3]
    step(blocks, child, 2)
    assert child.block_table[3] != parent.block_table[3]
    assert blocks.num_free == 16 - 5
    blocks.release(parent)
    assert blocks.num_free == 16 - 4
    blocks.release(child)
    assert (blocks.num_free, blocks.tokens_live) == (16, 0)


def test_a_fork_leaves_the_last_token_of_the_prompt_to_compute_and_takes_no_answer():
    blocks = BlockManager(16, BLOCK)
    parent = compute(blocks, sequence(12, n=2))
    decode(blocks, parent, 6)
    child = sequence(12, n=2)
    assert blocks.find_fork(parent, child) == parent.block_table[:2]


def test_a_fork_takes_only_what_its_parent_has_computed():
    blocks = BlockManager(16, BLOCK)
    parent = sequence(14, n=2)
    blocks.admit(parent, [])
    step(blocks, parent, 6)
    assert len(blocks.find_fork(parent, sequence(14, n=2))) == 1


@pytest.mark.parametrize("chunk", [None, 1, 3, 5])
@pytest.mark.parametrize("prompt", [16, 17, 19, 23])
def test_a_fork_under_a_window_finds_what_its_first_token_sees(prompt, chunk):
    blocks = BlockManager(64, BLOCK, windows=(None, 6), enable_prefix_caching=False)
    parent, child = compute(blocks, sequence(prompt, n=2), chunk), sequence(prompt, n=2)
    blocks.admit(child, blocks.find_fork(parent, child))
    assert child.computed == (prompt - 1) // BLOCK * BLOCK
    assert held(child, 1) == list(range(first_seen(child.computed, 6) // BLOCK, child.computed // BLOCK))
    decode(blocks, parent, 5)  # the window leaves the prompt: a fork that comes now starts anew
    assert blocks.find_fork(parent, sequence(prompt, n=2)) == []


def test_a_window_gives_back_what_no_query_can_see_any_more():
    blocks = BlockManager(64, BLOCK, windows=(None, 8))
    one = compute(blocks, sequence(16))
    for computed in range(16, 60):
        assert held(one, 0) == list(range(blocks.blocks_for(computed)))
        assert held(one, 1) == list(range(first_seen(computed, 8) // BLOCK, blocks.blocks_for(computed)))
        assert blocks.num_free == 64 - len(held(one, 0)) - len(held(one, 1))
        decode(blocks, one, 1)


def test_under_a_window_a_long_answer_holds_the_window_and_a_block():
    blocks = BlockManager(64, 16, windows=(64,))
    one = compute(blocks, sequence(20))
    decode(blocks, one, 500)
    assert 64 - blocks.num_free <= 64 // 16 + 1


@pytest.mark.parametrize("window", [1, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("chunk", [1, 3, 4, 11])
def test_a_sequence_never_holds_more_than_is_planned_for_it(window, chunk):
    windows = (None, window, window)
    blocks = BlockManager(200, BLOCK, windows=windows, max_chunk=chunk, enable_prefix_caching=False)
    one = sequence(40, n=2)
    blocks.admit(one, [])
    while one.computed < 60:
        count = min(chunk, max(1, 40 - one.computed))
        one.token_ids.extend([0] * (one.computed + count - len(one.token_ids)))
        planned = most_blocks(one.computed + count, BLOCK, windows, chunk)
        blocks.grow(one, one.computed + count)
        assert 200 - blocks.num_free <= planned
        before, one.computed = one.computed, one.computed + count
        blocks.publish(one, before)


def test_a_sequence_that_is_planned_for_is_admitted_to_an_empty_pool_whatever_is_cached():
    windows, chunk = (None, 5, 5), 8
    for length in range(1, 60):
        blocks = BlockManager(most_blocks(length, BLOCK, windows, chunk), BLOCK, windows=windows, max_chunk=chunk)
        for known in range(length + 1):
            warm = compute(blocks, sequence(known), chunk) if known else None
            if warm:
                blocks.release(warm)
            prefix = blocks.find_prefix(one := sequence(length))
            assert blocks.can_admit(one, prefix)
            blocks.release(compute(blocks, one, chunk))


def test_a_windowed_hit_needs_the_blocks_that_the_window_sees_and_no_others():
    blocks = BlockManager(64, BLOCK, windows=(None, 6))
    blocks.release(compute(blocks, sequence(24), chunk=4))
    prefix = blocks.find_prefix(sequence(25))
    assert len(prefix) == 6
    assert [entry[1] != NULL_BLOCK for entry in prefix] == [False] * 4 + [True] * 2
    assert all(entry[0] != NULL_BLOCK for entry in prefix)


def test_a_hit_ends_where_the_window_lacks_a_block():
    blocks = BlockManager(64, BLOCK, windows=(None, 6))
    one = compute(blocks, sequence(24))
    lost = one.block_table[4][1]
    blocks.release(one)
    del blocks._block_of[blocks._hash_of.pop(lost)]
    # After six blocks the window sees the fifth, which is gone; so it does after five. After four it does not.
    assert len(blocks.find_prefix(sequence(25))) == 4


def test_layers_that_all_slide_need_no_block_of_the_beginning():
    blocks = BlockManager(8, BLOCK, windows=(6,), max_chunk=4)
    one = compute(blocks, sequence(60), chunk=4)
    blocks.release(one)
    hit = sequence(61)
    prefix = blocks.find_prefix(hit)
    assert len(prefix) == 15
    blocks.admit(hit, prefix)
    assert len(held(hit, 0)) == 2


def test_groups_never_share_a_block():
    blocks = BlockManager(64, BLOCK, windows=(None, 8, 8))
    one = compute(blocks, sequence(30), chunk=7)
    blocks.release(one)
    for entry in blocks.find_prefix(sequence(30)):
        own = [block for block in entry if block != NULL_BLOCK]
        assert len(own) == len(set(own))


def test_waste_at_a_thousand_tokens_is_two_percent_at_most():
    rng = random.Random(0)
    size = EngineConfig().block_size
    for length in (*range(985, 1016), 1000):
        blocks = BlockManager(2000, size)
        compute(blocks, sequence(rng.choices(range(1000), k=length)), chunk=512)
        assert blocks.tokens_live == length
        assert 1 - blocks.tokens_live / blocks.tokens_allocated <= 0.02
    blocks = BlockManager(4000, size, enable_prefix_caching=False)
    for _ in range(32):
        decode(blocks, compute(blocks, sequence(rng.choices(range(1000), k=900)), chunk=512), rng.randrange(60, 140))
    assert 1 - blocks.tokens_live / blocks.tokens_allocated <= 0.02


def test_a_shared_block_is_live_once_and_a_token_behind_the_window_is_not():
    blocks = BlockManager(64, BLOCK)
    compute(blocks, sequence(12))
    compute(blocks, sequence(12))
    assert (blocks.tokens_live, blocks.tokens_allocated) == (16, 16)
    blocks = BlockManager(64, BLOCK, windows=(6,))
    compute(blocks, sequence(15))  # the next query sees positions 10 to 15
    assert (blocks.tokens_live, blocks.tokens_allocated) == (5, 8)


def test_a_cached_block_that_a_hit_takes_is_live_again(blocks):
    blocks.release(compute(blocks, sequence(12)))
    assert (blocks.tokens_live, blocks.tokens_allocated) == (0, 0)
    blocks.admit(again := sequence(12), blocks.find_prefix(again))
    assert (blocks.tokens_live, blocks.tokens_allocated) == (8, 8)


class Books(RuleBasedStateMachine):
    """Sequences come, are computed in chunks, forked, preempted and ended; what each must hold is known exactly."""

    @initialize(windows=st.sampled_from([(None,), (5,), (None, 5), (None, 5, 5), (3, 9)]), is_caching=st.booleans())
    def start(self, windows, is_caching):
        self.blocks = BlockManager(60, BLOCK, windows=windows, max_chunk=8, enable_prefix_caching=is_caching)
        self.running: list[Sequence] = []
        self.content: dict[int, tuple[int, tuple[int, ...]]] = {}
        """What was last written to a block: its group, and all the tokens up to its end, if it is full."""

    def begin(self, one: Sequence, prefix) -> None:
        if not self.blocks.can_admit(one, prefix):
            return
        for index, entry in enumerate(prefix):  # what a hit finds is what the sequence would have computed
            for group, block in enumerate(entry):
                if block != NULL_BLOCK:
                    assert self.content[block] == (group, tuple(one.token_ids[: (index + 1) * BLOCK]))
        self.blocks.admit(one, prefix)
        assert one.computed < len(one.token_ids)
        self.running.append(one)

    @rule(length=st.integers(1, 40), bits=st.integers(0, 2**10 - 1), n=st.sampled_from([1, 2]))
    def admit(self, length, bits, n):
        one = sequence([bits >> (index // BLOCK) & 1 for index in range(length)], n=n)
        self.begin(one, self.blocks.find_prefix(one))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fork(self, data):
        parent = data.draw(st.sampled_from(self.running))
        child = sequence(parent.token_ids[: parent.prompt_len], n=2)
        self.begin(child, self.blocks.find_fork(parent, child))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), chunk=st.integers(1, 8), rejected=st.integers(0, 2))
    def compute(self, data, chunk, rejected):
        one = data.draw(st.sampled_from(self.running))
        if one.remaining == 0:
            one.token_ids.append(data.draw(st.integers(0, 1)))
        count = min(chunk, one.remaining)
        drafts = rejected if count == one.remaining else 0  # places that are written and whose tokens are not kept
        if not self.blocks.can_grow(one, one.computed + count + drafts):
            return self.end(one)
        self.blocks.grow(one, one.computed + count + drafts)
        for index in range(one.computed // BLOCK, len(one.block_table)):
            for group, block in enumerate(one.block_table[index]):
                tokens = (
                    tuple(one.token_ids[: (index + 1) * BLOCK]) if (index + 1) * BLOCK <= one.computed + count else ()
                )
                assert block != NULL_BLOCK
                assert self.blocks._references[block] == 1, "a block that is written is nobody else's"
                self.content[block] = group, tokens
        self.seen_by(one)
        before, one.computed = one.computed, one.computed + count
        self.blocks.publish(one, before)
        return None

    def seen_by(self, one: Sequence) -> None:
        """Every block that the step's queries see is there."""
        for group, window in enumerate(self.blocks.windows):
            first = first_seen(one.computed, window) // BLOCK
            assert all(entry[group] != NULL_BLOCK for entry in one.block_table[first:])

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def stop(self, data):
        self.end(data.draw(st.sampled_from(self.running)))

    def end(self, one: Sequence) -> None:
        self.blocks.release(one)
        self.running.remove(one)

    @invariant()
    def no_block_is_lost_or_held_by_nobody(self):
        if not hasattr(self, "running"):
            return
        blocks = self.blocks
        references = Counter(
            block for one in self.running for entry in one.block_table for block in entry if block != NULL_BLOCK
        )
        assert [references[block] for block in range(blocks.num_blocks)] == blocks._references
        assert set(blocks._free) == {block for block in range(blocks.num_blocks) if not references[block]}
        assert {known: block for block, known in blocks._hash_of.items()} == blocks._block_of
        assert blocks.tokens_live == sum(blocks._live) <= blocks.tokens_allocated
        assert all(count == 0 for block, count in enumerate(blocks._live) if not references[block])
        assert all(0 <= count <= BLOCK for count in blocks._live)


Books.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBooks = Books.TestCase
