"""`DecodePool`: files to `ClinicalImage`s in worker processes that may be killed. Serves ingest and the CLI.

A file that kills its worker, or takes too long, costs its own request an error; a new worker takes the
place, and nobody else notices.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator

import msgspec
import numpy as np

from vlm_serve import errors
from vlm_serve.clinical.image import ClinicalImage
from vlm_serve.config import MIB, DecodeLimits, IngestConfig
from vlm_serve.errors import ConfigurationError, CorruptImageError, ImageError, ImageLimitError, ServiceError
from vlm_serve.serving.channel import Channel, ChannelClosedError, decode, encode, read_shared, spawn, write_shared
from vlm_serve.serving.decode_worker import Decoded, FromWorker, Job, Ready, Refused
from vlm_serve.types import ImagePart

_START_SECONDS = 60.0
_CLOSED = "The decode pool is closed."
_MAX_ANSWER = 1 * MIB
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class DecodePool:
    """A fixed number of decode workers. `decode` may be called from any thread; callers are served in turn."""

    def __init__(self, config: IngestConfig) -> None:
        if config.workers < 1:
            raise ConfigurationError(f"The decode pool needs at least one worker, not {config.workers}.")
        self._limits = config.limits
        self._size = config.workers
        self._lock = threading.Lock()
        self._workers: set[_Worker] = set()
        self._idle: deque[_Worker] = deque()
        self._queue: deque[_Turn] = deque()
        self._is_started = False
        self._is_closed = False

    def start(self) -> None:
        """Starts the workers and returns at once; they import their decoders meanwhile. Else the first file does."""
        with self._lock:
            if self._is_started or self._is_closed:
                return
            self._is_started = True
            for _ in range(self._size):
                self._idle.append(self._new_worker())

    def decode(self, part: ImagePart) -> ClinicalImage:
        """Decodes one file; blocks until a worker is free and has done it.

        The limit of wall time counts from when the worker gets the file.

        Raises:
            ImageError: the file cannot be used, or went past a limit of memory or time.
            ServiceError: the pool is closed, or no worker starts.
        """
        if len(part.data) > self._limits.max_file_bytes:
            raise ImageLimitError(f"The file is larger than {self._limits.max_file_bytes // MIB} MiB.")
        self.start()
        with self._borrow() as worker:
            return worker.decode(part, self._limits)

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

    def __enter__(self) -> "DecodePool":
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _borrow(self) -> Iterator["_Worker"]:
        """A worker that lives and is ready; a dead one is replaced when it comes back."""
        worker = self._take()
        try:
            if worker.is_spoilt or worker.has_ended:  # killed while idle, by nobody's file
                try:
                    worker = self._replace(worker)
                except OSError:
                    raise ServiceError("A decode worker cannot be started: the system is out of resources.") from None
            worker.wait_ready()
            yield worker
        finally:
            self._give_back(worker)

    def _take(self) -> "_Worker":
        with self._lock:
            if self._is_closed:
                raise ServiceError(_CLOSED)
            if self._idle:  # then nobody waits: a worker goes to the queue first
                return self._idle.popleft()
            turn = _Turn()
            self._queue.append(turn)
        worker = turn.wait()
        if worker is None:
            raise ServiceError(_CLOSED)
        return worker

    def _give_back(self, worker: "_Worker") -> None:
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

    def _replace(self, worker: "_Worker") -> "_Worker":
        worker.kill()
        with self._lock:
            self._workers.discard(worker)
            return worker if self._is_closed else self._new_worker()

    def _new_worker(self) -> "_Worker":
        worker = _Worker()
        self._workers.add(worker)
        return worker


class _Turn:
    """One caller's place in the queue."""

    def __init__(self) -> None:
        self._given = threading.Event()
        self._worker: _Worker | None = None

    def give(self, worker: "_Worker | None") -> None:
        self._worker = worker
        self._given.set()

    def wait(self) -> "_Worker | None":
        self._given.wait()
        return self._worker


class _Worker:
    """One process and this side of its channel. One caller at a time; `kill` from any thread."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = spawn("vlm_serve.serving.decode_worker", theirs, env=_ONE_THREAD)
        self._channel = Channel(ours, max_message=_MAX_ANSWER)
        self._is_ready = False
        self._is_killed = False
        self.is_spoilt = False

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
            message, _ = self._channel.recv(_START_SECONDS)
        except (ChannelClosedError, TimeoutError):
            raise ServiceError("A decode worker did not start. Its standard error says why.") from None
        assert isinstance(decode(message, FromWorker), Ready)
        self._is_ready, self.is_spoilt = True, False

    def decode(self, part: ImagePart, limits: DecodeLimits) -> ClinicalImage:
        """Hands the file over and waits for the answer. The worker is spoilt unless it has answered in time."""
        self.is_spoilt = True
        deadline = time.monotonic() + limits.wall_seconds
        fd = write_shared(part.data)
        try:
            self._channel.send(encode(Job(part.media_type, len(part.data), limits)), [fd])
        except ChannelClosedError:
            raise ServiceError("A decode worker ended before it had a file. Try again.") from None
        finally:
            os.close(fd)
        try:
            message, fds = self._channel.recv(deadline - time.monotonic())
        except TimeoutError:
            raise ImageLimitError(
                f"Decoding the file took longer than {limits.wall_seconds:g} s. Send a smaller or simpler one."
            ) from None
        except ChannelClosedError:
            if self._is_killed:
                raise ServiceError(_CLOSED) from None
            raise self._cause_of_death(limits) from None
        try:
            return self._image(message, fds, limits)
        finally:
            for fd in fds:
                os.close(fd)

    def kill(self) -> None:
        """Ends the process and waits until it is gone."""
        self.is_spoilt = self._is_killed = True
        self._process.kill()
        self._process.wait()
        self._channel.close()

    def _image(self, message: bytes, fds: list[int], limits: DecodeLimits) -> ClinicalImage:
        """The answer, believed as little as a process deserves that has read a hostile file."""
        try:
            answer = decode(message, FromWorker)
        except (msgspec.DecodeError, ValueError):
            raise _implausible() from None
        if isinstance(answer, Refused):
            self.is_spoilt = False
            raise _ERRORS.get(answer.error, CorruptImageError)(answer.message)
        if not isinstance(answer, Decoded) or len(fds) != 1:
            raise _implausible()
        rows, columns = answer.receipt.rows, answer.receipt.columns
        if not (0 < rows <= limits.max_dimension and 0 < columns <= limits.max_dimension):
            raise _implausible()
        pixels = np.empty((rows, columns, 3), np.uint8)
        try:
            read_shared(fds[0], pixels.reshape(-1).data)
        except EOFError:
            raise _implausible() from None
        pixels.flags.writeable = False
        self.is_spoilt = False
        return ClinicalImage(pixels, answer.receipt)

    def _cause_of_death(self, limits: DecodeLimits) -> ImageError:
        code = self._process.wait()
        if code == -signal.SIGXCPU:
            return ImageLimitError(
                f"Decoding the file took more than {limits.cpu_seconds} s of CPU time. Send a smaller or simpler one."
            )
        if code == -signal.SIGKILL:  # the kernel's, when memory runs out; or an operator's
            return ImageLimitError("The process that decoded the file was killed: it may need too much memory.")
        return CorruptImageError("The file made its decoder fail. Check it, or export it again from its source.")


_ERRORS: dict[str, type[ImageError]] = {
    kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ImageError)
}


def _implausible() -> ImageError:
    return CorruptImageError("The file made its decoder answer nonsense. Check it, or export it again.")
