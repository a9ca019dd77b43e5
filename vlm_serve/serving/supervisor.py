"""`Supervisor`: an engine process that is started again when it dies, and the requests that outlive it.

A request that has sent nothing to its client is run again. Those that were in the step that the process died in are
suspects: they are tried one at a time, so that the one that ends the process is found and refused, and its neighbours
finish. A process that hangs is killed.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

from vlm_serve import errors
from vlm_serve.errors import (
    ConfigurationError,
    EngineDeadError,
    InvalidRequestError,
    PoisonedRequestError,
    VlmServeError,
)
from vlm_serve.serving.client import EngineClient, OnPhase
from vlm_serve.serving.messages import (
    Abort,
    Add,
    Admitted,
    FromEngine,
    Phase,
    Pong,
    Ready,
    Refused,
    Start,
    Step,
    Stepping,
)
from vlm_serve.serving.submission import OutputStream, Submission
from vlm_serve.types import EngineStats, FinishReason, Request, StepOutput, TokenOutput

logger = logging.getLogger(__name__)

OnStep = Callable[[StepOutput], None]
OnSeconds = Callable[[float], None]

GONE = "The engine has stopped and does not come up again. The operator has to start the server again."
RESTARTING = "The engine has stopped and is being started again. Try again in a moment."
CUT_SHORT = "The engine stopped while it wrote this answer; it is being started again. Send the request again."
CLOSED = "The server is stopping."
POISONED = "The engine stopped twice over this request; it is not run again. Tell your operator."

MAX_DEATHS_ALONE = 2

LOOKS = 10
"""Within `longest_silence`, at a process that may hang."""


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a process is given up, and how often it is started again. Seconds.

    One that has work and says nothing for `longest_silence` hangs; a step of a large model on a CPU may take minutes.
    The first death within `window` is mended at once; each further one after a pause that doubles from `first_pause` to
    `longest_pause`. After `max_failed_starts` in a row that do not come up there is no other; one that cannot even be
    started, because the machine has no process or file descriptor left, is tried again until it can.
    """

    window: float = 600.0
    first_pause: float = 1.0
    longest_pause: float = 30.0
    max_failed_starts: int = 5
    longest_silence: float = 300.0

    def pause(self, deaths: int) -> float:
        """Before the start that follows so many deaths within the window."""
        return 0.0 if deaths < 2 else min(self.longest_pause, self.first_pause * 2.0 ** min(deaths - 2, 16))


class Silence:
    """How long a process that has work has said nothing, in looks at it and not by the clock: time in which the whole
    machine was stopped is not held against it.
    """

    def __init__(self) -> None:
        self._looks = 0
        self._words = -1

    def is_too_long(self, words: int, *, has_work: bool) -> bool:
        """Whether this look is one too many.

        Args:
            words: how many the process has said until now. Those said to it do not count: under load there are always
                some.
        """
        self._looks = self._looks + 1 if has_work and words == self._words else 0
        self._words = words
        return self._looks >= LOOKS


class Supervisor:
    """Keeps one engine process alive and hands each request its own outputs.

    All methods run on the event loop that called `start`.
    """

    _keeper: asyncio.Task[None]
    ready: Ready
    """What the first process said of itself; each further one is started with the same settings."""

    def __init__(self, start: Start, policy: RestartPolicy) -> None:
        self._start = start
        self._policy = policy
        self._client: EngineClient | None = None
        """Of the process that is there and loaded."""
        self._submissions: dict[str, Submission] = {}
        self._stepping: tuple[str, ...] = ()
        self._words = 0
        """How many messages the process has sent."""
        self._on_step: list[OnStep] = []
        self._on_adapters: list[OnSeconds] = []
        self._adapter_loads: list[float] = []
        self._end: str | None = None
        """Why no request is taken any more."""
        self.restarts = 0
        self.stats = EngineStats()

    @classmethod
    async def start(cls, start: Start, on_phase: OnPhase, policy: RestartPolicy | None = None) -> "Supervisor":
        """Starts the process and waits until it can serve.

        Raises:
            ConfigurationError: the engine refuses its settings, or died while it loaded.
        """
        supervisor = cls(start, policy or RestartPolicy())
        client, supervisor.ready = await EngineClient.start(start, supervisor._take, on_phase)
        supervisor._client = client
        supervisor._keeper = asyncio.create_task(supervisor._keep_alive(client))
        return supervisor

    @property
    def is_ready(self) -> bool:
        """Whether a process is there and loaded."""
        return self._client is not None

    @property
    def num_answers(self) -> int:
        """Of the requests that have not ended, each counted as its `n`."""
        return sum(submission.num_answers for submission in self._submissions.values())

    def on_step(self, callback: OnStep) -> None:
        """`callback` is told of every step from now on."""
        self._on_step.append(callback)

    def on_adapters(self, callback: OnSeconds) -> None:
        """`callback` is told the seconds in which each process read and checked the adapters, those of now included."""
        self._on_adapters.append(callback)
        for seconds in self._adapter_loads:
            callback(seconds)

    async def submit(self, request: Request) -> OutputStream:
        """Queues a request; returns once the engine has admitted it. Without an engine it waits for the next.

        Raises:
            InputError: the engine cannot serve the request as it is.
            PoisonedRequestError: it ended the engine process, again.
            EngineDeadError: the engine process is gone for good.
        """
        if self._end is not None:
            raise EngineDeadError(self._end)
        if request.request_id in self._submissions:
            raise InvalidRequestError("A request with this id is running.", param="request_id")
        submission = self._submissions[request.request_id] = Submission(request)
        self._dispatch()
        try:
            await submission.admitted
        except BaseException:
            self._abort(submission)
            raise
        return OutputStream(submission, self._abort)

    async def ping(self, seconds: float) -> EngineStats:
        """A round trip through the engine's loop.

        Raises:
            EngineDeadError: there is no engine now, or it does not answer within `seconds`.
        """
        if self._client is None:
            raise EngineDeadError(self._end or RESTARTING)
        return await self._client.ping(seconds)

    async def close(self) -> None:
        """Ends the process; requests that still run fail."""
        self._give_up(CLOSED)
        self._keeper.cancel()
        await asyncio.wait([self._keeper])

    async def _keep_alive(self, client: EngineClient) -> None:
        """Waits for the process to die and starts the next, for as long as the policy allows."""
        deaths: deque[float] = deque()
        try:
            while True:
                try:
                    await self._until_dead(client)
                    self._mourn()
                finally:
                    self._client = None
                    await _to_its_end(client.close())
                again = await self._start_again(deaths)
                if again is None:
                    return
                client = again
                self.restarts += 1
                self._client = client
                self._dispatch()
        finally:
            self._give_up(GONE)

    async def _until_dead(self, client: EngineClient) -> None:
        """Waits for the process to die; one that hangs is killed."""
        silence = Silence()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(client.dead.wait(), self._policy.longest_silence / LOOKS)
                return
            has_work = any(submission.is_sent for submission in self._submissions.values())
            if silence.is_too_long(self._words, has_work=has_work):
                logger.error("The engine process has work and says nothing. It is killed.")
                client.kill()
                await client.dead.wait()
                return

    async def _start_again(self, deaths: deque[float]) -> EngineClient | None:
        """The next process; None if none comes up any more. `deaths` is when the earlier ones died."""
        for _ in range(self._policy.max_failed_starts):
            now = time.monotonic()
            deaths.append(now)
            while deaths[0] < now - self._policy.window:
                deaths.popleft()
            pause = self._policy.pause(len(deaths))
            logger.error("The engine process has died. It is started again in %g s.", pause)
            await asyncio.sleep(pause)
            with contextlib.suppress(ConfigurationError):
                return await self._started()
            self.restarts += 1  # and it died as it loaded
        logger.error("The engine process does not come up any more.")
        return None

    async def _started(self) -> EngineClient:
        """A process that can serve, once the machine has room for one.

        Raises:
            ConfigurationError: it died while it loaded.
        """
        while True:
            try:
                client, _ = await EngineClient.start(self._start, self._take, lambda name, seconds: None)
                return client
            except OSError as error:
                logger.error("The engine process cannot be started now: %s.", error.strerror)
                await asyncio.sleep(self._policy.longest_pause)

    def _take(self, message: FromEngine) -> None:
        self._words += 1
        match message:
            case Phase(name, seconds) if name.startswith("adapters (") and self._start.adapters:
                self._adapter_loads.append(seconds)
                for told in self._on_adapters:
                    told(seconds)
            case Step(output):
                self.stats = output.stats
                for one in output.outputs:
                    if submission := self._submissions.get(one.request_id):
                        self._put(submission, one)
                for callback in self._on_step:
                    callback(output)
            case Stepping(request_ids):
                self._stepping = request_ids
            case Admitted(request_id):
                if submission := self._submissions.get(request_id):
                    submission.admit()
            case Refused(request_id, error, text, param):
                if submission := self._submissions.get(request_id):
                    self._forget(submission)
                    submission.fail(getattr(errors, error)(text, param=param))
            case Pong(_, stats):
                self.stats = stats

    def _put(self, submission: Submission, output: TokenOutput) -> None:
        if submission.put(output):
            if output.finish_reason is FinishReason.ERROR:  # of several answers, the others go with it
                self._send(Abort(output.request_id))
            self._forget(submission)
        elif submission.is_suspect and submission.has_outlived_its_death:
            submission.is_suspect = False
            self._dispatch()

    def _dispatch(self) -> None:
        """Sends the engine what waits for it; while there are suspects, one of them."""
        if self._client is None:
            return
        waiting = [submission for submission in self._submissions.values() if not submission.is_sent]
        suspects = [submission for submission in self._submissions.values() if submission.is_suspect]
        if suspects:
            # Beside it others may go on that are cleared; suspected again, it runs with nobody.
            is_free = not any(submission.is_sent for submission in suspects)
            is_alone = len(waiting) == len(self._submissions)
            waiting = [suspects[0]] if is_free and (is_alone or suspects[0].deaths == 1) else []
        for submission in waiting:
            assert submission.request is not None
            submission.is_sent = True
            self._send(Add(submission.request))

    def _send(self, message: Add | Abort) -> None:
        if self._client is not None:
            self._client.send(message)

    def _abort(self, submission: Submission, index: int | None = None) -> None:
        """Ends one answer, or all; of a submission that has ended already, nothing."""
        if self._submissions.get(submission.request_id) is not submission:
            return
        submission.unfinished = set() if index is None else submission.unfinished - {index}
        if submission.is_sent:
            self._send(Abort(submission.request_id, index if submission.unfinished else None))
        if not submission.unfinished:
            self._forget(submission)

    def _forget(self, submission: Submission) -> None:
        """It has ended; others may have waited for that."""
        del self._submissions[submission.request_id]
        self._dispatch()

    def _mourn(self) -> None:
        """The process has died: finds the suspects, ends what cannot be run again, and readies the rest."""
        self._client = None
        # It died in its step, or over a message: that of a request that it had not spoken of yet.
        fatal = {
            submission.request_id
            for submission in self._submissions.values()
            if submission.is_sent and not submission.is_heard_of
        }.union(self._stepping)
        on_trial = {one.request_id for one in self._submissions.values() if one.is_suspect and one.request_id in fatal}
        fatal = on_trial or fatal  # the others have been cleared
        self._stepping = ()
        for submission in list(self._submissions.values()):
            error: VlmServeError | None = EngineDeadError(CUT_SHORT) if submission.has_started else None
            if submission.request_id in fatal:
                submission.suspect(alone=len(fatal) == 1)
                if submission.deaths_alone >= MAX_DEATHS_ALONE:
                    error = PoisonedRequestError(POISONED)
            if error is None:
                submission.rewind()
            else:
                del self._submissions[submission.request_id]
                submission.fail(error)
        self.stats = replace(
            self.stats,
            num_requests_running=0,
            num_requests_waiting=len(self._submissions),
            kv_blocks_used=0,
            kv_tokens_live=0,
            kv_tokens_allocated=0,
        )

    def _give_up(self, why: str) -> None:
        """No request is taken any more; those that are there fail. The first reason stands."""
        self._end = self._end or why
        for submission in self._submissions.values():
            submission.fail(EngineDeadError(self._end))
        self._submissions.clear()


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Awaits the work; cancelled meanwhile, it awaits it all the same."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise
