"""`EngineClient`: the async face of one engine process, from its start to its death. Serves the supervisor."""

import asyncio
import contextlib
import itertools
import os
import queue
import socket
import threading
import time
from collections.abc import Callable

import msgspec

from vlm_serve.errors import ConfigurationError, EngineDeadError
from vlm_serve.serving.channel import Channel, ChannelClosedError, decode, encode, spawn
from vlm_serve.serving.messages import Add, FromEngine, Phase, Ping, Pong, Ready, Start, StartFailed, ToEngine
from vlm_serve.serving.tensors import share_tensors
from vlm_serve.types import EngineStats

OnPhase = Callable[[str, float], None]


class EngineClient:
    """One engine process and this side of its channel.

    All methods run on the event loop that called `start`. A thread reads the channel and another writes it: the tensors
    of many images are megabytes, and the event loop must go on meanwhile.
    """

    def __init__(self, on_message: Callable[[FromEngine], None], on_phase: OnPhase) -> None:
        self._on_message = on_message
        self._on_phase = on_phase
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[Ready] = self._loop.create_future()
        self._pings: dict[int, asyncio.Future[EngineStats]] = {}
        self._ping_numbers = itertools.count()
        self._outbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()
        self.dead = asyncio.Event()
        """Set once the process can say no more and all that it said has been handled."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = spawn("vlm_serve.serving.engine_process", theirs)
        except BaseException:
            ours.close()
            raise
        self._channel = Channel(ours)
        self._threads = [
            threading.Thread(target=work, daemon=True, name=f"engine-{work.__name__.strip('_')}")
            for work in (self._read, self._write)
        ]
        for thread in self._threads:
            thread.start()

    @classmethod
    async def start(
        cls, start: Start, on_message: Callable[[FromEngine], None], on_phase: OnPhase
    ) -> tuple["EngineClient", Ready]:
        """Starts the process and waits until it can serve; returns the client and what the process then says of itself.

        Args:
            on_message: told all that the process says, in order, on the event loop.

        Raises:
            ConfigurationError: the engine refuses its settings, or died while it loaded.
            OSError: the machine has no process or file descriptor left.
        """
        client = cls(on_message, on_phase)
        try:
            client.send(msgspec.structs.replace(start, spawned=time.time()))
            return client, await client._ready
        except BaseException:
            await client.close()
            raise

    def send(self, message: ToEngine) -> None:
        """Sends a message after those before it, and does not wait. To a dead process it goes nowhere: `dead` tells."""
        self._outbox.put(message)

    async def ping(self, seconds: float) -> EngineStats:
        """A round trip through the engine's loop.

        Raises:
            EngineDeadError: it is gone, or did not answer within `seconds`.
        """
        number = next(self._ping_numbers)
        self._pings[number] = self._loop.create_future()
        try:
            self.send(Ping(number))
            if self.dead.is_set():
                raise EngineDeadError("The engine process is gone.")
            return await asyncio.wait_for(self._pings[number], seconds)
        except TimeoutError:
            raise EngineDeadError("The engine does not answer.") from None
        finally:
            del self._pings[number]

    def kill(self) -> None:
        """Ends the process at once, whatever it does; `dead` follows."""
        self._process.kill()

    async def close(self) -> None:
        """Ends the process, which has nothing to save, and waits until all that it held is free."""
        self.kill()
        await asyncio.to_thread(self._process.wait)
        self._outbox.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    def _write(self) -> None:
        """Runs on a thread until the channel closes."""
        try:
            while (message := self._outbox.get()) is not None:
                self._write_one(message)
        except ChannelClosedError:
            pass
        finally:  # a message that cannot be sent must not be waited for
            self._channel.close()

    def _write_one(self, message: ToEngine) -> None:
        if not isinstance(message, Add) or not message.request.images:
            return self._channel.send(encode(message))
        request, tensors, fd = share_tensors(message.request)
        try:
            self._channel.send(encode(Add(request, tensors)), [fd])
        finally:
            os.close(fd)

    def _read(self) -> None:
        """Runs on a thread until the channel closes."""
        try:
            while True:
                message = decode(self._channel.recv()[0], FromEngine)
                if isinstance(message, Phase):
                    self._on_phase(message.name, message.seconds)
                self._loop.call_soon_threadsafe(self._take, message)
        except (ChannelClosedError, OSError):
            pass
        finally:  # whatever ended this thread, nobody may wait for a word that cannot come
            with contextlib.suppress(RuntimeError):  # the event loop has closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._die)

    def _take(self, message: FromEngine) -> None:
        match message:
            case Pong(number, stats):
                if (ping := self._pings.get(number)) and not ping.done():
                    ping.set_result(stats)
            case Ready() if not self._ready.done():
                self._ready.set_result(message)
            case StartFailed(text) if not self._ready.done():
                self._ready.set_exception(ConfigurationError(text))
        self._on_message(message)

    def _die(self) -> None:
        self.dead.set()
        for ping in self._pings.values():
            if not ping.done():
                ping.set_exception(EngineDeadError("The engine process is gone."))
        if not self._ready.done():
            self._ready.set_exception(
                ConfigurationError("The engine process died while it loaded; it may have run out of memory.")
            )
