"""The engine's own process: messages in, steps, messages out.

Started as `python -m vlm_serve.serving.engine_process FD`, with one end of a socket pair. It ends when the
other end closes.
"""

import logging
import queue
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from vlm_serve.engine.engine import Engine
from vlm_serve.errors import ConfigurationError, InputError
from vlm_serve.families import load_family
from vlm_serve.serving.channel import Channel, ChannelClosedError, decode, encode
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
    Stepping,
    ToEngine,
)
from vlm_serve.serving.tensors import restore_tensors

logger = logging.getLogger(__name__)

Inbox = queue.SimpleQueue[ToEngine | None]
"""Messages in order; None once the server has closed its end."""


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s engine: %(message)s")
    # A Ctrl-C or a service manager's stop reaches the whole group; it is for the server, which lets running
    # answers end and then closes the channel.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump is a copy of patients' data
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    try:
        serve(channel)
    except ChannelClosedError:  # the server is gone, and with it all who want an answer
        pass
    except Exception as error:  # noqa: BLE001 - its own text may carry what a patient's prompt held
        place = traceback.extract_tb(error.__traceback__)[-1]
        logger.critical("The engine ended: %s at %s:%d", type(error).__name__, place.name, place.lineno)
        sys.exit(1)


def serve(channel: Channel) -> None:
    """Builds the engine that the first message asks for and runs it until the channel closes."""

    def say(message: FromEngine) -> None:
        channel.send(encode(message))

    start = decode(channel.recv()[0], Start)
    say(Phase("engine process, its imports", time.time() - start.spawned))
    try:
        engine = Engine.build(
            load_family(Path(start.folder)),
            start.model,
            start.engine,
            start.adapters,
            on_phase=lambda name, seconds: say(Phase(name, seconds)),
        )
    except ConfigurationError as error:
        say(StartFailed(str(error)))
        return
    say(Ready(engine.max_model_len, engine.dtype))
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_read, args=(channel, inbox), daemon=True).start()
    announcer = _Announcer(say)
    engine.on_batch = announcer.announce
    while True:
        if not _take_messages(engine, inbox, say, announcer):
            return
        if engine.has_work:
            output = engine.step()
            if output.outputs or output.num_tokens:
                say(Step(output))


class _Announcer:
    """Says which requests are in the step that begins, if they are others than in the one before."""

    def __init__(self, say: Callable[[FromEngine], None]) -> None:
        self._say = say
        self._last: tuple[str, ...] = ()

    def announce(self, request_ids: tuple[str, ...]) -> None:
        if request_ids != self._last:
            self._last = request_ids
            self._say(Stepping(request_ids))


def _read(channel: Channel, inbox: Inbox) -> None:
    try:
        while True:
            data, fds = channel.recv()
            message = decode(data, ToEngine)
            if isinstance(message, Add) and message.request.images:
                message = Add(restore_tensors(message.request, message.tensors, *fds))
            inbox.put(message)
    except ChannelClosedError:
        pass
    finally:  # whatever ended this thread, the process must not outlive its last word from the server
        inbox.put(None)


def _take_messages(engine: Engine, inbox: Inbox, say: Callable[[FromEngine], None], announcer: _Announcer) -> bool:
    """Handles what has arrived, waiting for something if the engine is idle; False once the server is gone."""
    while not (engine.has_work and inbox.empty()):
        if not engine.has_work:
            announcer.announce(())
        match inbox.get():
            case None:
                return False
            case Add(request):
                try:
                    engine.add(request)
                    say(Admitted(request.request_id))
                except InputError as error:
                    say(Refused(request.request_id, type(error).__name__, str(error), error.param))
            case Abort(request_id, index):
                engine.abort(request_id, index)
            case Ping(number):
                say(Pong(number, engine.stats))
    return True


if __name__ == "__main__":
    main()
