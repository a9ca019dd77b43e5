"""What `AsyncLLM` gives for each way of asking: several answers, stop strings, log-probabilities, plain prompts,
embeddings, tenants. Everything goes through the real engine process.
"""

import asyncio

import numpy as np
import pytest

from tests.checkpoints import make_llava
from tests.serving.sentencepiece import sentencepiece_like
from tests.serving.test_async_llm import conversation, settings, started, until_idle
from vlm_serve import LLM, SamplingParams, StructuredOutputs
from vlm_serve.config import EngineConfig, ServerConfig
from vlm_serve.errors import InvalidRequestError, ModelNotFoundError, OverloadedError
from vlm_serve.serving.async_llm import AsyncLLM
from vlm_serve.types import FinishReason

pytestmark = pytest.mark.anyio

PROMPT = "The chest radiograph shows"


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def server(served, anyio_backend):
    # A budget that cuts every prompt: there are steps that give nobody a token.
    engine = EngineConfig(max_model_len=512, kv_cache_memory=4 * 2**20, max_num_seqs=4, max_num_batched_tokens=16)
    async with started(settings(served, engine=engine, server=ServerConfig(max_waiting_requests=4))) as llm:
        yield llm


@pytest.fixture
async def llm(server):
    yield server
    await until_idle(server)
    assert server._engine.num_answers == server._in_ingest == 0


def sampling(**changes) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 12, "temperature": 0, "ignore_eos": True} | changes))


async def complete(llm: AsyncLLM, params: SamplingParams, prompt=PROMPT, name: str = "r", **who):
    run = await llm.complete(prompt, model=llm.models[0].id, sampling=params, request_id=name, **who)
    return run, [delta async for delta in run]


def texts(deltas, count: int) -> list[str]:
    return ["".join(delta.text for delta in deltas if delta.index == index) for index in range(count)]


async def test_several_answers_come_in_one_run_each_as_its_own_seed_gives_it(llm):
    alone = [(await complete(llm, sampling(temperature=1, seed=7 + index)))[1] for index in range(3)]
    run, deltas = await complete(llm, sampling(temperature=1, seed=7, n=3))
    assert texts(deltas, 3) == [texts(one, 1)[0] for one in alone]
    assert len(set(texts(deltas, 3))) == 3
    finished = [delta for delta in deltas if delta.finish_reason is not None]
    assert sorted(delta.index for delta in finished) == [0, 1, 2]
    assert deltas[-1].usage.completion_tokens == 36
    assert deltas[-1].usage.prompt_tokens == len(run.prompt_token_ids)


async def test_a_stop_string_in_one_answer_ends_that_one_alone(llm):
    params = {"temperature": 1, "seed": 7, "n": 3, "max_tokens": 60}
    _, free = await complete(llm, sampling(**params))
    whole = texts(free, 3)
    stop = next(whole[1][at : at + 3] for at in range(5, 50) if whole[1][at : at + 3] not in whole[0] + whole[2])
    _, deltas = await complete(llm, sampling(**params, stop=stop))
    assert texts(deltas, 3) == [whole[0], whole[1][: whole[1].find(stop)], whole[2]]
    ends = {delta.index: (delta.finish_reason, delta.stop_reason) for delta in deltas if delta.finish_reason}
    assert ends == {0: (FinishReason.LENGTH, None), 1: (FinishReason.STOP, stop), 2: (FinishReason.LENGTH, None)}
    assert deltas[-1].usage.completion_tokens == sum(len(delta.token_ids) for delta in deltas) < 180


async def test_a_stop_token_is_the_reason_that_is_told(llm):
    _, deltas = await complete(llm, sampling())
    ids = [token for delta in deltas for token in delta.token_ids]
    stop = ids[5]
    _, cut = await complete(llm, sampling(stop_token_ids=[stop]))
    assert [token for delta in cut for token in delta.token_ids] == ids[: ids.index(stop) + 1]
    assert (cut[-1].finish_reason, cut[-1].stop_reason) == (FinishReason.STOP, stop)


async def test_each_token_that_counts_has_its_logprobs_and_the_prompt_its_own(llm):
    _, free = await complete(llm, sampling())
    text = texts(free, 1)[0]
    run, deltas = await complete(llm, sampling(logprobs=3, prompt_logprobs=2, stop=text[8:11]))
    for delta in deltas:
        assert len(delta.logprobs) == len(delta.token_ids)
        assert [entry.token_ids[0] for entry in delta.logprobs] == list(delta.token_ids)
    assert [entry.token_ids[0] for entry in run.prompt_logprobs] == list(run.prompt_token_ids[1:])
    assert b"".join(map(run.token_bytes, run.prompt_token_ids)) == b"<s>" + PROMPT.encode()


async def test_the_seconds_in_the_queue_and_in_the_prefill_come_with_the_first_tokens(llm):
    _, deltas = await complete(llm, sampling())
    assert deltas[0].queue_seconds >= 0
    assert deltas[0].prefill_seconds > 0
    assert all(delta.queue_seconds is delta.prefill_seconds is None for delta in deltas[1:])


async def test_a_plain_prompt_is_the_same_as_text_as_token_ids_and_offline(served, llm):
    _, deltas = await complete(llm, sampling())
    ids = await llm.tokenize(PROMPT, model="chest")
    run, same = await complete(llm, sampling(), prompt=ids)
    assert run.prompt_token_ids == ids
    with LLM(served.folder, dtype="float32", device="cpu", max_model_len=512) as offline:
        (out,) = offline.generate([PROMPT], sampling(), use_tqdm=False)
    assert texts(deltas, 1) == texts(same, 1) == [out.outputs[0].text]


async def test_an_answer_keeps_the_space_of_its_first_word_where_it_goes_on_with_a_text(tmp_path):
    """As transformers shows the whole; an answer that is a new message is as it shows that one alone."""
    make_llava(tmp_path)
    tokenizer = sentencepiece_like()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    clear = tokenizer.token_to_id("▁clear")
    params = sampling(max_tokens=2, allowed_token_ids=[clear])
    said = [{"role": "user", "content": "The lungs"}, {"role": "assistant", "content": "The lungs are"}]
    with LLM(tmp_path, dtype="float32", device="cpu", max_model_len=512) as offline:
        ids = tokenizer.encode("The lungs are").ids
        for prompt in ("The lungs are", {"prompt_token_ids": ids}):
            (out,) = offline.generate(prompt, params, use_tqdm=False)
            assert "The lungs are" + out.outputs[0].text == tokenizer.decode([*ids, clear, clear])
        (out,) = offline.generate("The lungs are", sampling(max_tokens=2, allowed_token_ids=[clear], stop=" clear"))
        assert (out.outputs[0].text, out.outputs[0].stop_reason) == ("", " clear")
        (out,) = offline.chat(said, params, use_tqdm=False)
        assert out.outputs[0].text == tokenizer.decode([clear, clear]) == "clear clear"
        (out,) = offline.chat(said, params, use_tqdm=False, add_generation_prompt=False, continue_final_message=True)
        assert out.outputs[0].text == " clear clear"


async def test_a_structure_that_leaves_no_token_on_the_way_names_its_field(llm):
    doubling = "\n".join(f"t{i}: t{i - 1} t{i - 1}" for i in range(1, 41))
    spec = StructuredOutputs(grammar=f'start: t40\n{doubling}\nt0: "a"')
    with pytest.raises(InvalidRequestError, match="too complex") as refusal:
        await complete(llm, sampling(structured_outputs=spec))
    assert refusal.value.param == "structured_outputs"


async def test_the_texts_of_tokens_are_their_bytes(llm):
    ids = await llm.tokenize("mass é", model="chest")
    texts = await llm.token_texts(ids)
    assert texts[0] == "<s>"
    assert "".join(texts[1:]) == "mass \ufffd\ufffd"


async def test_a_conversation_is_tokenised_as_it_is_sent(llm):
    chat = conversation(image=1)
    ids = await llm.tokenize(chat, model="chest")
    run = await llm.chat(chat, model="chest", sampling=sampling(max_tokens=1), request_id="r")
    assert [delta async for delta in run]
    assert run.prompt_token_ids == ids
    assert await llm.detokenize((await llm.tokenize(PROMPT, model="chest")), model="chest") == "<s>" + PROMPT
    for call in (llm.tokenize(PROMPT, model="cardiology"), llm.detokenize((5,), model="cardiology")):
        with pytest.raises(ModelNotFoundError):
            await call


async def test_a_prompt_has_one_embedding_of_norm_one_whatever_else_runs(llm):
    prompts = [PROMPT, "Is there a mass in the left upper lobe?", PROMPT]
    found = await asyncio.gather(
        *(llm.embed(prompt, model="chest", request_id=f"e{index}") for index, prompt in enumerate(prompts))
    )
    for one, prompt in zip(found, prompts, strict=True):
        assert (one.vector.dtype, one.vector.shape) == (np.float32, (64,))
        assert abs(np.linalg.norm(one.vector) - 1) < 1e-5
        assert one.prompt_tokens == len(await llm.tokenize(prompt, model="chest"))
    assert np.allclose(found[0].vector, found[2].vector, atol=1e-5)
    assert not np.allclose(found[0].vector, found[1].vector, atol=1e-2)


async def test_an_answer_keeps_to_its_choice_and_without_its_bad_words(llm):
    _, deltas = await complete(
        llm, sampling(structured_outputs=StructuredOutputs(choice=["yes", "no"]), ignore_eos=False, temperature=1)
    )
    assert texts(deltas, 1)[0] in ("yes", "no")
    _, free = await complete(llm, sampling(max_tokens=40))
    word = texts(free, 1)[0][3:5]
    _, without = await complete(llm, sampling(max_tokens=40, bad_words=[word]))
    assert texts(without, 1) != texts(free, 1)


async def test_no_tenant_finds_what_another_has_put_in_the_cache(llm):
    """Row 16 of engines.md."""
    prompt = PROMPT * 6
    cached = []
    for name, tenant in enumerate(("a", "a", "b", "", "")):
        _, deltas = await complete(llm, sampling(max_tokens=1), prompt=prompt, name=str(name), tenant=tenant)
        cached.append(deltas[-1].usage.cached_tokens > 0)
    assert cached == [False, True, False, False, True]


async def test_each_answer_counts_against_the_bound(llm):
    """At most 8 here: 4 running and 4 waiting."""
    held = [
        await llm.complete(PROMPT, model="chest", sampling=sampling(max_tokens=300, n=3), request_id=f"h{index}")
        for index in range(2)
    ]
    with pytest.raises(OverloadedError):
        await complete(llm, sampling(n=3))
    await complete(llm, sampling(n=2))
    for run in held:
        await run.aclose()
    await complete(llm, sampling(n=9))  # an idle server takes any number


async def test_what_cannot_be_is_refused_before_the_engine_sees_it(llm):
    bad = StructuredOutputs(regex="(")
    for params in (sampling(structured_outputs=bad), sampling(logit_bias={10**6: 1.0})):
        with pytest.raises(InvalidRequestError):
            await complete(llm, params)


async def test_the_steps_are_told_with_what_they_computed(llm):
    steps = []
    llm.on_step(steps.append)
    run = await llm.chat(conversation(image=77), model="chest", sampling=sampling(), request_id="r")
    assert [delta async for delta in run]
    assert sum(step.num_tokens for step in steps) == len(run.prompt_token_ids) + 11
    assert sum(step.images_encoded for step in steps) == 1
    assert sum(step.encoder_seconds for step in steps) > 0
