"""The sampler draws what the parameters ask for, row by row, whatever the other rows are."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vlm_serve.engine.sampler import SamplingRows, _invert, sample

VOCAB = 50


def rows(n: int, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, draws=None, indices=None) -> SamplingRows:
    return SamplingRows(
        temperature=np.full(n, temperature),
        top_k=np.full(n, top_k, dtype=np.int64),
        top_p=np.full(n, top_p),
        min_p=np.full(n, min_p),
        draws=np.arange(n, dtype=np.uint64) if draws is None else np.asarray(draws, dtype=np.uint64),
        indices=np.zeros(n, dtype=np.int64) if indices is None else np.asarray(indices, dtype=np.int64),
    )


def some_logits(n: int = 1) -> torch.Tensor:
    return (torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3)) * 2).repeat(n, 1)


def expected_probabilities(temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> torch.Tensor:
    """As transformers' own warpers make them."""
    scores = TemperatureLogitsWarper(temperature)(None, some_logits())
    if top_k > 0:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p > 0:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.5, 0, 1.0, 0.0),
        (1.0, 5, 1.0, 0.0),
        (1.0, 0, 0.7, 0.0),
        (1.3, 12, 0.8, 0.0),
        (1.0, 1, 1.0, 0.0),
        (1.0, 0, 0.01, 0.0),
        (1.0, 0, 1.0, 0.1),
        (2.0, 0, 1.0, 0.4),
        (1.5, 30, 0.9, 0.15),
        (1.0, 0, 1.0, 1.0),
    ],
)
def test_the_frequencies_are_those_of_transformers_warpers(temperature, top_k, top_p, min_p):
    n = 20_000
    drawn = sample(some_logits(n), rows(n, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
    expected = expected_probabilities(temperature, top_k, top_p, min_p)
    frequency = torch.bincount(drawn, minlength=VOCAB) / n
    assert set(drawn.unique().tolist()) <= set(expected.nonzero()[:, 0].tolist())
    four_sigma = 4 * (expected * (1 - expected) / n).sqrt() + 1e-9
    assert ((frequency - expected).abs() <= four_sigma + 2 / n).all()


def test_greedy_takes_the_first_of_equal_maxima():
    logits = torch.zeros(2, VOCAB)
    logits[0, [7, 9]] = 1.0
    assert sample(logits, rows(2, temperature=0.0)).tolist() == [7, 0]


@pytest.mark.parametrize("temperature", [1e-5, 1e-6, 1e-40, 1e-310])
def test_a_temperature_next_to_zero_is_greedy(temperature):
    logits = some_logits(3)
    assert sample(logits, rows(3, temperature=temperature)).tolist() == logits.argmax(-1).tolist()
    assert sample(logits, rows(3, temperature=temperature, top_k=5, top_p=0.9)).tolist() == logits.argmax(-1).tolist()


ROW = st.tuples(
    st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    st.sampled_from([-1, 0, 1, 3, 10, 1000]),
    st.sampled_from([1.0, 0.9, 0.4, 0.01]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.integers(0, 2**64 - 1),
    st.integers(0, 5000),
)


@given(st.lists(ROW, min_size=1, max_size=12), st.integers(0, 1000))
@settings(deadline=None, max_examples=80)
def test_a_row_draws_the_same_alone_and_among_others(drawn, seed):
    logits = torch.randn(len(drawn), VOCAB, generator=torch.Generator().manual_seed(seed))
    kinds = (np.float64, np.int64, np.float64, np.float64, np.uint64, np.int64)
    columns = [np.array(column, kind) for column, kind in zip(zip(*drawn, strict=True), kinds, strict=True)]
    together = sample(logits, SamplingRows(*columns)).tolist()
    for row in range(len(drawn)):
        alone = SamplingRows(*(column[row : row + 1] for column in columns))
        assert sample(logits[row : row + 1], alone).tolist() == [together[row]]


def test_a_forbidden_token_is_never_drawn():
    n = 4_000
    logits = some_logits(n)
    logits[:, : VOCAB - 3] = float("-inf")
    for filters in ({}, {"top_k": 40}, {"top_p": 0.999}, {"min_p": 0.001}):
        assert sample(logits, rows(n, **filters)).min() >= VOCAB - 3
    # A uniform number next to 1 finds none of those behind the last that is allowed.
    logits = torch.full((1, VOCAB), float("-inf"))
    logits[0, :7] = torch.tensor([0.1, 0.7, 0.3, 0.9, 0.2, 0.5, 0.4])
    weights = torch.softmax(logits, -1)
    assert _invert(weights, torch.tensor([[1 - 2.0**-53]], dtype=torch.float64)).item() <= 6
    assert _invert(weights * 1.7, torch.tensor([[1.0]], dtype=torch.float64)).item() <= 6


def test_a_seed_gives_another_draw_for_each_token_of_an_answer():
    n = 4_000
    drawn = sample(some_logits(n), rows(n, draws=np.full(n, 42), indices=np.arange(n)))
    frequency = torch.bincount(drawn, minlength=VOCAB) / n
    assert (frequency - expected_probabilities(1.0, 0, 1.0)).abs().max() < 0.03
