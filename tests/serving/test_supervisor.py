"""The engine process dies, and the server lives: requests that had sent nothing finish, the others are told, the
one that kills it is found. Row 25 of engines.md: the engine process dies, the server dies.
"""

import asyncio
import contextlib
import logging
import os
import resource
import signal
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import replace

import pytest

from tests.serving.orders import (
    FAULT_IN_STEP,
    HOLD_IN_STEP,
    HOLD_LATER,
    KILL_IN_STEP,
    KILL_TOGETHER,
    KILL_WHEN_ADDED,
    KILL_WITH_IT,
    Orders,
    eventually,
    obeyed,
    resources,
)
from tests.serving.test_async_llm import conversation, engine_process, settings, started, until, until_idle
from vlm_serve import SamplingParams
from vlm_serve.config import EngineConfig, ServerConfig
from vlm_serve.errors import (
    ConfigurationError,
    EngineDeadError,
    OverloadedError,
    PoisonedRequestError,
    RequestFailedError,
)
from vlm_serve.serving.async_llm import AsyncLLM
from vlm_serve.serving.supervisor import LOOKS, RestartPolicy, Silence
from vlm_serve.types import FinishReason

pytestmark = pytest.mark.anyio

AT_ONCE = RestartPolicy(first_pause=0.0)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def orders(tmp_path_factory) -> Orders:
    with obeyed(tmp_path_factory.mktemp("orders")) as orders:
        yield orders


@pytest.fixture(scope="module")
async def server(served, orders, anyio_backend):
    async with started(
        settings(
            served,
            engine=EngineConfig(max_model_len=512, kv_cache_memory=4 * 2**20, max_num_seqs=4),
            server=ServerConfig(max_waiting_requests=4),
        )
    ) as llm:
        llm._engine._policy = AT_ONCE
        yield llm


@pytest.fixture
async def llm(server, orders):
    await eventually(lambda: server.is_ready)
    orders.forget_steps()
    yield server
    await eventually(lambda: server.is_ready)
    await until_idle(server)
    assert server._engine.num_answers == server._in_ingest == 0


def greedy(seed: int = 1, tokens: int = 12) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, seed=seed)


async def ask(llm: AsyncLLM, seed: int = 1, tokens: int = 12, image: int | None = None) -> str:
    """The whole answer, to a question of its own for each seed; nothing of it is used before its end."""
    run = await llm.chat(
        conversation(f"Question {seed}", image), model="chest", sampling=greedy(seed, tokens), request_id=f"{seed}"
    )
    run.withhold()
    deltas = []
    async with aclosing(run):
        async for delta in run:
            deltas = [delta] if delta.starts_over else [*deltas, delta]
    assert [delta.usage.completion_tokens for delta in deltas] == list(range(1, tokens + 1))
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    return "".join(delta.text for delta in deltas)


async def stream(llm: AsyncLLM, seed: int):
    """An answer of which a token has been read."""
    run = await llm.chat(conversation(), model="chest", sampling=greedy(seed, 400), request_id=f"stream {seed}")
    await anext(run)
    return run


def is_stepping(llm: AsyncLLM, *seeds: int):
    return lambda: set(llm._engine._stepping) >= {str(seed) for seed in seeds}


def have_tokens(llm: AsyncLLM, *seeds: int):
    """Whether some of each have come; their readers take them at once."""
    running = llm._engine._submissions
    return lambda: all(str(seed) in running and running[str(seed)]._num_tokens > 3 for seed in seeds)


async def unless_it_dies_again(llm: AsyncLLM, deaths: int, work):
    """The result of the work, in which the engine process may die so many times and no more."""
    allowed, task = llm.engine_restarts + deaths, asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=0.05)
            assert llm.engine_restarts <= allowed
        return task.result()
    finally:
        task.cancel()


async def drain(run) -> None:
    async for _ in run:
        pass


def kill(llm: AsyncLLM) -> None:
    engine_process(llm).send_signal(signal.SIGKILL)


async def test_killed_under_load_it_is_back_and_only_streams_that_had_begun_are_cut(llm, orders):
    undisturbed = [await ask(llm, seed, image=seed) for seed in (1, 2, 3)]
    restarts = llm.engine_restarts
    streams = [await stream(llm, seed) for seed in range(11, 15)]  # all rows of the batch
    queued = [asyncio.create_task(ask(llm, seed, image=seed)) for seed in (1, 2)]
    await until(llm, running=4, waiting=2)
    in_ingest = asyncio.create_task(ask(llm, 3, image=3))
    await asyncio.sleep(0)
    with orders.held("loading"):
        kill(llm)
        await eventually(lambda: not llm.is_ready)
        assert set(llm._engine._submissions) <= {"1", "2", "3"}  # the streams have ended, and are not run again
        for run in streams:
            with pytest.raises(EngineDeadError, match="while it wrote this answer"):
                await drain(run)
        assert llm.stats.num_requests_running == llm.stats.kv_blocks_used == 0
        with pytest.raises(EngineDeadError, match="being started again"):
            await llm.check_health()
    assert [await task for task in (*queued, in_ingest)] == undisturbed
    assert llm.is_ready
    await llm.check_health()
    assert llm.engine_restarts == restarts + 1


async def test_an_answer_of_which_nothing_was_sent_is_made_again_however_much_was_read(llm, orders):
    seeds = (HOLD_LATER, 24)
    undisturbed = [await ask(llm, seed, tokens=200, image=1) for seed in seeds]
    restarts = llm.engine_restarts
    asked = [asyncio.create_task(ask(llm, seed, tokens=200, image=1)) for seed in seeds]
    await eventually(have_tokens(llm, *seeds))
    with orders.held("later step"):  # neither ends first
        kill(llm)
        await eventually(lambda: not llm.is_ready)
    assert [await task for task in asked] == undisturbed
    assert llm.engine_restarts == restarts + 1


async def test_a_suspect_that_gets_further_than_it_had_lets_the_others_go_on(llm, orders):
    suspect, late, seen = HOLD_LATER, 25, []

    def look(_):
        running = llm._engine._submissions
        if {str(suspect), str(late)} <= running.keys():
            seen.append((running[str(suspect)]._num_tokens, running[str(late)].is_sent))

    first = asyncio.create_task(ask(llm, suspect, tokens=200))
    await eventually(have_tokens(llm, suspect))
    with orders.held("later step"):
        kill(llm)
        await eventually(lambda: not llm.is_ready)
        reached = llm._engine._submissions[str(suspect)]._num_tokens_at_death
        second = asyncio.create_task(ask(llm, late))
        await eventually(lambda: str(late) in llm._engine._submissions)
        llm.on_step(look)
    await asyncio.gather(first, second)
    llm._engine._on_step.remove(look)
    assert seen
    assert all(is_sent == (tokens > reached) for tokens, is_sent in seen)


async def test_two_that_end_the_engine_only_together_both_finish(llm, orders):
    seeds = (KILL_TOGETHER, KILL_WITH_IT)
    undisturbed = [await ask(llm, seed, tokens=100) for seed in seeds]
    restarts = llm.engine_restarts
    async with one_step_for_all(llm, orders):
        asked = [asyncio.create_task(unless_it_dies_again(llm, 2, ask(llm, seed, tokens=100))) for seed in seeds]
        await eventually(lambda: len(llm._engine._submissions) == 3)
    assert [await task for task in asked] == undisturbed
    assert llm.engine_restarts > restarts


@asynccontextmanager
async def one_step_for_all(llm: AsyncLLM, orders: Orders):
    """What is asked inside comes to the engine during a step of another request: the next has all of it."""
    with orders.held("step"):
        before = asyncio.create_task(ask(llm, HOLD_IN_STEP, tokens=1))
        await eventually(is_stepping(llm, HOLD_IN_STEP))
        yield
    await before


async def test_of_those_in_the_step_that_it_died_in_one_at_a_time_is_tried(llm, orders):
    seeds = (HOLD_LATER, 21, 22)
    undisturbed = [await ask(llm, seed) for seed in seeds]
    with orders.held("later step"):
        async with one_step_for_all(llm, orders):
            asked = [asyncio.create_task(ask(llm, seed)) for seed in seeds]
            await eventually(lambda: len(llm._engine._submissions) == 4)
        await eventually(is_stepping(llm, *seeds))
        late = asyncio.create_task(ask(llm, 23))
        kill(llm)
        await eventually(lambda: not llm.is_ready)
        orders.forget_steps()
    assert [await task for task in asked] == undisturbed
    await late
    tried = []
    for step in orders.steps:
        new = set(step) - set(tried)
        assert len(new) <= 1
        tried += new
    assert tried == [*map(str, seeds), "23"]


async def test_a_request_that_kills_the_engine_is_found_and_refused_and_its_neighbours_finish(llm, orders):
    undisturbed = [await ask(llm, seed) for seed in (31, 32, 33)]
    restarts = llm.engine_restarts
    async with one_step_for_all(llm, orders):
        first = asyncio.create_task(ask(llm, 31))
        poisoned = asyncio.create_task(unless_it_dies_again(llm, 3, ask(llm, KILL_IN_STEP)))
        second = asyncio.create_task(ask(llm, 32))
        await eventually(lambda: len(llm._engine._submissions) == 4)
    await eventually(lambda: llm.engine_restarts > restarts)
    late = asyncio.create_task(ask(llm, 33))
    with pytest.raises(PoisonedRequestError):
        await poisoned
    assert [await task for task in (first, second, late)] == undisturbed
    assert llm.engine_restarts == restarts + 3  # with its neighbours, and twice alone


async def test_a_request_that_kills_the_engine_before_any_step_is_found_among_streams(llm):
    run = await stream(llm, 41)
    with pytest.raises(PoisonedRequestError):
        await unless_it_dies_again(llm, 3, ask(llm, KILL_WHEN_ADDED))
    with pytest.raises(EngineDeadError):
        await drain(run)
    await ask(llm, 42)


async def test_a_request_that_kills_the_engine_before_any_step_is_found_beside_one_that_runs(llm):
    undisturbed = await ask(llm, 44, tokens=200)
    running = asyncio.create_task(ask(llm, 44, tokens=200))
    await eventually(have_tokens(llm, 44))
    with pytest.raises(PoisonedRequestError):
        await unless_it_dies_again(llm, 3, ask(llm, KILL_WHEN_ADDED))
    assert await running == undisturbed


async def test_an_idle_engine_suspects_whom_it_dies_over_and_not_whom_it_has_served(llm):
    await ask(llm, 43)
    restarts = llm.engine_restarts
    with pytest.raises(PoisonedRequestError):
        await unless_it_dies_again(llm, 2, ask(llm, KILL_WHEN_ADDED))
    await eventually(lambda: llm.is_ready)  # the refusal comes before the last start is done
    assert llm.engine_restarts == restarts + 2


async def test_a_fault_in_a_step_ends_its_request_and_not_the_process(llm):
    restarts = llm.engine_restarts
    with pytest.raises(RequestFailedError):
        await ask(llm, FAULT_IN_STEP)
    assert llm.engine_restarts == restarts


async def test_new_requests_wait_for_the_next_engine_and_only_so_many(llm, orders):
    undisturbed = await ask(llm, 51)
    with orders.held("loading"):
        kill(llm)
        await eventually(lambda: not llm.is_ready)
        waiting = [asyncio.create_task(ask(llm, 50 + number)) for number in range(1, 9)]
        await eventually(lambda: len(llm._engine._submissions) == 8)
        with pytest.raises(OverloadedError):
            await ask(llm, 59)
        waiting[1].cancel()  # a client that leaves meanwhile
        await asyncio.wait([waiting[1]])
        assert len(llm._engine._submissions) == 7
        waiting[1] = asyncio.create_task(ask(llm, 59))
        assert not any(task.done() for task in waiting)
    answers = await asyncio.gather(*waiting)
    assert answers[0] == undisturbed
    assert "52" not in {seed for step in orders.steps for seed in step}


async def test_a_client_that_leaves_in_its_prefill_gives_everything_back(llm, orders):
    with orders.held("step"):
        leaving = asyncio.create_task(ask(llm, HOLD_IN_STEP, image=1))
        await eventually(is_stepping(llm, HOLD_IN_STEP))
        leaving.cancel()
        await asyncio.wait([leaving])
        assert llm._engine.num_answers == 0
    await until_idle(llm)


async def test_an_engine_that_dies_while_it_loads_is_started_again(llm, orders):
    restarts = llm.engine_restarts
    orders.die_while_loading(2)
    kill(llm)
    await eventually(lambda: not llm.is_ready)
    await ask(llm, 61)
    assert llm.engine_restarts == restarts + 3  # those that died while they loaded are told, too


@contextmanager
def no_descriptors(but: int):
    """This process can open so many more and no others."""
    limits, held = resource.getrlimit(resource.RLIMIT_NOFILE), []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 10, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(0))
        for _ in range(but):
            os.close(held.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in held:
            os.close(descriptor)


@pytest.mark.parametrize("left", [0, 3], ids=["none", "enough for a channel and no process"])
async def test_an_engine_that_the_machine_has_no_descriptor_for_is_started_once_it_has(llm, left, monkeypatch, caplog):
    await ask(llm, 62)
    before, restarts = resources(), llm.engine_restarts
    monkeypatch.setattr(llm._engine, "_policy", RestartPolicy(first_pause=0.0, longest_pause=0.0, max_failed_starts=1))
    with caplog.at_level(logging.ERROR), no_descriptors(but=left):
        kill(llm)
        refused = "cannot be started now: Too many open files"
        await eventually(lambda: llm._engine._end or caplog.text.count(refused) > 2)
    await ask(llm, 62)
    assert llm.engine_restarts == restarts + 1
    assert resources() == before


async def test_an_engine_that_is_killed_when_idle_suspects_nobody(llm, orders):
    await ask(llm, 71)
    await until_idle(llm)
    kill(llm)
    await eventually(lambda: not llm.is_ready)
    orders.forget_steps()
    await asyncio.gather(*(ask(llm, seed) for seed in (71, 72, 73)))
    assert max(len(step) for step in orders.steps) > 1


async def test_an_engine_that_hangs_is_killed_and_its_requests_are_run_again(llm, orders):
    undisturbed, restarts = await ask(llm, HOLD_IN_STEP), llm.engine_restarts
    with orders.held("step"):
        with orders.held("loading"):
            kill(llm)
            await eventually(lambda: not llm.is_ready)
            asked = asyncio.create_task(ask(llm, HOLD_IN_STEP))
            llm._engine._policy = replace(AT_ONCE, longest_silence=0.5)  # for the process that comes now
        await eventually(lambda: llm.engine_restarts == restarts + 1 and not llm.is_ready)
        llm._engine._policy = AT_ONCE
    assert await asked == undisturbed
    assert llm.engine_restarts == restarts + 2


def test_a_process_hangs_if_it_has_work_and_says_nothing_for_as_many_looks():
    def looks_until_it_hangs(silence: Silence, words: int, *, has_work: bool) -> int | None:
        return next((look for look in range(1, 99) if silence.is_too_long(words, has_work=has_work)), None)

    silence = Silence()
    assert looks_until_it_hangs(silence, 7, has_work=False) is None
    assert looks_until_it_hangs(silence, 7, has_work=True) == LOOKS
    assert not silence.is_too_long(8, has_work=True)  # a word
    assert looks_until_it_hangs(silence, 8, has_work=True) == LOOKS
    assert not any(silence.is_too_long(words, has_work=True) for words in range(9, 99))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_message_that_cannot_be_sent_is_waited_for_by_nobody(llm):
    """The engine process is replaced, and whoever waits for its answer is told."""
    restarts = llm.engine_restarts
    llm._engine._client.send(object())
    with pytest.raises(EngineDeadError, match="is gone"):
        await llm.check_health()
    await ask(llm, 82)
    assert llm.engine_restarts == restarts + 1


async def test_an_engine_process_that_cannot_read_its_channel_is_replaced(llm):
    restarts = llm.engine_restarts
    llm._engine._client._channel.send(b"no message of ours")
    await eventually(lambda: llm.engine_restarts > restarts)
    await ask(llm, 81)


async def test_deaths_leave_no_process_no_descriptor_and_no_shared_memory(llm):
    await ask(llm, 91, image=1)
    before = resources()
    for _ in range(2):
        restarts = llm.engine_restarts
        run = await stream(llm, 92)
        kill(llm)
        await eventually(lambda expected=restarts + 1: llm.engine_restarts == expected)
        await run.aclose()
        await ask(llm, 91, image=1)
    assert resources() == before


async def test_an_engine_that_does_not_come_up_any_more_is_given_up_and_everyone_told(served, orders):
    async with started(settings(served)) as llm:
        llm._engine._policy = RestartPolicy(first_pause=0.0, max_failed_starts=2)
        orders.die_while_loading(2)
        kill(llm)
        await eventually(lambda: not llm.is_ready)
        with pytest.raises(EngineDeadError, match="does not come up"):
            await ask(llm, 1)
        for call in (llm.check_health(), ask(llm, 2)):
            with pytest.raises(EngineDeadError, match="does not come up"):
                await call
        assert not llm.is_ready


async def test_an_engine_that_dies_in_its_first_start_stops_the_server_and_leaves_nothing(served, orders):
    before = resources()
    orders.die_while_loading(1)
    with pytest.raises(ConfigurationError, match="died while it loaded"):
        await AsyncLLM.start(settings(served))
    assert resources() == before


async def test_a_server_that_closes_leaves_nothing(served):
    before = resources()
    async with started(settings(served)) as llm:
        run = await stream(llm, 1)
        process = engine_process(llm)
    with pytest.raises(EngineDeadError, match="stopping"):
        await drain(run)
    assert process.returncode is not None
    assert resources() == before


def test_the_pauses_between_starts_grow_to_a_bound():
    policy = RestartPolicy(first_pause=1.0, longest_pause=30.0)
    assert [policy.pause(deaths) for deaths in (1, 2, 3, 4, 7, 1000)] == [0, 1, 2, 4, 30, 30]
