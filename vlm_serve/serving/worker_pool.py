"""Processes that may be killed, and the pool that lends them out: for the decoding of files and of grammars.

What a job does to its worker costs that job an error; a new worker takes the place, and nobody else notices.
"""

import contextlib
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from vlm_serve.config import MIB
from vlm_serve.errors import ServiceError
from vlm_serve.serving.channel import Channel, ChannelClosedError, spawn

_START_SECONDS = 60.0
_CLOSED = "The server is stopping."
_MAX_ANSWER = 1 * MIB
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class WorkerDiedError(Exception):
    """A worker ended over its job; `code` is as of `subprocess`, a signal's number negative."""

    def __init__(self, code: int) -> None:
        super().__init__(f"a worker ended with {code}")
        self.code = code

    @property
    def was_killed(self) -> bool:
        """By the kernel when memory ran out, or by an operator."""
        return self.code == -signal.SIGKILL


class Worker:
    """One process and this side of its channel. One caller at a time; `kill` from any thread.

    Args:
        module: run as `python -m module FD`. Its first message, of any content, says that it is ready.
    """

    def __init__(self, module: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = spawn(module, theirs, env=_ONE_THREAD)
        self._channel = Channel(ours, max_message=_MAX_ANSWER)
        self._is_ready = False
        self._is_killed = False
        self.is_spoilt = False
        """Whether another has to take its place: it has a job that it has not answered as it should."""

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait_ready(self) -> None:
        """
        Raises:
            ServiceError: the process did not come up.
        """
        if self._is_ready:
            return
        self.is_spoilt = True
        try:
            self.prepare(self._channel)
            self._channel.recv(_START_SECONDS)
        except (ChannelClosedError, TimeoutError):
            raise ServiceError("A worker process did not start. Its standard error says why.") from None
        self._is_ready, self.is_spoilt = True, False

    def prepare(self, channel: Channel) -> None:
        """Tells the process what it needs for all of its jobs."""

    def ask(self, job: bytes, fds: Sequence[int], seconds: float) -> tuple[bytes, list[int]]:
        """Hands a job over and waits for the answer, which the caller clears of `is_spoilt` once it has believed it.

        Raises:
            ServiceError: the pool is closed, or the worker ended before it had the job.
            TimeoutError: no answer within `seconds`.
            WorkerDiedError: it ended over the job.
        """
        self.is_spoilt = True
        deadline = time.monotonic() + seconds
        try:
            self._channel.send(job, fds)
        except ChannelClosedError:
            raise ServiceError("A worker process ended before it had its job. Try again.") from None
        try:
            return self._channel.recv(deadline - time.monotonic())
        except ChannelClosedError:
            if self._is_killed:
                raise ServiceError(_CLOSED) from None
            raise WorkerDiedError(self._process.wait()) from None

    def kill(self) -> None:
        """Ends the process and waits until it is gone."""
        self.is_spoilt = self._is_killed = True
        self._process.kill()
        self._process.wait()
        self._channel.close()


W = TypeVar("W", bound=Worker)


class WorkerPool(Generic[W]):
    """A fixed number of workers. Any thread may borrow one; callers are served in turn.

    Args:
        size: how many.
        make: starts one, and does not wait for it.
    """

    def __init__(self, size: int, make: Callable[[], W]) -> None:
        self._size = size
        self._make = make
        self._lock = threading.Lock()
        self._workers: set[W] = set()
        self._idle: deque[W] = deque()
        self._queue: deque[_Turn[W]] = deque()
        self._is_started = False
        self._is_closed = False

    def start(self) -> None:
        """Starts the workers and returns at once; they get ready meanwhile. Else the first job does."""
        with self._lock:
            if self._is_started or self._is_closed:
                return
            self._is_started = True
            for _ in range(self._size):
                self._idle.append(self._new_worker())

    def close(self) -> None:
        """Ends the workers, jobs under way included. May be called more than once."""
        with self._lock:
            self._is_closed = True
            workers, queue = list(self._workers), list(self._queue)
            self._workers.clear()
            self._idle.clear()
            self._queue.clear()
        for turn in queue:
            turn.give(None)
        for worker in workers:
            worker.kill()

    @contextlib.contextmanager
    def borrow(self) -> Iterator[W]:
        """A worker that lives and is ready; one that is spoilt is replaced when it comes back.

        Raises:
            ServiceError: the pool is closed, or no worker starts.
        """
        self.start()
        worker = self._take()
        try:
            if worker.is_spoilt or worker.has_ended:  # killed while idle, by nobody's job
                try:
                    worker = self._replace(worker)
                except OSError:
                    raise ServiceError("A worker process cannot be started: the system is out of resources.") from None
            worker.wait_ready()
            yield worker
        finally:
            self._give_back(worker)

    def _take(self) -> W:
        with self._lock:
            if self._is_closed:
                raise ServiceError(_CLOSED)
            if self._idle:  # then nobody waits: a worker goes to the queue first
                return self._idle.popleft()
            turn: _Turn[W] = _Turn()
            self._queue.append(turn)
        worker = turn.wait()
        if worker is None:
            raise ServiceError(_CLOSED)
        return worker

    def _give_back(self, worker: W) -> None:
        if worker.is_spoilt:
            with contextlib.suppress(OSError):  # the next caller tries again
                worker = self._replace(worker)
        with self._lock:
            if self._is_closed:
                return
            # Straight into the hands of who has waited longest: a newcomer cannot be faster.
            if self._queue:
                self._queue.popleft().give(worker)
            else:
                self._idle.append(worker)

    def _replace(self, worker: W) -> W:
        worker.kill()
        with self._lock:
            self._workers.discard(worker)
            return worker if self._is_closed else self._new_worker()

    def _new_worker(self) -> W:
        worker = self._make()
        self._workers.add(worker)
        return worker


class _Turn(Generic[W]):
    """One caller's place in the queue."""

    def __init__(self) -> None:
        self._given = threading.Event()
        self._worker: W | None = None

    def give(self, worker: W | None) -> None:
        self._worker = worker
        self._given.set()

    def wait(self) -> W | None:
        self._given.wait()
        return self._worker
