"""The server's face of the engine process: it streams, aborts, refuses, and tells when the engine is dead."""

import asyncio
import base64
import io
import signal
from contextlib import asynccontextmanager

import numpy as np
import pytest
from PIL import Image

from vlm_serve import LLM, SamplingParams
from vlm_serve.config import EngineConfig, IngestConfig, ModelConfig, ServerConfig, Settings
from vlm_serve.errors import (
    AdapterError,
    ConfigurationError,
    ContextLengthError,
    ImageError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
)
from vlm_serve.serving.async_llm import AsyncLLM
from vlm_serve.types import ChatInput, ChatMessage, FinishReason, ImagePart, TextPart

pytestmark = pytest.mark.anyio

LONG = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def conversation(text: str = "Is there a mass?", image: int | None = None) -> ChatInput:
    parts = [] if image is None else [ImagePart(png(image), "image/png")]
    return ChatInput((ChatMessage("user", (*parts, TextPart(text))),))


def settings(served, **changes) -> Settings:
    parts = {
        "model": ModelConfig(str(served.folder), served.adapters, dtype="float32", device="cpu"),
        "engine": EngineConfig(max_model_len=512, kv_cache_memory=4 * 2**20, max_num_seqs=4),
        "ingest": IngestConfig(workers=1),
    }
    return Settings(**(parts | changes))


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def llm(served, anyio_backend):
    llm = await AsyncLLM.start(settings(served))
    yield llm
    await llm.close()


@asynccontextmanager
async def started(settings: Settings):
    """A server of the test's own."""
    llm = await AsyncLLM.start(settings)
    try:
        yield llm
    finally:
        await llm.close()


async def answer(llm: AsyncLLM, chat: ChatInput, sampling: SamplingParams, model: str | None = None, name: str = "r"):
    run = await llm.chat(chat, model=model or llm.models[0].id, sampling=sampling, request_id=name)
    deltas = [delta async for delta in run]
    return run, "".join(delta.text for delta in deltas), deltas


def engine_process(llm: AsyncLLM):
    """The `Popen` of the engine process that is there now."""
    return llm._engine._client._process


async def until(llm: AsyncLLM, *, running: int, waiting: int) -> None:
    """Asks the engine until it holds this many requests."""
    async with asyncio.timeout(180):
        while (llm.stats.num_requests_running, llm.stats.num_requests_waiting) != (running, waiting):
            await llm.check_health()


async def until_idle(llm: AsyncLLM) -> None:
    """Asks the engine until it holds nothing."""
    await llm.check_health()  # what it told last may be older than what was sent
    await until(llm, running=0, waiting=0)
    assert llm.stats.kv_blocks_used == 0


async def test_the_process_answers_as_the_offline_class_does(served, llm):
    wanted = [(None, 1, None), ("chest", 1, None), ("neuro", None, None), (None, None, None), ("chest", 2, None)]
    sampling = SamplingParams(temperature=0, max_tokens=12)
    with LLM(served.folder, dtype="float32", adapters=served.adapters, device="cpu", max_model_len=512) as offline:
        expected = []
        for name, image, _ in wanted:
            url = None if image is None else "data:image/png;base64," + base64.b64encode(png(image)).decode()
            parts = [] if url is None else [{"type": "image_url", "image_url": {"url": url}}]
            content = [*parts, {"type": "text", "text": "Is there a mass?"}]
            (out,) = offline.chat([{"role": "user", "content": content}], sampling, adapter=name, use_tqdm=False)
            expected.append(out.outputs[0].text)

    assert [model.id for model in llm.models] == [served.folder.name, "chest", "neuro"]
    runs = await asyncio.gather(
        *(
            answer(llm, conversation(image=image), sampling, name, str(index))
            for index, (name, image, _) in enumerate(wanted)
        )
    )
    assert [text for _, text, _ in runs] == expected
    for (run, _, deltas), (_, image, _) in zip(runs, wanted, strict=True):
        assert len(run.receipts) == len(run.image_digests) == (image is not None)
        assert deltas[-1].usage.completion_tokens == sum(len(delta.token_ids) for delta in deltas)
        assert all(delta.finish_reason is None for delta in deltas[:-1])


@pytest.mark.parametrize("taken", [0, 1, 5], ids=["before its first token", "after one", "while it decodes"])
async def test_a_client_that_leaves_gives_everything_back(llm, taken):
    run = await llm.chat(conversation(image=1), model="chest", sampling=LONG, request_id="gone")
    for _ in range(taken):
        await anext(run)
    await run.aclose()
    await until_idle(llm)
    await answer(llm, conversation(), SamplingParams(max_tokens=2))


async def test_a_client_that_leaves_while_it_is_queued_or_in_ingest_gives_everything_back(llm):
    runs = [await llm.chat(conversation(), model="chest", sampling=LONG, request_id=str(index)) for index in range(4)]
    in_ingest = asyncio.create_task(llm.chat(conversation(image=3), model="chest", sampling=LONG, request_id="i"))
    await asyncio.sleep(0)
    in_ingest.cancel()
    queued = await llm.chat(conversation(), model="chest", sampling=LONG, request_id="q")
    await until(llm, running=4, waiting=1)
    await queued.aclose()
    for run in runs:
        await run.aclose()
    await until_idle(llm)


async def test_of_a_client_that_left_no_further_image_is_decoded(llm, monkeypatch):
    decoded, has_begun = [], asyncio.Event()
    loop, really_decode = asyncio.get_running_loop(), llm._ingest._pool.decode

    def decode(part: ImagePart):
        decoded.append(part)
        loop.call_soon_threadsafe(has_begun.set)
        return really_decode(part)

    monkeypatch.setattr(llm._ingest._pool, "decode", decode)
    parts = [ImagePart(png(seed), "image/png") for seed in range(40)]
    many = ChatInput((ChatMessage("user", (*parts, TextPart("Compare."))),))
    leaving = asyncio.create_task(llm.chat(many, model="chest", sampling=LONG, request_id="gone"))
    await has_begun.wait()
    leaving.cancel()
    await asyncio.wait([leaving])
    _, _text, _ = await answer(llm, conversation(image=1), SamplingParams(max_tokens=3))
    assert len(decoded) <= 3


async def test_requests_with_images_take_turns(llm, monkeypatch):
    order, really_decode = [], llm._ingest._pool.decode

    def decode(part: ImagePart):
        order.append(part.data)
        return really_decode(part)

    monkeypatch.setattr(llm._ingest._pool, "decode", decode)
    parts = [ImagePart(png(seed), "image/png") for seed in range(20)]
    many = ChatInput((ChatMessage("user", (*parts, TextPart("Compare."))),))
    first = asyncio.create_task(answer(llm, many, SamplingParams(max_tokens=1), name="many"))
    second = asyncio.create_task(answer(llm, conversation(image=99), SamplingParams(max_tokens=1), name="one"))
    await asyncio.gather(first, second)
    assert order.index(png(99)) <= 2


async def test_an_image_that_cannot_be_used_is_named_by_its_place(llm):
    parts = (TextPart("Compare "), ImagePart(png(1), "image/png"), ImagePart(png(1)[:-30], "image/png"))
    chat = ChatInput((ChatMessage("system", (TextPart("You are a radiologist."),)), ChatMessage("user", parts)))
    with pytest.raises(ImageError) as raised:
        await llm.chat(chat, model="chest", sampling=LONG, request_id="bad")
    assert raised.value.param == "messages[1].content[2]"


async def test_after_an_image_that_cannot_be_used_the_others_are_not_decoded(llm, monkeypatch):
    decoded, really_decode = [], llm._ingest._pool.decode

    def decode(part: ImagePart):
        decoded.append(part)
        return really_decode(part)

    monkeypatch.setattr(llm._ingest._pool, "decode", decode)
    parts = [ImagePart(png(seed)[: -30 if seed == 0 else None], "image/png") for seed in range(40)]
    with pytest.raises(ImageError):
        await llm.chat(ChatInput((ChatMessage("user", tuple(parts)),)), model="chest", sampling=LONG, request_id="b")
    await answer(llm, conversation(image=1), SamplingParams(max_tokens=3))
    assert len(decoded) <= 4


async def test_a_stop_string_ends_the_request_in_the_engine_too(llm):
    _, text, _ = await answer(llm, conversation(), LONG)
    stop = text[40:43]
    sampling = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True, stop=stop)
    _, cut, deltas = await answer(llm, conversation(), sampling)
    assert cut == text[: text.find(stop)]
    assert deltas[-1].finish_reason is FinishReason.STOP
    await until_idle(llm)


async def test_what_the_engine_refuses_is_told_before_any_token(llm):
    with pytest.raises(ContextLengthError) as raised:
        await llm.chat(conversation(), model="chest", sampling=SamplingParams(max_tokens=600), request_id="too long")
    assert raised.value.param == "max_tokens"
    with pytest.raises(ModelNotFoundError):
        await llm.chat(conversation(), model="cardiology", sampling=LONG, request_id="no such")
    await until_idle(llm)


async def test_past_the_bound_of_waiting_requests_the_server_says_so(served):
    """Row 17 of engines.md: an unbounded queue."""
    async with started(settings(served, server=ServerConfig(max_waiting_requests=1))) as llm:
        runs = [
            await llm.chat(conversation(), model="chest", sampling=LONG, request_id=str(index)) for index in range(5)
        ]
        with pytest.raises(OverloadedError):
            await llm.chat(conversation(), model="chest", sampling=LONG, request_id="one too many")
        await runs[0].aclose()
        runs[0] = await llm.chat(conversation(), model="chest", sampling=LONG, request_id="now")
        for run in runs:
            await run.aclose()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_to_the_whole_group_leaves_running_answers_alone(llm, number):
    run = await llm.chat(conversation(), model="chest", sampling=LONG, request_id="r")
    await anext(run)
    engine_process(llm).send_signal(number)
    deltas = [delta async for delta in run]
    assert deltas[-1].finish_reason is FinishReason.LENGTH


async def test_an_id_that_is_in_use_is_refused_and_its_owner_goes_on(llm):
    run = await llm.chat(conversation(), model="chest", sampling=LONG, request_id="twice")
    with pytest.raises(InvalidRequestError):
        await llm.chat(conversation(), model="chest", sampling=LONG, request_id="twice")
    assert [delta async for delta in run][-1].finish_reason is FinishReason.LENGTH


async def test_settings_that_do_not_fit_stop_the_start_with_their_remedy(served, tmp_path):
    """Row 19 of engines.md: memory is planned, and not probed by crashing."""
    too_long = settings(served, engine=EngineConfig(max_model_len=4000, kv_cache_memory=2**20))
    with pytest.raises(ConfigurationError, match="--kv-cache-memory"):
        await AsyncLLM.start(too_long)
    adapter = tmp_path / "mine" / "adapter_config.json"
    adapter.parent.mkdir()
    adapter.write_text('{"peft_type": "LORA"}')
    bad = settings(served, model=ModelConfig(str(served.folder), tmp_path, dtype="float32"))
    with pytest.raises(ConfigurationError, match=r"Adapter mine has no adapter_model\.safetensors"):
        await AsyncLLM.start(bad)


async def test_an_adapter_may_not_take_the_base_models_name(served, tmp_path):
    (tmp_path / served.folder.name).symlink_to(served.adapters / "chest")
    clash = settings(served, model=ModelConfig(str(served.folder), tmp_path, dtype="float32"))
    with pytest.raises(AdapterError, match="Rename its folder"):
        await AsyncLLM.start(clash)
