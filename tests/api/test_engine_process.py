"""What HTTP clients see of an engine process that is held or dies where a test wants it: one that leaves, at each stage
of its request, leaves nothing behind; one whose request kills the engine is told.
"""

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from api.app import create_app
from tests.api.running import running
from tests.api.test_served import asking, image_part, png
from tests.serving.orders import HOLD_IN_STEP, HOLD_LATER, KILL_IN_STEP, Orders, eventually, obeyed
from tests.serving.test_async_llm import engine_process
from vlm_serve.config import EngineConfig, IngestConfig, ModelConfig, Settings
from vlm_serve.serving import async_llm
from vlm_serve.serving.async_llm import AsyncLLM

pytestmark = pytest.mark.anyio

CHUNK = 16
"""Tokens of a step: every prompt takes several."""

MAX_TOKENS, LONG = 300, 900
"""Of an answer; the long one does not end before a test has seen it and left."""

LEAVING, NEXT = 1, 2
"""Seeds, by which a step names its requests."""

ABOUT_AN_IMAGE = asking(image_part(png(), "image/png"))


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orders]:
    with obeyed(tmp_path_factory.mktemp("orders")) as orders:
        yield orders


@pytest.fixture(scope="module")
def started(checkpoint: tuple[Path, Path], orders: Orders) -> Iterator[tuple[str, AsyncLLM]]:
    """A server whose engine has one row, for one request at a time."""
    settings = Settings(
        model=ModelConfig(model=str(checkpoint[0]), adapters=checkpoint[1], dtype="float32", device="cpu"),
        engine=EngineConfig(
            max_model_len=1024,
            kv_cache_memory=4 * 1024**2,
            max_num_seqs=1,
            max_num_batched_tokens=CHUNK,
            max_adapters=3,
        ),
        ingest=IngestConfig(workers=1),
    )
    found: list[AsyncLLM] = []

    @contextlib.asynccontextmanager
    async def make_app() -> AsyncIterator[FastAPI]:
        llm = await AsyncLLM.start(settings)
        found.append(llm)
        try:
            yield create_app(llm, settings.server)
        finally:
            await llm.close()

    with running(make_app) as url:
        yield url, found[0]


@dataclass(frozen=True)
class Server:
    llm: AsyncLLM
    http: httpx.AsyncClient
    orders: Orders

    def ask(
        self, seed: int, *, stream: bool, messages: Any = None, max_tokens: int = MAX_TOKENS
    ) -> "asyncio.Task[httpx.Response]":
        """A request on its way; cancelled, its client closes the connection."""
        body = {
            "model": "tiny",
            "messages": messages or asking(text="The chest"),
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "seed": seed,
            "stream": stream,
        }
        return asyncio.create_task(self.http.post("/v1/chat/completions", json=body))

    @property
    def in_engine(self) -> int:
        """Requests that the server has given to its engine and not taken back."""
        return len(self.llm._engine._submissions)

    def steps(self, seed: int) -> int:
        """In how many steps the request has been."""
        return sum(str(seed) in step for step in self.orders.steps)

    async def metrics(self) -> dict[str, float]:
        text = (await self.http.get("/metrics")).text
        return {name: float(value) for name, value in re.findall(r"^vlm_serve:(\w+)\{.*\} (\S+)$", text, re.MULTILINE)}

    async def figures(self) -> tuple[float, float, float]:
        """Running, waiting, and the share of the KV cache in use."""
        found = await self.metrics()
        return found["num_requests_running"], found["num_requests_waiting"], found["kv_cache_usage_perc"]

    async def until(self, reached: Callable[[tuple[float, float, float]], bool]) -> None:
        async with asyncio.timeout(180):
            while not reached(await self.figures()):
                pass


async def leave(client: "asyncio.Task[httpx.Response]") -> None:
    assert not client.done()
    client.cancel()
    await asyncio.wait([client])


def processes() -> list[Path]:
    """The server, its engine and its decode worker."""
    children = (task / "children" for task in Path("/proc/self/task").iterdir())
    return [Path("/proc/self"), *(Path("/proc") / pid for file in children for pid in file.read_text().split())]


def shared_memory() -> int:
    """Pieces of shared memory that a process of the server holds."""
    names = []
    for process in processes():
        for descriptor in (process / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                names.append(os.readlink(descriptor))
    return sum("memfd:vlm-serve" in name for name in names)


@pytest.fixture
async def server(started: tuple[str, AsyncLLM], orders: Orders) -> AsyncIterator[Server]:
    """After the test nothing is left of its requests, and the next one is served."""
    url, llm = started
    before = len(processes())
    orders.forget_steps()
    async with httpx.AsyncClient(base_url=url, timeout=180, trust_env=False) as http:
        server = Server(llm, http, orders)
        yield server
        await eventually(lambda: server.in_engine == llm._in_ingest == 0)
        await server.until(lambda figures: figures == (0, 0, 0))
        assert (await server.ask(NEXT, stream=False, messages=ABOUT_AN_IMAGE, max_tokens=4)).status_code == 200
    await eventually(lambda: shared_memory() == 0)
    assert len(processes()) == before


both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@both
async def test_a_client_that_leaves_while_its_file_is_decoded(server: Server, stream: bool) -> None:
    pool = server.llm._ingest._pool._pool
    (worker,) = pool._workers
    worker._process.send_signal(signal.SIGSTOP)  # as one that is busy for long
    try:
        client = server.ask(LEAVING, stream=stream, messages=ABOUT_AN_IMAGE)
        await eventually(lambda: not pool._idle)
        await leave(client)
        await eventually(lambda: server.llm._in_ingest == 0)  # it does not wait for the file
        assert not pool._idle
    finally:
        worker._process.send_signal(signal.SIGCONT)
    await eventually(lambda: len(pool._idle) == 1)
    assert pool._workers == {worker}
    assert server.steps(LEAVING) == 0


@both
async def test_a_client_that_leaves_the_queue(server: Server, stream: bool) -> None:
    with server.orders.held("later step"):
        first = server.ask(HOLD_LATER, stream=False, max_tokens=LONG)
        await eventually(lambda: server.steps(HOLD_LATER) > 0)
        client = server.ask(LEAVING, stream=stream)
        await eventually(lambda: server.in_engine == 2)
    await server.until(lambda figures: figures[:2] == (1, 1))
    with server.orders.held("later step"):  # so that the first does not make room meanwhile
        await leave(client)
        await eventually(lambda: server.in_engine == 1)
    await leave(first)
    await eventually(lambda: server.in_engine == 0)
    assert server.steps(LEAVING) == 0


@both
async def test_a_client_that_leaves_in_the_prefill(server: Server, stream: bool) -> None:
    with server.orders.held("step"):
        client = server.ask(HOLD_IN_STEP, stream=stream, messages=asking(text="lungs " * 100))
        await eventually(lambda: server.steps(HOLD_IN_STEP) == 1)  # held in the first of its chunks
        await leave(client)
        await eventually(lambda: server.in_engine == 0)
    await server.until(lambda figures: figures[0] == 0)
    assert server.steps(HOLD_IN_STEP) < MAX_TOKENS


@both
async def test_a_client_that_leaves_while_it_is_answered(server: Server, stream: bool) -> None:
    client = server.ask(HOLD_LATER, stream=stream, max_tokens=LONG)
    await eventually(lambda: server.steps(HOLD_LATER) > 40 // CHUNK)  # past its prompt
    with server.orders.held("later step"):
        await leave(client)
        await eventually(lambda: server.in_engine == 0)
    await server.until(lambda figures: figures[0] == 0)
    assert server.steps(HOLD_LATER) < LONG


async def test_an_answer_that_is_not_streamed_outlives_the_engine_and_a_stream_is_told(server: Server) -> None:
    """`n` answers on one row come one after the other: the first has ended when the engine dies."""
    several = {"model": "tiny", "prompt": ["The chest", "The heart"], "n": 2, "max_tokens": 60, "logprobs": 1}
    several |= {"ignore_eos": True, "seed": HOLD_LATER, "temperature": 0.8}
    undisturbed = (await server.http.post("/v1/completions", json=several)).json()
    before = await server.metrics()
    asked = asyncio.create_task(server.http.post("/v1/completions", json=several))
    running = server.llm._engine._submissions
    await eventually(lambda: any(len(one.unfinished) == 1 for one in running.values()))
    with server.orders.held("later step"):
        stream = server.ask(NEXT, stream=True)
        await eventually(lambda: server.in_engine == 3)
        engine_process(server.llm).send_signal(signal.SIGKILL)
        await eventually(lambda: not server.llm.is_ready)
    answer = (await asked).json()
    assert [(choice["text"], choice["logprobs"]) for choice in answer["choices"]] == [
        (choice["text"], choice["logprobs"]) for choice in undisturbed["choices"]
    ]
    assert answer["usage"]["completion_tokens"] == undisturbed["usage"]["completion_tokens"] == 240
    assert (await stream).status_code == 200
    after = await server.metrics()
    told = {name: after[name] - before[name] for name in ("request_success_total", "time_to_first_token_seconds_count")}
    assert told == {"request_success_total": 4 + 1, "time_to_first_token_seconds_count": 2 + 1}


async def test_a_stream_that_has_begun_is_told_that_the_engine_died(server: Server) -> None:
    body = {"model": "tiny", "messages": asking(text="The chest"), "max_tokens": LONG, "ignore_eos": True}
    async with server.http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
        lines = response.aiter_lines()
        async for line in lines:
            if '"content": "' in line.replace('":"', '": "') and '"content":""' not in line:
                break
        engine_process(server.llm).send_signal(signal.SIGKILL)
        rest = [line async for line in lines]
    assert '"code":"engine_unavailable"' in rest[-2] + rest[-1]


async def test_the_figures_are_told_while_the_engine_is_busy(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_llm, "HEALTH_TIMEOUT", 10_000.0)
    with server.orders.held("step"):
        client = server.ask(HOLD_IN_STEP, stream=False, max_tokens=4)
        await eventually(lambda: server.steps(HOLD_IN_STEP) == 1)
        assert "num_requests_running" in await server.metrics()
    assert (await client).status_code == 200


async def test_a_request_that_kills_the_engine_is_refused_and_told_so(server: Server) -> None:
    """Row 25 of engines.md: the server lives, and the next request is answered."""
    before = await server.metrics()
    response = await server.ask(KILL_IN_STEP, stream=False, messages=asking(text="a prompt nobody may see"))
    assert response.status_code == 500
    assert response.json() == {
        "error": {
            "message": "The engine stopped twice over this request; it is not run again. Tell your operator.",
            "type": "server_error",
            "param": None,
            "code": "request_refused",
        }
    }
    assert (await server.ask(NEXT, stream=False, max_tokens=4)).status_code == 200
    after = await server.metrics()
    assert after["engine_restarts_total"] - before["engine_restarts_total"] == 2
    assert after["adapter_load_seconds_count"] - before["adapter_load_seconds_count"] == 2  # by each that was started


async def test_the_figures_of_images_and_adapters_are_those_of_what_was_done(server: Server) -> None:
    before = await server.metrics()
    assert before["adapter_load_seconds_count"] >= 1
    assert before["adapter_load_seconds_sum"] > 0
    two = [image_part(png(), "image/png")] * 2
    assert (await server.ask(NEXT, stream=False, messages=asking(*two), max_tokens=4)).status_code == 200
    after = await server.metrics()
    for name in ("image_decode_seconds", "image_preprocess_seconds"):
        assert after[f"{name}_count"] - before[f"{name}_count"] == 2
        assert after[f"{name}_sum"] > before[f"{name}_sum"]
    text = (await server.http.get("/metrics")).text
    assert re.search(r'^vlm_serve:lora_requests_info\{max_lora="3"', text, re.MULTILINE)  # slots; one adapter is served
