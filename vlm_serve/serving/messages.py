"""What the server and its engine process say to each other: plain messages, one msgpack object each."""

import msgspec

from vlm_serve.config import EngineConfig, ModelConfig
from vlm_serve.lora.store import AdapterFolder
from vlm_serve.serving.tensors import PlacedTensor
from vlm_serve.types import EngineStats, Request, StepOutput


class Start(msgspec.Struct, frozen=True, tag=True):
    """The first message to the engine process: what to load.

    `folder` is the checkpoint's; `spawned` is the wall clock when the process was started.
    """

    folder: str
    model: ModelConfig
    engine: EngineConfig
    adapters: tuple[AdapterFolder, ...]
    spawned: float = 0.0


class Add(msgspec.Struct, frozen=True, tag=True):
    """A request. The tensors of its images come beside it, in the memory of the file descriptor that is sent along."""

    request: Request
    tensors: tuple[PlacedTensor, ...] = ()


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Ends a request, or of its answers the one of this index."""

    request_id: str
    index: int | None = None


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Asks for a sign of life from the engine's own loop."""

    number: int


class Phase(msgspec.Struct, frozen=True, tag=True):
    """A phase of the start-up is done."""

    name: str
    seconds: float


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine can serve. What was chosen for settings left open: the longest context, and the `dtype` of weights and
    KV cache, as `float32`.
    """

    max_model_len: int
    dtype: str


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start with these settings; `message` is for the operator."""

    message: str


class Admitted(msgspec.Struct, frozen=True, tag=True):
    """A request waits or runs from now on; its outputs follow."""

    request_id: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A request that the engine did not admit. `error` names a class of `errors.py`."""

    request_id: str
    error: str
    message: str
    param: str | None


class Stepping(msgspec.Struct, frozen=True, tag=True):
    """Which requests the steps from now on compute, until the next such word; none while the engine is idle.

    Said before the step begins. What a process has said is read after its death, too: this is how it is known which
    requests were in the step that it died in.
    """

    request_ids: tuple[str, ...]


class Step(msgspec.Struct, frozen=True, tag=True):
    output: StepOutput


class Pong(msgspec.Struct, frozen=True, tag=True):
    number: int
    stats: EngineStats


ToEngine = Start | Add | Abort | Ping
FromEngine = Phase | Ready | StartFailed | Admitted | Refused | Stepping | Step | Pong
