"""A fault ends one request; an interrupted step leaves no lie in the books. On a real tiny model."""

from dataclasses import replace

import pytest
import torch

from tests.checkpoints import make_llava
from tests.engine.adapters import make_adapter
from tests.engine.harness import Harness, assert_parity, break_the_encoder_for, picture
from vlm_serve.decoders.kinds import NormKind
from vlm_serve.engine.engine import choose_device, choose_dtype
from vlm_serve.errors import AdapterError, ConfigurationError
from vlm_serve.families import load_family
from vlm_serve.types import FinishReason, Request, SamplingParams

QUESTION = "What does the image show?"
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    folder, directory = tmp_path_factory.mktemp("llava"), tmp_path_factory.mktemp("adapters")
    model = make_llava(folder)
    references = {
        name: make_adapter(model, directory / name, rank=4, seed=seed, targets=r".*language_model.*_proj")
        for seed, name in enumerate("ab")
    }
    return folder, directory, references | {None: model}


def test_a_poisoned_image_ends_its_own_request_and_its_neighbours_finish_as_if_alone(adapted, monkeypatch):
    """Row 3 of engines.md: one bad image kills the whole engine."""
    folder, directory, _references = adapted
    harness = Harness(folder, adapters=directory)
    engine = harness.engine
    prompts = [harness.chat(picture(seed), QUESTION) for seed in range(5)]
    expected = [run.token_ids for run in harness.run(*prompts, max_tokens=12, salt="undisturbed")]
    break_the_encoder_for(harness.engine, prompts[2].images[0].inputs.digest, monkeypatch)
    answers: dict[str, list[int]] = {str(index): [] for index in range(5)}
    reasons = {}
    for index, prompt in enumerate(prompts):
        harness._runs[str(index)] = type(harness._runs["0"])(prompt)
        engine.add(Request(str(index), prompt.token_ids, GREEDY, prompt.images))
    while engine.has_work:
        for output in engine.step().outputs:
            answers[output.request_id] += output.token_ids
            if output.finish_reason:
                reasons[output.request_id] = output.finish_reason
    assert reasons.pop("2") is FinishReason.ERROR
    assert set(reasons.values()) == {FinishReason.LENGTH}
    assert [answers[name] for name in reasons] == [expected[int(name)] for name in reasons]
    assert engine.stats.kv_blocks_used == 0


def test_an_adapter_that_matches_nothing_keeps_the_engine_from_starting(tmp_path):
    """Row 11 of engines.md: no adapter silently does nothing."""
    make_llava(tmp_path / "base")
    deeper = make_llava(tmp_path / "deeper", num_hidden_layers=3)
    make_adapter(deeper, tmp_path / "adapters" / "neuro", rank=4, seed=0, targets=r".*language_model.*q_proj")
    with pytest.raises(AdapterError, match=r"neuro.*layers\.2\.self_attn\.q_proj matches nothing"):
        Harness(tmp_path / "base", adapters=tmp_path / "adapters")


def test_a_fault_in_the_middle_of_decoding_costs_the_neighbours_nothing(adapted, monkeypatch):
    folder, _, references = adapted
    harness = Harness(folder)
    engine = harness.engine
    decoder = engine.runner.model.decoder
    steps, forward = [], decoder.forward

    def fails_once(*arguments):
        steps.append(1)
        if len(steps) == 4:
            raise MemoryError
        return forward(*arguments)

    monkeypatch.setattr(decoder, "forward", fails_once)
    prompts = [harness.chat(picture(seed), QUESTION) for seed in range(3)]
    for run in harness.run(*prompts, max_tokens=10):
        assert_parity(references[None], run)


@pytest.mark.parametrize("fatal", [torch.AcceleratorError("the device is gone"), KeyboardInterrupt()], ids=repr)
def test_a_device_that_fails_and_an_interrupt_end_their_step_and_are_the_callers(adapted, monkeypatch, fatal):
    harness = Harness(adapted[0])
    engine = harness.engine

    def fails(*_):
        raise fatal

    monkeypatch.setattr(engine.runner.model.decoder, "forward", fails)
    for seed in range(2):
        prompt = harness.chat(picture(seed), QUESTION)
        engine.add(Request(str(seed), prompt.token_ids, GREEDY, prompt.images))
    with pytest.raises(type(fatal)):
        engine.step()
    assert not engine.has_work
    assert engine.stats.kv_blocks_used == 0


def test_a_step_that_fails_behind_the_encoder_leaves_no_image_on_the_device(adapted, monkeypatch):
    harness = Harness(adapted[0])
    engine = harness.engine

    def fails(*_):
        assert engine.runner._embeddings
        raise MemoryError

    monkeypatch.setattr(engine.runner.model.decoder, "forward", fails)
    for seed in range(3):
        prompt = harness.chat(picture(seed), QUESTION)
        engine.add(Request(str(seed), prompt.token_ids, GREEDY, prompt.images))
    while engine.has_work:
        engine.step()
        assert engine.runner._embeddings.keys() == engine.scheduler.images._sizes.keys() == set()


def test_an_interrupted_step_leaves_no_adapter_and_no_image_that_is_not_there(adapted, monkeypatch):
    folder, directory, references = adapted
    harness = Harness(folder, adapters=directory, max_adapters=1)
    engine, runner = harness.engine, harness.engine.runner
    prompt = harness.chat(picture(1), QUESTION)
    harness.run(harness.chat("Hello"), adapters=["a"])

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runner, "_load_adapter", interrupt)
        engine.add(Request("b", prompt.token_ids, GREEDY, prompt.images, adapter=harness.store.get("b").digest))
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert not engine.has_work
    (run,) = harness.run(prompt, adapters=["b"])
    assert_parity(references["b"], run)


def test_the_tensors_on_the_device_are_those_of_the_books(adapted):
    folder, directory, _ = adapted
    harness = Harness(folder, adapters=directory, encoder_cache_tokens=48, max_adapters=1)
    for seed in range(6):
        harness.run(harness.chat(picture(seed), picture(seed + 1), QUESTION), adapters=["ab"[seed % 2]])
        scheduler, runner = harness.engine.scheduler, harness.engine.runner
        assert runner._embeddings.keys() == scheduler.images._sizes.keys()
        slots = {slot for _, linear in runner._linears for slot in linear.adapters}
        assert slots == set(scheduler.adapters._slots.values())


@pytest.mark.parametrize("name", ["mps", "meta", "cuda:99", "gpu", ""])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(ConfigurationError):
        choose_device(name)


def test_float16_is_not_for_a_decoder_that_overflows_in_it(adapted, monkeypatch):
    gpu, llama = torch.device("cuda"), load_family(adapted[0]).decoder_config
    gemma = replace(llama, norm=NormKind.RMS_PLUS_ONE)
    assert choose_dtype("float16", gpu, llama) == torch.float16
    with pytest.raises(ConfigurationError, match="bfloat16 or float32"):
        choose_dtype("float16", gpu, gemma)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert [choose_dtype("auto", gpu, one) for one in (llama, gemma)] == [torch.float16, torch.float32]
