"""Tokens, log-probabilities, drafts and embeddings, in a real engine, are transformers' own."""

import math

import numpy as np
import pytest
import torch

from tests.checkpoints import make_llava
from tests.engine.harness import Harness, picture
from vlm_serve.engine import logprobs as logprobs_module
from vlm_serve.engine.batch import NewRow, ScheduledBatch, StepResult
from vlm_serve.engine.sampler import SamplingRows, sample
from vlm_serve.engine.sampling_head import NO_TOKEN_LEFT, SamplingHead
from vlm_serve.types import FinishReason, Request, SamplingParams, TokenLogprobs, TokenOutput

EOS = 2
PROMPT = (1, 30, 31, 32, 33, 34, 35, 30, 31)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model_and_harness(tmp_path_factory):
    folder = tmp_path_factory.mktemp("head")
    model = make_llava(folder)
    harness = Harness(folder, max_num_seqs=16, max_num_batched_tokens=256)
    harness.engine.runner.run = harness._run_batch  # unrecorded
    return model, harness


@pytest.fixture
def model(model_and_harness):
    return model_and_harness[0]


@pytest.fixture
def harness(model_and_harness):
    model_and_harness[1].set(max_num_batched_tokens=256, max_num_seqs=16)
    return model_and_harness[1]


def request(name: str, prompt=PROMPT, *, images=(), bad_words=(), pooling=False, **sampling) -> Request:
    params = SamplingParams(**({"max_tokens": 12, "temperature": 0} | sampling))
    return Request(name, tuple(prompt), params, images, eos_token_ids=(EOS,), bad_word_ids=bad_words, pooling=pooling)


def run(harness, *requests: Request) -> dict[str, TokenOutput]:
    """Each request's outputs as one."""
    outputs: dict[str, list[TokenOutput]] = {one.request_id: [] for one in requests}
    for one in requests:
        harness.engine.add(one)
    while harness.engine.has_work:
        for output in harness.engine.step().outputs:
            outputs[output.request_id].append(output)
    return {
        name: TokenOutput(
            name,
            tuple(token for one in all_of_it for token in one.token_ids),
            all_of_it[-1].finish_reason,
            error=all_of_it[-1].error,
            error_param=all_of_it[-1].error_param,
            logprobs=tuple(entry for one in all_of_it for entry in one.logprobs),
            prompt_logprobs=tuple(entry for one in all_of_it for entry in one.prompt_logprobs),
            embedding=all_of_it[-1].embedding,
        )
        for name, all_of_it in outputs.items()
    }


@torch.inference_mode()
def expected_logprobs(model, token_ids) -> torch.Tensor:
    return torch.log_softmax(model(input_ids=torch.tensor([list(token_ids)])).logits[0].float(), -1)


def assert_entries(entries: tuple[TokenLogprobs, ...], expected: torch.Tensor, tokens, count: int) -> None:
    assert len(entries) == len(tokens) == len(expected)
    for entry, token, logprobs in zip(entries, tokens, expected, strict=True):
        top, top_ids = logprobs.topk(count)
        assert entry.token_ids[0] == token
        assert entry.logprobs[0] == pytest.approx(float(logprobs[token]), abs=TOLERANCE)
        assert entry.rank == 1 + int((logprobs > logprobs[token]).sum())
        assert entry.token_ids[1:] == tuple(top_ids.tolist())
        assert entry.logprobs[1:] == pytest.approx(top.tolist(), abs=TOLERANCE)


GENERATE = {
    "repetition_penalty": ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
    "min_tokens": (
        {"min_tokens": 9, "logit_bias": {EOS: 100}},
        {"min_new_tokens": 9, "sequence_bias": [[[EOS], 100.0]]},
    ),
    "logit_bias": ({"logit_bias": {50: 6.0, 99: -100}}, {"sequence_bias": [[[50], 6.0], [[99], -100.0]]}),
    "all": (
        {"repetition_penalty": 1.2, "min_tokens": 4, "logit_bias": {60: 4.0, EOS: 3.0}},
        {"repetition_penalty": 1.2, "min_new_tokens": 4, "sequence_bias": [[[60], 4.0], [[EOS], 3.0]]},
    ),
}


@pytest.mark.parametrize("name", GENERATE)
def test_greedy_tokens_are_those_of_transformers_generate(model, harness, name):
    ours, theirs = GENERATE[name]
    tokens = run(harness, request("a", **ours))["a"].token_ids
    ids = torch.tensor([PROMPT])
    expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=3,
        **theirs,
    )
    assert list(tokens) == expected[0, len(PROMPT) :].tolist()


def test_what_one_asks_does_not_change_its_neighbours(harness):
    """Row 20 of engines.md: the same seed gives the same answer whatever else is in the batch."""
    asked = [
        {},
        {"temperature": 1.3, "seed": 4},
        {"repetition_penalty": 1.5, "logprobs": 3},
        {"temperature": 1.0, "seed": 2**63, "frequency_penalty": 1.0, "presence_penalty": -0.5},
        {"allowed_token_ids": list(range(50, 60)), "temperature": 0.8, "seed": 9},
        {"min_p": 0.3, "temperature": 1.5, "seed": 1, "prompt_logprobs": 2},
        {"bad_words": ((30, 31), (40,)), "temperature": 1.0, "seed": 5},
        {"logit_bias": {7: 3.0}, "top_k": 5, "top_p": 0.8, "temperature": 1.0, "seed": 5},
    ]
    requests = [request(str(index), PROMPT[: 3 + index % 4], **one) for index, one in enumerate(asked)]
    together = run(harness, *requests)
    for one in requests:
        assert run(harness, one)[one.request_id].token_ids == together[one.request_id].token_ids


def test_no_bad_word_is_in_the_answer(harness):
    plain = run(harness, request("a"))["a"].token_ids
    words = ((plain[0],), plain[2:4], plain[5:8])
    answer = run(harness, request("a", bad_words=words))["a"].token_ids
    for word in words:
        assert all(answer[at : at + len(word)] != word for at in range(len(answer)))


def test_a_request_that_forbids_everything_ends_alone_with_a_clear_error(harness):
    for temperature in (0, 1.0):
        for filters in ({}, {"top_k": 3}, {"min_p": 0.1}):
            bad = request("bad", allowed_token_ids=[50], bad_words=((50,),), temperature=temperature, **filters)
            outputs = run(harness, bad, request("good"))
            assert outputs["bad"].finish_reason is FinishReason.ERROR
            assert (outputs["bad"].error, outputs["bad"].error_param) == (NO_TOKEN_LEFT.message, NO_TOKEN_LEFT.param)
            assert outputs["bad"].token_ids == ()
            assert outputs["good"].token_ids == run(harness, request("good"))["good"].token_ids


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "seed": 3, "frequency_penalty": 1.5, "logit_bias": {9: 50}}]
)
@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_logprobs_are_of_the_models_own_distribution(model, harness, sampling, count):
    output = run(harness, request("a", logprobs=count, **sampling), request("b"))["a"]
    expected = expected_logprobs(model, PROMPT + output.token_ids[:-1])[len(PROMPT) - 1 :]
    assert_entries(output.logprobs, expected, output.token_ids, count)


@pytest.mark.parametrize("chunk", range(1, len(PROMPT) + 1))
def test_prompt_logprobs_are_transformers_at_every_size_of_a_chunk(model, harness, chunk):
    harness.set(max_num_batched_tokens=chunk, max_num_seqs=1)
    output = run(harness, request("a", prompt_logprobs=4, max_tokens=3))["a"]
    assert_entries(output.prompt_logprobs, expected_logprobs(model, PROMPT)[:-1], PROMPT[1:], 4)
    assert len(output.token_ids) == 3


def test_prompt_logprobs_are_the_same_a_second_time_and_beside_others(model, harness):
    """A prefix that is cached has no hidden states; they are computed."""
    long = tuple(np.random.default_rng(0).integers(5, 320, 90).tolist())
    first = run(harness, request("a", long))["a"]
    for others in ((), (request("b"), request("c", PROMPT[:2], prompt_logprobs=1))):
        output = run(harness, request("a", long, prompt_logprobs=2), *others)["a"]
        assert_entries(output.prompt_logprobs, expected_logprobs(model, long)[:-1], long[1:], 2)
        assert output.token_ids == first.token_ids


def test_the_logits_of_a_prompt_are_held_a_few_at_a_time(model, harness, monkeypatch):
    sizes, make = [], harness.engine.runner.model.decoder.logits
    monkeypatch.setattr(logprobs_module, "MAX_LOGITS_AT_ONCE", 4 * 320)
    monkeypatch.setattr(
        harness.engine.runner.model.decoder, "logits", lambda hidden: sizes.append(len(hidden)) or make(hidden)
    )
    output = run(harness, request("a", prompt_logprobs=3, max_tokens=1))["a"]
    assert sizes == [4, 4, 1]
    assert_entries(output.prompt_logprobs, expected_logprobs(model, PROMPT)[:-1], PROMPT[1:], 3)


def test_prompt_logprobs_of_an_image_prompt_cover_every_placeholder(harness):
    prompt = harness.chat(picture(1), "What is it?")
    output = run(harness, request("a", prompt.token_ids, images=prompt.images, prompt_logprobs=0, max_tokens=1))["a"]
    assert [entry.token_ids for entry in output.prompt_logprobs] == [(token,) for token in prompt.token_ids[1:]]


def test_a_token_past_the_vocabulary_has_probability_zero():
    logprobs = torch.log_softmax(torch.arange(8.0)[None], -1)
    (entry,) = logprobs_module.token_logprobs(logprobs, np.array([9]), np.array([1]))
    assert entry == TokenLogprobs((9, 7), (-math.inf, float(logprobs[0, 7])), 9)


def test_an_embedding_is_the_last_tokens_hidden_state_normed(model, harness):
    other = PROMPT[:4]
    outputs = run(harness, request("a", pooling=True), request("b", other, pooling=True), request("c"))
    assert outputs["c"].token_ids == run(harness, request("c"))["c"].token_ids
    for name, prompt in (("a", PROMPT), ("b", other)):
        with torch.inference_mode():
            hidden = model.model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1]
        assert outputs[name].token_ids == ()
        assert outputs[name].finish_reason is FinishReason.STOP
        embedding = outputs[name].embedding
        assert embedding.dtype == np.float32
        assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-6)
        np.testing.assert_allclose(embedding, torch.nn.functional.normalize(hidden, dim=-1), atol=1e-5)


class Drafting:
    """A head over hidden states that are what they are, whatever the tokens."""

    LENGTH = 40

    def __init__(self, harness, **sampling) -> None:
        decoder = harness.engine.runner.model.decoder
        self.hidden = torch.randn(
            2, self.LENGTH, decoder.config.hidden_size, generator=torch.Generator().manual_seed(0)
        )
        self.tokens = np.zeros((2, self.LENGTH), dtype=np.int64)
        self.head = SamplingHead(decoder, self.tokens, lambda: pytest.fail("no grammar"))
        params = SamplingParams(max_tokens=None, **sampling)
        for row in range(2):
            self.tokens[row, :3] = 7
            self.head.start(NewRow(row, (7, 7, 7), 3, (), params, draw=11 + row, adapter_slot=None))

    @torch.inference_mode()
    def step(self, start: int, *drafts: tuple[int, ...]) -> StepResult:
        counts = np.array([1 + len(draft) for draft in drafts])
        batch = ScheduledBatch(
            rows=np.arange(len(drafts)),
            starts=np.full(len(drafts), start),
            counts=counts,
            samples=np.ones(len(drafts), dtype=bool),
            drafts=drafts,
        )
        self.head.write_drafts(batch)
        for row, draft in enumerate(drafts):
            assert tuple(self.tokens[row, start + 1 : start + 1 + len(draft)]) == draft
        query_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        hidden = torch.cat([self.hidden[row, start : start + count] for row, count in enumerate(counts)])
        return self.head.finish(batch, query_start, hidden)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 1.5, "top_k": 9}])
def test_a_draft_is_taken_as_far_as_it_is_what_would_have_been_drawn(harness, sampling):
    plain = Drafting(harness, **sampling)
    drawn = [plain.step(start, (), ()).tokens for start in range(2, 12)]
    first, second = ([step[row][0] for step in drawn] for row in range(2))
    assert len(set(first)) > 3
    wrong = (first[1] + 1) % 320
    for draft, expected in (
        ((), first[:1]),
        (tuple(first[:3]), first[:4]),
        ((first[0], wrong, first[2]), first[:2]),
        (((first[0] + 1) % 320,), first[:1]),
    ):
        drafting = Drafting(harness, **sampling)
        result = drafting.step(2, draft, tuple(second[:5]))
        assert result.tokens == (tuple(expected), tuple(second[:6]))
        assert drafting.tokens[0, 3 : 3 + len(expected)].tolist() == expected
        # The next step goes on after what was accepted.
        assert drafting.step(2 + len(expected), (), ()).tokens[0] == (first[len(expected)],)


def test_each_token_of_an_answer_has_the_draw_of_its_own_index(harness):
    plain = Drafting(harness, temperature=1.5)
    plain.hidden[:] = plain.hidden[:, :1].clone()
    drawn = [plain.step(start, (), ()).tokens[0][0] for start in range(2, 10)]
    with torch.inference_mode():
        logits = harness.engine.runner.model.decoder.logits(plain.hidden[0, :8])
    each = np.ones(8)
    rows = SamplingRows(1.5 * each, 0 * each, each, 0 * each, np.full(8, 11, dtype=np.uint64), np.arange(8))
    assert drawn == sample(logits, rows).tolist()
    assert len(set(drawn)) > 3


def test_logprobs_of_drafts_are_those_of_the_tokens_that_were_taken(harness):
    plain = Drafting(harness, temperature=0, logprobs=2)
    steps = [plain.step(start, (), ()) for start in range(2, 6)]
    tokens = [step.tokens[1][0] for step in steps]
    result = Drafting(harness, temperature=0, logprobs=2).step(2, (), (*tokens[:2], (tokens[2] + 1) % 320))
    assert result.tokens[1] == tuple(tokens[:3])
    assert [entry.token_ids for entry in result.logprobs[1]] == [step.logprobs[1][0].token_ids for step in steps[:3]]
    assert len(result.logprobs[0]) == 1


def test_a_plain_step_touches_nothing_that_nobody_asked_for(harness, monkeypatch):
    from vlm_serve.engine import sampling_head

    plain = Drafting(harness, temperature=0)
    for name in ("edit_logits", "mask_logits", "token_logprobs", "prompt_logprobs"):
        monkeypatch.setattr(sampling_head, name, lambda *arguments, name=name: pytest.fail(f"{name} was called"))
    monkeypatch.setattr(torch, "log_softmax", lambda *arguments, **_: pytest.fail("log_softmax was called"))
    assert len(plain.step(2, (), ()).tokens) == 2
