"""`Flight`: requests under way in an engine of this process, and a Ctrl-C that never tears one of its steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from vlm_serve.engine.engine import Engine
from vlm_serve.serving.outputs import Answers, Pooled
from vlm_serve.types import Request


@dataclass(frozen=True, slots=True)
class Running:
    """A request and what becomes of it."""

    request: Request
    answers: Answers | Pooled


class Flight:
    """Requests under way in the engine. Its length is their number."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._running: dict[str, Answers | Pooled] = {}
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._running)

    def add(self, one: Running) -> str:
        """Queues it; returns its id.

        Raises:
            InvalidRequestError: it cannot be served as it is.
        """
        with _interrupts_wait():
            self._engine.add(one.request)
            self._running[one.request.request_id] = one.answers
        return one.request.request_id

    def step(self) -> list[Answers | Pooled]:
        """One step of the engine; the requests that ended with it."""
        if not self._running:
            return []
        ended = []
        with _interrupts_wait():
            outputs = self._engine.step().outputs
            assert outputs or self._engine.has_work, "the engine ended a request without a word"
            for output in outputs:
                answers = self._running[output.request_id]
                before = answers.num_tokens
                answers.add(output, partial(self._engine.abort, output.request_id))
                self.num_tokens += answers.num_tokens - before
                if answers.has_ended:
                    ended.append(self._running.pop(output.request_id))
        return ended

    def abort(self) -> None:
        """Ends what is under way."""
        with _interrupts_wait():
            for request_id in self._running:
                self._engine.abort(request_id)
            self._running.clear()


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """A Ctrl-C in here is raised at the end, so that it never leaves the engine's books half written; a second one
    is raised at once.
    """
    # Only the main thread sees Ctrl-C, and a handler of somebody else's stays as it is.
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came = False

    def note(number: int, frame: Any) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if came:
            raise KeyboardInterrupt
