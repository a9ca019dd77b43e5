"""Guesses and several answers on a real tiny model: the tokens are those that one at a time would have given."""

import pytest

from tests.checkpoints import make_llava
from tests.engine.harness import Harness, Run, assert_parity, picture
from vlm_serve.engine.ngram import NgramIndex
from vlm_serve.types import Request, SamplingParams

PROMPTS = ["Say it again and again, again and again, again and again.", "The heart is normal. The heart is"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    return folder, make_llava(folder)


def answers(harness: Harness, prompt, sampling: SamplingParams) -> dict[int, list[int]]:
    harness._runs = {"a": Run(prompt)}
    harness.engine.add(Request("a", prompt.token_ids, sampling, prompt.images))
    tokens: dict[int, list[int]] = {}
    while harness.engine.has_work:
        for output in harness.engine.step().outputs:
            assert output.error is None
            tokens.setdefault(output.index, []).extend(output.token_ids)
    return tokens


def guess_from(monkeypatch: pytest.MonkeyPatch, known: list[list[int]]) -> None:
    """Guesses what is known to follow, one token in three wrong: a random model repeats itself too seldom."""

    def propose(self, token_ids, limit):
        at = len(token_ids)
        (following, *_) = [one[at : at + limit] for one in known if one[:at] == token_ids]
        return tuple(token if (at + step) % 3 else (token + 1) % 300 for step, token in enumerate(following))

    monkeypatch.setattr(NgramIndex, "propose", propose)


def assert_guesses_were_right_and_wrong(harness: Harness) -> None:
    stats = harness.engine.stats
    assert 10 < stats.spec_accepted_tokens < stats.spec_draft_tokens


def test_greedy_answers_with_guesses_equal_transformers(checkpoint, monkeypatch):
    folder, reference = checkpoint
    harness = Harness(folder)
    prompts = [harness.chat(text) for text in PROMPTS] + [harness.chat(picture(1), PROMPTS[0])]
    known = [[*run.prompt.token_ids, *run.token_ids] for run in harness.run(*prompts, max_tokens=40)]
    guess_from(monkeypatch, known)
    harness = Harness(folder, speculative_tokens=3)
    for run in harness.run(*prompts, max_tokens=40):
        assert_parity(reference, run)
    assert_guesses_were_right_and_wrong(harness)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_guesses_change_no_token_at_any_temperature(checkpoint, monkeypatch, temperature):
    folder, _ = checkpoint
    sampling = SamplingParams(max_tokens=40, temperature=temperature, seed=5, n=3, ignore_eos=True)
    plain, guessing = (Harness(folder, speculative_tokens=tokens) for tokens in (0, 4))
    prompt = plain.chat(picture(2), PROMPTS[1])
    expected = answers(plain, prompt, sampling)
    guess_from(monkeypatch, [[*prompt.token_ids, *tokens] for tokens in expected.values()])
    assert answers(guessing, prompt, sampling) == expected
    assert_guesses_were_right_and_wrong(guessing)


def test_answer_i_of_n_is_the_answer_to_the_seed_plus_i(checkpoint):
    folder, _ = checkpoint
    harness = Harness(folder, enable_prefix_caching=False)
    prompt = harness.chat(picture(3), PROMPTS[0])
    together = answers(harness, prompt, SamplingParams(max_tokens=12, seed=7, n=3, ignore_eos=True))
    alone = [
        answers(harness, prompt, SamplingParams(max_tokens=12, seed=7 + index, ignore_eos=True))[0]
        for index in range(3)
    ]
    assert [together[index] for index in range(3)] == alone
    assert len({tuple(tokens) for tokens in alone}) == 3
