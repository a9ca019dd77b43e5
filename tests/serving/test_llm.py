"""The offline class answers as transformers does, in vLLM's shapes."""

import base64
import io
import itertools
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from tests.checkpoints import make_tokenizer
from tests.engine.harness import break_the_encoder_for
from vlm_serve import LLM, SamplingParams
from vlm_serve.errors import ConfigurationError, ContextLengthError, InvalidRequestError, ModelNotFoundError
from vlm_serve.serving.llm import READ_AHEAD, Job
from vlm_serve.serving.media import read_conversation

GREEDY = SamplingParams(temperature=0, max_tokens=8)
QUESTION = {"type": "text", "text": "What does the image show?"}


@pytest.fixture(scope="module")
def llm(served):
    with LLM(served.folder, dtype="float32", max_model_len=256, adapters=served.adapters, device="cpu") as llm:
        yield llm


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def test_generate_continues_plain_prompts_as_transformers_does(served, llm):
    tokenizer = make_tokenizer()
    prompts = ["The chest radiograph shows", "No"]
    outs = llm.generate(prompts, GREEDY, use_tqdm=False)
    for prompt, out in zip(prompts, outs, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            made = served.model.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))
        expected = made[0, ids.shape[1] :].tolist()
        assert (out.prompt, out.prompt_token_ids) == (prompt, ids[0].tolist())
        (answer,) = out.outputs
        assert answer.token_ids == expected
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.finish_reason == ("stop" if expected[-1] == 2 else "length")
        assert out.finished


def test_an_image_is_the_same_as_pil_image_bytes_path_and_data_url(llm, picture, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(png(picture))
    url = "data:image/png;base64," + base64.b64encode(png(picture)).decode()
    parts = [{"type": "image", "image": image} for image in (picture, png(picture), path, str(path))]
    parts.append({"type": "image_url", "image_url": {"url": url}})
    outs = llm.chat([[{"role": "user", "content": [part, QUESTION]}] for part in parts], GREEDY, use_tqdm=False)
    assert len({tuple(out.outputs[0].token_ids) for out in outs}) == 1
    assert {len(out.prompt_token_ids) for out in outs} == {len(outs[0].prompt_token_ids)}
    assert outs[0].receipts[0].media_type == "image/png"
    assert llm.engine.stats.mm_cache_hits + llm.engine.stats.prefix_cache_hits > 0


def test_one_conversation_needs_no_list_around_it(llm):
    (out,) = llm.chat([{"role": "user", "content": "Is there a mass?"}], GREEDY, use_tqdm=False)
    assert len(out.outputs[0].token_ids) > 0


def test_each_prompt_may_have_parameters_and_an_adapter_of_its_own(llm):
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (3, 5, 7)]
    names = [None, "chest", "neuro"]
    together = llm.generate(["Is there a mass"] * 3, params, adapter=names, use_tqdm=False)
    assert [len(out.outputs[0].token_ids) for out in together] == [3, 5, 7]
    for name, sampling, out in zip(names, params, together, strict=True):
        (alone,) = llm.generate("Is there a mass", sampling, adapter=name, use_tqdm=False)
        assert alone.outputs[0].token_ids == out.outputs[0].token_ids
    assert len({tuple(out.outputs[0].token_ids[:3]) for out in together}) > 1


def test_a_seeded_sample_repeats_and_another_seed_differs(llm):
    def draw(seed: int) -> list[int]:
        sampling = SamplingParams(temperature=1.5, seed=seed, max_tokens=20, ignore_eos=True)
        others = [SamplingParams(max_tokens=9)] * 3
        return llm.generate(["No effusion"] * 4, [*others, sampling], use_tqdm=False)[3].outputs[0].token_ids

    assert draw(1) == draw(1) != draw(2)


def test_a_stop_string_ends_the_answer_and_gives_its_blocks_back(llm):
    (free,) = llm.generate("The chest", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True), use_tqdm=False)
    text = free.outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    (cut,) = llm.generate(
        "The chest", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=stop), use_tqdm=False
    )
    assert cut.outputs[0].text == text[: text.find(stop)]
    assert cut.outputs[0].finish_reason == "stop"
    assert llm.engine.stats.kv_blocks_used == 0


@pytest.mark.parametrize(
    ("call", "error", "param"),
    [
        (lambda llm: llm.generate("word " * 400), ContextLengthError, "messages"),
        (lambda llm: llm.generate(["a", "b"], [GREEDY]), InvalidRequestError, "sampling_params"),
        (lambda llm: llm.generate("a", adapter="cardiology"), ModelNotFoundError, "adapter"),
        (
            lambda llm: llm.chat([{"role": "user", "content": [{"type": "image", "image": Image.new("I", (4, 4))}]}]),
            InvalidRequestError,
            "messages[0].content[0]",
        ),
        (lambda llm: llm.chat([]), InvalidRequestError, "messages"),
        (lambda llm: llm.chat("Is there a mass?"), InvalidRequestError, "messages[0]"),
        (lambda llm: llm.chat([{"role": "user", "content": 123}]), InvalidRequestError, "messages[0].content"),
        (lambda llm: llm.generate(123), InvalidRequestError, "prompt"),
        (lambda llm: llm.generate({"prompt_token_ids": [1.5]}), InvalidRequestError, "prompt"),
        (lambda llm: llm.generate({"prompt_token_ids": [True]}), InvalidRequestError, "prompt"),
        (lambda llm: llm.generate({"prompt_token_ids": np.ones((2, 2), int)}), InvalidRequestError, "prompt"),
        (
            lambda llm: llm.chat([{"role": "user", "content": [{"type": "image", "image": "/no/such"}]}]),
            InvalidRequestError,
            "messages[0].content[0]",
        ),
        (
            lambda llm: llm.chat([{"role": "user", "content": [{"type": "video"}]}]),
            InvalidRequestError,
            "messages[0].content[0]",
        ),
    ],
)
def test_what_cannot_be_served_is_named_and_leaves_nothing_behind(llm, call, error, param):
    with pytest.raises(error) as raised:
        call(llm)
    assert raised.value.param == param
    assert not llm.engine.has_work


@pytest.mark.parametrize("ask", [LLM.generate, lambda llm, text: llm.chat([{"role": "user", "content": text}])])
def test_text_that_cannot_fit_is_refused_before_it_is_tokenised(llm, ask):
    with pytest.raises(ContextLengthError, match="characters"):
        ask(llm, "word " * 200_000)


def asking(seed: int) -> list[dict]:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return [{"role": "user", "content": [{"type": "image", "image": Image.fromarray(pixels)}, QUESTION]}]


def test_a_fault_in_one_request_loses_no_other_results(served, monkeypatch):
    conversations = [asking(100 + seed) for seed in range(4)]
    with LLM(served.folder, dtype="float32", max_model_len=256, device="cpu") as llm:
        undisturbed = llm.chat(conversations, GREEDY, use_tqdm=False)
        assert [len(out.image_digests) for out in undisturbed] == [1] * 4
    with LLM(served.folder, dtype="float32", max_model_len=256, device="cpu") as llm:
        break_the_encoder_for(llm.engine, undisturbed[2].image_digests[0], monkeypatch)
        outs = llm.chat(conversations, GREEDY, use_tqdm=False)
        assert [out.outputs[0].finish_reason == "error" for out in outs] == [False, False, True, False]
        assert "Send it again" in outs[2].outputs[0].error
        assert all(out.finished for out in outs)
        for index in (0, 1, 3):
            assert outs[index].outputs[0].token_ids == undisturbed[index].outputs[0].token_ids
            assert outs[index].outputs[0].error is None
        assert not llm.engine.has_work


@pytest.fixture
def sigint():
    """As in a terminal; a shell that runs the tests in the background has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
def test_ctrl_c_in_a_step_aborts_all_and_leaves_the_engine_as_good_as_new(llm, monkeypatch):
    """The real signal, in the middle of the decoder's forward pass."""
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = [out.outputs[0].token_ids for out in llm.generate(["No effusion", "The heart"], params, use_tqdm=False)]
    decoder = llm.engine.runner.model.decoder
    forward, calls = decoder.forward, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        hidden = forward(*arguments)
        calls.append("computed")
        return hidden

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["No effusion", "The heart", "Compare"], params, use_tqdm=False)
    assert calls[-1] == "computed"  # the step was not torn
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not llm.engine.has_work
    assert llm.engine.stats.kv_blocks_used == 0
    again = [out.outputs[0].token_ids for out in llm.generate(["No effusion", "The heart"], params, use_tqdm=False)]
    assert again == expected


@pytest.mark.usefixtures("sigint")
def test_a_second_ctrl_c_does_not_wait_for_the_step(llm, monkeypatch):
    decoder = llm.engine.runner.model.decoder
    forward, went_on = decoder.forward, []

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        went_on.append(1)
        return forward(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["No effusion", "The heart"], GREEDY, use_tqdm=False)
    assert not went_on
    assert not llm.engine.has_work
    assert len(llm.generate("No effusion", GREEDY, use_tqdm=False)[0].outputs[0].token_ids) > 0


def test_the_bar_counts_prompts_and_can_be_left_out(llm, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    llm.generate(["No", "Is there"], GREEDY)
    shown = capsys.readouterr()
    assert "2/2" in shown.err
    assert "tok/s" in shown.err
    assert shown.out == ""
    llm.generate(["No", "Is there"], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_settings_reach_the_engine(served):
    with LLM(
        served.folder,
        dtype="float32",
        max_model_len=96,
        enable_prefix_caching=False,
        max_num_batched_tokens=32,
        block_size=8,
        max_num_seqs=3,
        device="cpu",
    ) as llm:
        config = llm.engine.scheduler.config
        assert (config.max_model_len, config.enable_prefix_caching, config.max_num_batched_tokens) == (96, False, 32)
        assert (config.block_size, config.max_num_seqs, llm.engine.max_model_len) == (8, 3, 96)
        llm.generate(["The chest radiograph shows clear lungs and"] * 2, GREEDY, use_tqdm=False)
        llm.generate(["The chest radiograph shows clear lungs and"] * 2, GREEDY, use_tqdm=False)
        assert llm.engine.stats.prefix_cache_hits == 0


def test_a_share_of_a_cpus_memory_is_refused_with_the_remedy(served):
    with pytest.raises(ConfigurationError, match="on a CPU give bytes, such as 2GiB"):
        LLM(served.folder, dtype="float32", device="cpu", kv_cache_memory=0.8)


def test_a_stream_takes_jobs_as_there_is_room_and_gives_each_its_answer(served):
    taken = []

    def jobs():
        for index in range(60):
            taken.append(index)
            prompt = "word " * 99 if index == 7 else f"Study {index} shows"
            yield Job(prompt, SamplingParams(temperature=0, max_tokens=1 + index % 5, ignore_eos=True), key=index)

    with LLM(served.folder, dtype="float32", max_model_len=64, max_num_seqs=4, device="cpu") as llm:
        ended = {}
        for job, result in llm.stream(jobs()):
            ended[job.key] = result
            assert len(taken) <= len(ended) + 4 + READ_AHEAD  # the source is not read ahead of the engine
        assert sorted(ended) == list(range(60))
        assert isinstance(ended.pop(7), ContextLengthError)
        for index, result in ended.items():
            assert len(result.answers[0].token_ids) == 1 + index % 5
            assert result.prompt == f"Study {index} shows"


def test_a_stream_that_is_left_early_aborts_what_is_under_way(llm):
    jobs = (Job("No effusion", SamplingParams(max_tokens=200, ignore_eos=True)) for _ in range(1000))
    short = Job("The heart", SamplingParams(max_tokens=1))
    stream = llm.stream(itertools.chain([short], jobs))
    assert next(stream)[0] is short
    with pytest.raises(InvalidRequestError, match="at work"):
        llm.generate("No", GREEDY)
    stream.close()
    assert not llm.engine.has_work
    assert llm.generate("No", GREEDY, use_tqdm=False)[0].finished


def test_a_stream_mixes_texts_conversations_and_embeddings(llm):
    jobs = [
        Job("The heart", None, key="vector"),
        Job(read_conversation(asking(3)), GREEDY, key="image"),
        Job((1, 50, 51), GREEDY, adapter="chest", key="tokens"),
        Job("The heart", GREEDY, adapter="nobody", key="unknown"),
    ]
    results = {job.key: result for job, result in llm.stream(jobs)}
    assert results["vector"].embedding.shape == (64,)
    assert len(results["image"].receipts) == len(results["image"].image_digests) == 1
    assert results["tokens"].prompt_token_ids == (1, 50, 51)
    assert isinstance(results["unknown"], ModelNotFoundError)
