"""What a request changes in its logits is what transformers' processors, or a plain loop, would have changed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from vlm_serve.engine.batch import NewRow
from vlm_serve.engine.logits import LogitEdits, edit_logits, mask_logits
from vlm_serve.types import SamplingParams

VOCAB = 40
EOS = (2, 3)


def new_row(prompt=(1, 5, 6), answer=(), *, bad_words=(), grammar=None, **sampling) -> NewRow:
    return NewRow(
        row=0,
        token_ids=(*prompt, *answer),
        prompt_len=len(prompt),
        images=(),
        sampling=SamplingParams(max_tokens=None, **sampling),
        draw=0,
        adapter_slot=None,
        eos_token_ids=EOS,
        bad_word_ids=bad_words,
        grammar=grammar,
    )


def some_logits(n: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def edited(new: NewRow, logits: torch.Tensor | None = None) -> torch.Tensor:
    logits = some_logits() if logits is None else logits.clone()
    edits = LogitEdits.create(new, VOCAB)
    assert edits is not None
    edit_logits(logits, [(0, edits)])
    return logits


def test_a_request_that_asks_for_nothing_has_no_edits():
    assert LogitEdits.create(new_row(temperature=0.7, top_p=0.9, top_k=4, min_p=0.1, seed=3), VOCAB) is None


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_the_repetition_penalty_is_transformers(penalty):
    prompt, answer = (1, 5, 6, 5), (9, 30, 9)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + answer]), some_logits())
    assert torch.equal(edited(new_row(prompt, answer, repetition_penalty=penalty)), expected)


def test_presence_and_frequency_see_the_answer_alone():
    logits = edited(new_row((1, 5, 6), (9, 30, 9, 5), presence_penalty=0.5, frequency_penalty=-0.25))
    expected = some_logits()
    for token, count in {9: 2, 30: 1, 5: 1}.items():
        expected[0, token] += 0.25 * count - 0.5
    torch.testing.assert_close(logits, expected)


def test_a_bias_is_transformers_sequence_bias():
    bias = {4: 2.5, 17: -100.0, 39: 100.0}
    processor = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    assert torch.equal(edited(new_row(logit_bias=bias)), processor(torch.tensor([[1, 5, 6]]), some_logits()))


@pytest.mark.parametrize("answer", [(), (7,), (8, 7), (7, 8), (7, 8, 9), (8,)])
def test_bad_words_are_transformers_over_the_answer(answer):
    words = ((4,), (7, 8), (7, 8, 9), (9, 9))
    # The prompt ends with what a word begins with: no matter, it is not generated.
    logits = edited(new_row((1, 7), answer, bad_words=words))
    processor = NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=None)
    ids = torch.tensor([answer], dtype=torch.long).reshape(1, -1)
    assert torch.equal(logits, processor(ids, some_logits()))


@pytest.mark.parametrize("generated", range(5))
def test_no_end_comes_before_min_tokens(generated):
    logits = edited(new_row(answer=(9,) * generated, min_tokens=3))
    processor = MinNewTokensLengthLogitsProcessor(3, 3, list(EOS), device="cpu")
    assert torch.equal(logits, processor(torch.zeros(1, 3 + generated, dtype=torch.long), some_logits()))


def test_stop_token_ids_do_not_come_before_min_tokens_either():
    logits = edited(new_row(min_tokens=1, stop_token_ids=[11]))
    assert logits[0].isneginf().nonzero()[:, 0].tolist() == [2, 3, 11]
    assert not edited(new_row(answer=(9,), min_tokens=1, stop_token_ids=[11])).isneginf().any()


def test_a_grammar_sees_to_the_ends_itself():
    assert LogitEdits.create(new_row(min_tokens=3, grammar="start: /x/"), VOCAB) is None


def test_only_allowed_tokens_are_left():
    logits = edited(new_row(allowed_token_ids=[30, 4, 30]))
    expected = torch.full((1, VOCAB), -math.inf)
    expected[0, [4, 30]] = some_logits()[0, [4, 30]]
    assert torch.equal(logits, expected)


def test_what_is_forbidden_stays_forbidden_among_the_allowed_and_with_a_bias():
    logits = edited(
        new_row(allowed_token_ids=[2, 4, 30], min_tokens=1, bad_words=((4,),), logit_bias={2: 100.0, 4: 100.0})
    )
    assert (~logits[0].isneginf()).nonzero()[:, 0].tolist() == [30]


def test_tokens_past_the_vocabulary_are_left_out():
    """An image's placeholders may be past it, and every one of them is in the prompt."""
    new = new_row(
        (1, VOCAB + 7, VOCAB + 7),
        (9, 4),
        repetition_penalty=1.5,
        logit_bias={VOCAB: 5.0},
        allowed_token_ids=[VOCAB + 1, 4, 1],
        min_tokens=9,
        stop_token_ids=[VOCAB + 2],
        bad_words=((4, VOCAB),),
    )
    logits = edited(new)
    assert (~logits[0].isneginf()).nonzero()[:, 0].tolist() == [1, 4]


def test_a_mask_leaves_the_allowed():
    logits, allowed = some_logits(3), np.zeros((2, VOCAB), dtype=bool)
    allowed[0, [0, 39]] = allowed[1, 5:20] = True
    expected = logits.clone()
    expected[2][~torch.from_numpy(allowed[0])] = -math.inf
    expected[0][~torch.from_numpy(allowed[1])] = -math.inf
    mask_logits(logits, np.array([2, 0]), allowed)
    assert torch.equal(logits, expected)


TOKEN = st.integers(0, VOCAB - 1)
WISHES = st.fixed_dictionaries(
    {
        "prompt": st.lists(TOKEN, min_size=1, max_size=80),
        "answer": st.lists(TOKEN, max_size=80),
        "bad_words": st.lists(st.lists(TOKEN, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple),
        "repetition_penalty": st.sampled_from([1.0, 0.7, 1.4]),
        "presence_penalty": st.sampled_from([0.0, -1.0, 0.3]),
        "frequency_penalty": st.sampled_from([0.0, 2.0, -0.1]),
        "logit_bias": st.dictionaries(TOKEN, st.floats(-100, 100, width=32), max_size=5),
        "allowed_token_ids": st.none() | st.lists(TOKEN, min_size=1, max_size=30),
        "min_tokens": st.integers(0, 60),
        "stop_token_ids": st.lists(TOKEN, max_size=3),
    }
)


def by_a_plain_loop(row: torch.Tensor, wishes: dict) -> torch.Tensor:
    """The same, a token at a time."""
    prompt, answer = wishes["prompt"], wishes["answer"]
    ends = {*EOS, *wishes["stop_token_ids"]} if len(answer) < wishes["min_tokens"] else set()
    row = row.clone()
    for token in range(VOCAB):
        value = row[token] + np.float32(wishes["logit_bias"].get(token, 0.0))
        if token in prompt or token in answer:
            factor = np.float32(wishes["repetition_penalty"])
            value = value * factor if value < 0 else value / factor
        value = value - np.float32(wishes["frequency_penalty"]) * answer.count(token)
        value = value - np.float32(wishes["presence_penalty"]) * (token in answer)
        completes = any(
            word[-1] == token and (len(word) == 1 or tuple(answer[-(len(word) - 1) :]) == word[:-1])
            for word in wishes["bad_words"]
        )
        is_allowed = wishes["allowed_token_ids"] is None or token in wishes["allowed_token_ids"]
        row[token] = -math.inf if completes or token in ends or not is_allowed else value
    return row


@given(st.lists(WISHES, min_size=1, max_size=4), st.integers(0, 100))
@settings(deadline=None, max_examples=60)
def test_every_row_is_edited_as_a_plain_loop_would_and_as_if_it_were_alone(all_wishes, seed):
    logits = some_logits(len(all_wishes), seed)
    before = logits.clone()
    rows = []
    for index, wishes in enumerate(all_wishes):
        # Half of the answer is there when the row starts, as after a preemption; half is observed.
        half = len(wishes["answer"]) // 2
        asked = {name: value for name, value in wishes.items() if name not in ("prompt", "answer")}
        edits = LogitEdits.create(new_row(wishes["prompt"], wishes["answer"][:half], **asked), VOCAB)
        if edits is not None:
            for token in wishes["answer"][half:]:
                edits.observe(token)
            rows.append((index, edits))
    edit_logits(logits, rows)
    for index, wishes in enumerate(all_wishes):
        torch.testing.assert_close(logits[index], by_a_plain_loop(before[index], wishes), rtol=1e-6, atol=1e-5)
    for index, edits in rows:
        alone = before[index : index + 1].clone()
        edit_logits(alone, [(0, edits)])
        assert torch.equal(alone[0], logits[index])
