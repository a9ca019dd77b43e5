"""A cached block is found by whoever may share it, and by nobody else."""

import pytest

from tests.engine.requests import image, request
from vlm_serve.engine.block_manager import BlockManager
from vlm_serve.engine.sequence import Sequence

BLOCK = 4


def sequence(*args, **kwargs) -> Sequence:
    return Sequence.create(request("r", *args, **kwargs), max_tokens=4)


def compute(blocks: BlockManager, one: Sequence) -> Sequence:
    """Runs a sequence's whole prompt through the books."""
    blocks.admit(one, blocks.find_prefix(one))
    blocks.grow(one, len(one.token_ids))
    before, one.computed = one.computed, len(one.token_ids)
    blocks.publish(one, before)
    return one


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
    assert blocks.can_admit(prefix, 64)
    assert not blocks.can_admit(prefix, 65)
