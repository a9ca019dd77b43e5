"""What an offline result says beside its text: several answers, why each ended, log-probabilities."""

import itertools

import pytest
import torch

from tests.checkpoints import make_tokenizer
from vlm_serve import LLM, SamplingParams
from vlm_serve.families.prompt import Prompt
from vlm_serve.serving.ingest import PreparedPrompt
from vlm_serve.serving.outputs import Answers
from vlm_serve.serving.token_bytes import TokenBytes
from vlm_serve.types import FinishReason, Request, StructuredOutputs, TokenLogprobs, TokenOutput

PROMPT = "The chest radiograph shows"


@pytest.fixture(scope="module")
def llm(served):
    with LLM(served.folder, dtype="float32", max_model_len=256, device="cpu") as llm:
        yield llm


def ask(llm: LLM, prompt: str = PROMPT, **sampling):
    sampling = {"temperature": 0, "max_tokens": 12, "ignore_eos": True} | sampling
    return llm.generate(prompt, SamplingParams(**sampling), use_tqdm=False)[0]


def reference(served, token_ids: list[int]) -> torch.Tensor:
    """transformers' log-probabilities after each token, `[tokens, vocabulary]`."""
    with torch.inference_mode():
        return served.model(torch.tensor([token_ids])).logits[0].float().log_softmax(-1)


def test_several_answers_are_those_of_the_seeds_that_follow_each_other(llm):
    three = ask(llm, n=3, temperature=1.2, seed=40)
    assert [answer.index for answer in three.outputs] == [0, 1, 2]
    for index, answer in enumerate(three.outputs):
        assert answer.token_ids == ask(llm, temperature=1.2, seed=40 + index).outputs[0].token_ids
    assert len({tuple(answer.token_ids) for answer in three.outputs}) == 3


def test_each_of_several_answers_ends_by_itself(llm):
    free = ask(llm, n=4, temperature=1.5, seed=7, max_tokens=40)
    stop = free.outputs[1].text[10:13]
    some = ask(llm, n=4, temperature=1.5, seed=7, max_tokens=40, stop=stop)
    assert some.finished
    assert {answer.finish_reason for answer in some.outputs} == {"stop", "length"}
    for answer, whole in zip(some.outputs, free.outputs, strict=True):
        assert answer.text == whole.text.partition(stop)[0]
        assert (answer.stop_reason == stop) == (stop in whole.text)
        assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
    assert llm.engine.stats.kv_blocks_used == 0


def test_logprobs_are_transformers_and_the_likeliest_are_ranked(served, llm):
    out = ask(llm, temperature=1.5, seed=5, logprobs=3)
    (answer,) = out.outputs
    ids = out.prompt_token_ids + answer.token_ids
    expected = reference(served, ids)[len(out.prompt_token_ids) - 1 :]
    assert len(answer.logprobs) == len(answer.token_ids)
    for position, token, row in zip(answer.logprobs, answer.token_ids, expected, strict=False):
        assert next(iter(position)) == token
        best = row.topk(3).indices.tolist()
        assert set(position) == {token, *best}
        assert [position[other].rank for other in best] == [1, 2, 3]
        assert position[token].rank == 1 + int((row > row[token]).sum())
        for other, found in position.items():
            assert found.logprob == pytest.approx(row[other].item(), abs=1e-4)
            assert found.decoded_token == make_tokenizer().decode([other])
    own = [position[token].logprob for position, token in zip(answer.logprobs, answer.token_ids, strict=True)]
    assert answer.cumulative_logprob == pytest.approx(sum(own))
    assert any(position[token].rank > 3 for position, token in zip(answer.logprobs, answer.token_ids, strict=True))


def test_prompt_logprobs_are_transformers_and_the_first_token_has_none(served, llm):
    out = ask(llm, prompt_logprobs=2, max_tokens=2)
    first, *others = out.prompt_logprobs
    assert first is None
    expected = reference(served, out.prompt_token_ids)
    for position, token, row in zip(others, out.prompt_token_ids[1:], expected, strict=False):
        assert position[token].logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert set(position) == {token, *row.topk(2).indices.tolist()}
    assert len(others) == len(out.prompt_token_ids) - 1


def test_what_was_not_asked_for_is_none(llm):
    out = ask(llm)
    (answer,) = out.outputs
    assert (out.prompt_logprobs, answer.logprobs, answer.cumulative_logprob) == (None, None, None)
    zero = ask(llm, logprobs=0)
    assert [list(position) for position in zero.outputs[0].logprobs] == [[token] for token in answer.token_ids]


def test_what_is_beyond_a_stop_string_is_in_nothing_that_is_counted(llm):
    """Token ids and log-probabilities end with the token that completed it."""
    free = ask(llm, max_tokens=40, logprobs=1).outputs[0]
    stop = free.text[len(free.text) // 2 :][:3]
    cut = ask(llm, max_tokens=40, logprobs=1, stop=["never so", stop]).outputs[0]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.text == free.text.partition(stop)[0]
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert len(cut.logprobs) == len(cut.token_ids) < len(free.token_ids)
    decode = make_tokenizer().decode
    assert stop in decode(cut.token_ids)
    assert stop not in decode(cut.token_ids[:-1])
    kept = ask(llm, max_tokens=40, stop=stop, include_stop_str_in_output=True).outputs[0]
    assert kept.text == cut.text + stop


def test_a_stop_token_is_the_stop_reason_and_the_models_own_end_is_none(llm):
    free = ask(llm, max_tokens=40).outputs[0]
    token = free.token_ids[6]
    cut = ask(llm, max_tokens=40, stop_token_ids=[token]).outputs[0]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", token)
    assert cut.token_ids == free.token_ids[: free.token_ids.index(token) + 1]
    biased = ask(llm, ignore_eos=False, logit_bias={2: 100.0}).outputs[0]
    assert (biased.finish_reason, biased.stop_reason, biased.text) == ("stop", None, "")


def test_min_tokens_holds_for_stop_strings_and_stop_tokens(llm):
    free = ask(llm, max_tokens=40)
    text, ids = free.outputs[0].text, free.outputs[0].token_ids
    stop = text[3:5]
    least = ask(llm, max_tokens=40, stop=stop, min_tokens=20).outputs[0]
    assert len(least.token_ids) > 20
    assert least.token_ids == ids[: len(least.token_ids)]
    token = ids[4]
    assert len(ask(llm, max_tokens=40, stop_token_ids=[token], min_tokens=20).outputs[0].token_ids) > 20


def test_a_truncated_prompt_is_the_one_that_was_answered(llm):
    whole = ask(llm)
    cut = ask(llm, truncate_prompt_tokens=4)
    assert cut.prompt_token_ids == whole.prompt_token_ids[-4:]
    assert cut.prompt == PROMPT


def test_bad_words_and_choices_are_those_of_the_server(llm):
    """Through the same ingest: texts become token ids, a choice becomes a grammar."""
    tokenizer = make_tokenizer()
    free = ask(llm, max_tokens=40).outputs[0].token_ids
    words = {token: tokenizer.decode([token]) for token in free}
    own = (token for token, word in words.items() if tokenizer.encode(word, add_special_tokens=False) == [token])
    bad = next(token for token in own if words[token].isalnum())
    assert bad not in ask(llm, max_tokens=40, bad_words=[words[bad]]).outputs[0].token_ids
    chosen = ask(llm, structured_outputs=StructuredOutputs(choice=["clear", "normal"]), ignore_eos=False)
    assert chosen.outputs[0].text in ("clear", "normal")
    assert chosen.outputs[0].finish_reason == "stop"


def test_the_token_that_is_there_is_named_once_and_keeps_its_rank():
    request = Request("a", (1, 2), SamplingParams(logprobs=2, max_tokens=4))
    prepared = PreparedPrompt(Prompt(request.token_ids))
    answers = Answers(request, None, prepared, TokenBytes(make_tokenizer().backend_tokenizer))
    among = TokenLogprobs((51, 50, 51), (-2.0, -0.1, -2.0), 2)
    beyond = TokenLogprobs((60, 50, 51), (-9.0, -0.1, -2.0), 17)
    answers.add(TokenOutput("a", (51, 60), FinishReason.LENGTH, logprobs=(among, beyond)), pytest.fail)
    positions = answers.output(None).outputs[0].logprobs
    ranks = [{token: found.rank for token, found in position.items()} for position in positions]
    assert ranks == [{51: 2, 50: 1}, {60: 17, 50: 1, 51: 2}]


def test_outputs_that_come_after_a_stop_string_change_nothing():
    tokenizer = make_tokenizer()
    request = Request("a", (1, 2), SamplingParams(stop="radio", max_tokens=40, n=2))
    answers = Answers(request, None, PreparedPrompt(Prompt(request.token_ids)), TokenBytes(tokenizer.backend_tokenizer))
    ids = tokenizer("The chest radiograph shows", add_special_tokens=False).input_ids
    aborted = []
    for token in itertools.chain(ids, ids):
        answers.add(TokenOutput("a", (token,), index=1), aborted.append)
    assert aborted == [1]
    output = answers.output(None)
    assert output.outputs[1].text == "The chest "
    assert (output.outputs[0].finish_reason, output.finished) == (None, False)
