"""The offline class answers as transformers does, in vLLM's shapes."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.checkpoints import make_tokenizer
from vlm_serve import LLM, SamplingParams
from vlm_serve.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError

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
