"""`GrammarPool`: what an answer has to match, compiled in a worker process that may be killed. Serves ingest."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock

import msgspec

from vlm_serve.config import GIB
from vlm_serve.errors import InvalidRequestError
from vlm_serve.serving.channel import Channel, decode, encode
from vlm_serve.serving.grammar_worker import Compiled, FromWorker, Job, Refused, Vocabulary
from vlm_serve.serving.worker_pool import Worker, WorkerDiedError, WorkerPool
from vlm_serve.types import StructuredOutputs

WALL_SECONDS = 10.0
CPU_SECONDS = 4
MEMORY_BYTES = 1 * GIB
"""What one grammar may cost. The largest schema that is allowed takes 0.3 s."""

MAX_CACHED = 256

TOO_COMPLEX = "The structured output cannot be used. It is too complex: compiling it takes too much time or memory."


class GrammarPool:
    """One worker, started for the first grammar. What has been compiled once is known, and waits for nobody's.

    Args:
        vocabulary: the model's; asked for when a worker is started.
    """

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        self._pool = WorkerPool(1, lambda: _GrammarWorker(encode(vocabulary())))
        self._lock = Lock()
        self._known: OrderedDict[bytes, str] = OrderedDict()

    def compile(self, spec: StructuredOutputs, allowed_token_ids: Sequence[int] | None = None) -> str:
        """What an answer must match, as llguidance takes it; see `Structures.compile_grammar`. Blocks for as long.

        Raises:
            InvalidRequestError: as there, or it costs too much.
            ServiceError: the pool is closed, or no worker starts.
        """
        allowed = None if allowed_token_ids is None else tuple(allowed_token_ids)
        job = encode(Job(spec, allowed, MEMORY_BYTES, CPU_SECONDS))
        key = hashlib.sha256(job).digest()
        with self._lock:
            if known := self._known.get(key):
                self._known.move_to_end(key)
                return known
        with self._pool.borrow() as worker:
            grammar = worker.compile(job)
        with self._lock:
            self._known[key] = grammar
            if len(self._known) > MAX_CACHED:
                self._known.popitem(last=False)
        return grammar

    def close(self) -> None:
        """Ends the worker; what it was compiling fails."""
        self._pool.close()


class _GrammarWorker(Worker):
    def __init__(self, vocabulary: bytes) -> None:
        super().__init__("vlm_serve.serving.grammar_worker")
        self._vocabulary = vocabulary

    def prepare(self, channel: Channel) -> None:
        channel.send(self._vocabulary)

    def compile(self, job: bytes) -> str:
        """The worker is spoilt unless it has answered in time."""
        try:
            message, _ = self.ask(job, (), WALL_SECONDS)
            answer = decode(message, FromWorker)
        except (TimeoutError, WorkerDiedError, msgspec.DecodeError):
            raise InvalidRequestError(TOO_COMPLEX, param="structured_outputs") from None
        self.is_spoilt = False
        if isinstance(answer, Refused):
            raise InvalidRequestError(answer.message, param="structured_outputs")
        assert isinstance(answer, Compiled)
        return answer.grammar
