"""What followed the last words when they stood there before is guessed to follow again."""

import random
import time
from itertools import takewhile

import pytest

from vlm_serve.engine.ngram import MAX_MATCH, MIN_MATCH, NgramIndex


def propose(tokens, limit, spans=()):
    return NgramIndex(len(tokens) + 64, spans).propose(tokens, limit)


@pytest.mark.parametrize(
    ("tokens", "limit", "draft"),
    [
        pytest.param([1, 2, 3, 4, 5, 9, 1, 2], 3, (3, 4, 5), id="what followed"),
        pytest.param([1, 2, 3, 9, 1, 2], 9, (3, 9, 1, 2), id="as far as there is something"),
        pytest.param([1, 2, 3, 4], 3, (), id="nothing stood before"),
        pytest.param([2, 7, 8, 1, 2], 3, (), id="one word is no match"),
        pytest.param([5, 1, 2, 7, 7, 6, 1, 2, 8, 8, 5, 1, 2], 2, (7, 7), id="the longest match"),
        pytest.param([1, 2, 7, 7, 1, 2, 8, 8, 1, 2], 2, (8, 8), id="the latest of those as long"),
        pytest.param([1, 2, 1, 2, 1, 2], 4, (1, 2), id="a match with little behind it"),
        pytest.param([4, 4, 4, 4, 4, 4], 2, (4, 4), id="one token over and over"),
        pytest.param([1, 2], 3, (), id="too short"),
        pytest.param([1], 3, (), id="one token"),
        pytest.param([1, 2, 3, 1, 2], 0, (), id="none asked for"),
    ],
)
def test_a_draft_is(tokens, limit, draft):
    assert propose(tokens, limit) == draft


def test_a_draft_ends_before_an_image():
    tokens = [1, 2, 3, 50, 50, 4, 1, 2]
    assert propose(tokens, 4) == (3, 50, 50, 4)
    assert propose(tokens, 4, spans=[(3, 5)]) == (3,)
    assert propose([1, 2, 50, 50, 4, 1, 2], 4, spans=[(2, 4)]) == ()


def test_an_image_is_no_match_for_another():
    tokens, spans = [4, 4, 7, 8, 9, 4, 4, 7], [(0, 2), (5, 7)]
    assert propose(tokens, 3) == (8, 9, 4)
    assert propose(tokens, 3, spans) == ()
    assert propose([1, 50, 8, 9, 1, 50], 2, [(1, 2), (5, 6)]) == ()


def test_an_index_that_grows_proposes_what_a_new_one_would():
    rng = random.Random(1)
    tokens = [rng.randrange(3) for _ in range(20)]
    index = NgramIndex(220, [(3, 7)])
    for _ in range(200):
        assert index.propose(tokens, 3) == propose(tokens, 3, [(3, 7)])
        tokens += [rng.randrange(3) for _ in range(rng.randrange(1, 3))][: 220 - len(tokens)]
        if len(tokens) >= 218:
            break


def naive(tokens, limit):
    for size in range(min(MAX_MATCH, len(tokens) - 1), MIN_MATCH - 1, -1):
        begins = [at + size for at in range(len(tokens) - size) if tokens[at : at + size] == tokens[-size:]]
        if begins:
            followed = [at for at in begins if at + limit <= len(tokens)]
            begin = followed[-1] if followed else begins[0]
            return tuple(tokens[begin : begin + limit])
    return ()


def test_the_search_agrees_with_a_naive_one():
    rng = random.Random(2)
    for _ in range(500):
        tokens = [rng.randrange(3) for _ in range(rng.randrange(1, 40))]
        assert propose(tokens, 4) == naive(tokens, 4)


def test_the_search_agrees_with_a_naive_one_to_which_no_two_placeholders_are_alike():
    rng = random.Random(3)
    for _ in range(500):
        tokens = [rng.randrange(2) for _ in range(40)]
        spans = [(begin, begin + rng.randrange(1, 5)) for begin in sorted(rng.sample(range(0, 40, 4), 3))]
        unlike = list(tokens)
        for at in (at for begin, end in spans for at in range(begin, end)):
            unlike[at] = -1 - at
        draft = naive(unlike, 4)
        assert propose(tokens, 4, spans) == tuple(takewhile(lambda token: token >= 0, draft))


def test_a_search_in_a_long_prompt_takes_well_under_a_millisecond():
    rng = random.Random(3)
    tokens = [rng.randrange(1000) for _ in range(20_000)]
    index = NgramIndex(30_000)
    index.propose(tokens, 4)
    seconds = []
    for _ in range(50):
        tokens.append(rng.randrange(1000))
        began = time.perf_counter()
        index.propose(tokens, 4)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 1e-3
