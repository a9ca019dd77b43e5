"""`EngineClient`: the async face of the engine process."""

import asyncio
import contextlib
import itertools
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vlm_serve import errors
from vlm_serve.config import EngineConfig, ModelConfig
from vlm_serve.errors import (
    ConfigurationError,
    EngineDeadError,
    InvalidRequestError,
    RequestFailedError,
    VlmServeError,
)
from vlm_serve.lora.store import AdapterFolder
from vlm_serve.serving.channel import Channel, ChannelClosedError, decode, encode, spawn
from vlm_serve.serving.messages import (
    Abort,
    Add,
    Admitted,
    FromEngine,
    Phase,
    Ping,
    Pong,
    Ready,
    Refused,
    Start,
    StartFailed,
    Step,
    ToEngine,
)
from vlm_serve.types import EngineStats, FinishReason, Request, TokenOutput

DEAD = "The engine has stopped. The operator has to start the server again."


_Arrival = TokenOutput | VlmServeError | None
"""What comes for one request: None once it is admitted, then its outputs, or the error that ends it."""


class OutputStream:
    """The outputs of one request, until it ends or is aborted. One reader.

    Iterating raises:
        RequestFailedError: a fault ended the request.
        EngineDeadError: the engine process is gone.
    """

    def __init__(self, client: "EngineClient", request_id: str, inbox: asyncio.Queue[_Arrival]) -> None:
        self._client = client
        self._request_id = request_id
        self._inbox = inbox
        self._has_ended = False

    def __aiter__(self) -> "OutputStream":
        return self

    async def __anext__(self) -> TokenOutput:
        if self._has_ended:
            raise StopAsyncIteration
        arrival = await self._inbox.get()
        assert arrival is not None
        if isinstance(arrival, VlmServeError):
            self.forget()
            raise arrival
        if arrival.finish_reason is not None:
            self.forget()
        if arrival.finish_reason is FinishReason.ERROR:
            raise RequestFailedError(arrival.error or "The request failed.")
        return arrival

    def abort(self) -> None:
        """Ends the request, if it has not ended, and gives back what it holds in the engine."""
        if not self._has_ended:
            self.forget()
            self._client.abort(self._request_id)

    def abort_once(self, sent: asyncio.Future[None]) -> None:
        """Aborts when `sent` is done; that sending it failed has been told to whoever waited."""
        sent.exception()
        self.abort()

    def forget(self) -> None:
        """The request has ended; nothing more comes for it."""
        self._has_ended = True
        self._client.forget(self._request_id)


class EngineClient:
    """Sends requests to one engine process and hands each its own outputs.

    All methods run on the event loop that called `start`; a thread reads the channel.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._process = spawn("vlm_serve.serving.engine_process", theirs)
        theirs.close()
        self._channel = Channel(ours)
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[int] = self._loop.create_future()
        self._queues: dict[str, asyncio.Queue[_Arrival]] = {}
        self._pings: dict[int, asyncio.Future[EngineStats]] = {}
        self._ping_numbers = itertools.count()
        self._is_dead = False
        self.stats = EngineStats()

    @classmethod
    async def start(
        cls,
        folder: Path,
        model: ModelConfig,
        engine: EngineConfig,
        adapters: tuple[AdapterFolder, ...],
        on_phase: Callable[[str, float], None],
    ) -> tuple["EngineClient", int]:
        """Starts the process and waits until it can serve; returns the client and the longest context.

        Raises:
            ConfigurationError: the engine refuses its settings, or died while it loaded.
        """
        client = cls()
        threading.Thread(target=client._read, args=(on_phase,), daemon=True, name="engine-reader").start()
        try:
            with contextlib.suppress(EngineDeadError):  # `_ready` tells it in an operator's words
                client._send(Start(str(folder), time.time(), model, engine, adapters))
            return client, await client._ready
        except BaseException:
            await client.close()
            raise

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._queues)

    async def submit(self, request: Request) -> "OutputStream":
        """Queues a request; returns once the engine has admitted it.

        Raises:
            InputError: the engine cannot serve the request as it is.
            EngineDeadError: the engine process is gone.
        """
        if request.request_id in self._queues:
            raise InvalidRequestError("A request with this id is running.", param="request_id")
        inbox: asyncio.Queue[_Arrival] = asyncio.Queue()
        self._queues[request.request_id] = inbox
        stream = OutputStream(self, request.request_id, inbox)
        # On a thread: the tensors of many images are megabytes, and other streams must go on meanwhile.
        sending = asyncio.ensure_future(asyncio.to_thread(self._send, Add(request)))
        try:
            await asyncio.shield(sending)
            arrival = await inbox.get()
        except BaseException:
            # Not before the request itself is sent: the engine would take the abort for nobody's.
            sending.add_done_callback(stream.abort_once)
            raise
        if isinstance(arrival, VlmServeError):
            stream.forget()
            raise arrival
        return stream

    async def ping(self, seconds: float) -> EngineStats:
        """A round trip through the engine's loop.

        Raises:
            EngineDeadError: it is gone, or did not answer within `seconds`.
        """
        number = next(self._ping_numbers)
        future: asyncio.Future[EngineStats] = self._loop.create_future()
        self._pings[number] = future
        try:
            self._send(Ping(number))
            return await asyncio.wait_for(future, seconds)
        except TimeoutError:
            raise EngineDeadError("The engine does not answer.") from None
        finally:
            self._pings.pop(number, None)

    def abort(self, request_id: str) -> None:
        """Tells the engine to drop a request."""
        with contextlib.suppress(EngineDeadError):
            self._send(Abort(request_id))

    def forget(self, request_id: str) -> None:
        """Takes no more outputs for a request."""
        self._queues.pop(request_id, None)

    async def close(self) -> None:
        """Ends the process; requests that still run fail."""
        self._channel.close()
        try:
            await asyncio.to_thread(self._process.wait, 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    def _send(self, message: ToEngine) -> None:
        if self._is_dead:
            raise EngineDeadError(DEAD)
        try:
            self._channel.send(encode(message))
        except (ChannelClosedError, OSError):
            raise EngineDeadError(DEAD) from None

    def _read(self, on_phase: Callable[[str, float], None]) -> None:
        """Runs on the reader's thread until the channel closes."""
        try:
            while True:
                message = decode(self._channel.recv()[0], FromEngine)
                if isinstance(message, Phase):
                    on_phase(message.name, message.seconds)
                else:
                    self._loop.call_soon_threadsafe(self._take, message)
        except (ChannelClosedError, OSError):
            pass
        finally:  # whatever ended this thread, nobody may wait for a word that cannot come
            with contextlib.suppress(RuntimeError):  # the event loop has closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._die)

    def _take(self, message: FromEngine) -> None:
        match message:
            case Step(output):
                self.stats = output.stats
                for one in output.outputs:
                    if inbox := self._queues.get(one.request_id):
                        inbox.put_nowait(one)
            case Admitted(request_id):
                if inbox := self._queues.get(request_id):
                    inbox.put_nowait(None)
            case Refused(request_id, error, text, param):
                if inbox := self._queues.get(request_id):
                    inbox.put_nowait(getattr(errors, error)(text, param=param))
            case Pong(number, stats):
                self.stats = stats
                if (ping := self._pings.get(number)) and not ping.done():
                    ping.set_result(stats)
            case Ready(max_model_len):
                self._ready.set_result(max_model_len)
            case StartFailed(text):
                self._ready.set_exception(ConfigurationError(text))

    def _die(self) -> None:
        self._is_dead = True
        error = EngineDeadError(DEAD)
        for inbox in self._queues.values():
            inbox.put_nowait(error)
        for ping in self._pings.values():
            if not ping.done():
                ping.set_exception(error)
        if not self._ready.done():
            self._ready.set_exception(
                ConfigurationError("The engine process died while it loaded; it may have run out of memory.")
            )
