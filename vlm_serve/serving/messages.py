"""What the server and its engine process say to each other: plain messages, one msgpack object each."""

import msgspec

from vlm_serve.config import EngineConfig, ModelConfig
from vlm_serve.lora.store import AdapterFolder
from vlm_serve.types import EngineStats, Request, StepOutput


class Start(msgspec.Struct, frozen=True, tag=True):
    """The first message to the engine process: what to load.

    `folder` is the checkpoint's; `spawned` is the wall clock when the process was started.
    """

    folder: str
    spawned: float
    model: ModelConfig
    engine: EngineConfig
    adapters: tuple[AdapterFolder, ...]


class Add(msgspec.Struct, frozen=True, tag=True):
    request: Request


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Asks for a sign of life from the engine's own loop."""

    number: int


class Phase(msgspec.Struct, frozen=True, tag=True):
    """A phase of the start-up is done."""

    name: str
    seconds: float


class Ready(msgspec.Struct, frozen=True, tag=True):
    max_model_len: int


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


class Step(msgspec.Struct, frozen=True, tag=True):
    output: StepOutput


class Pong(msgspec.Struct, frozen=True, tag=True):
    number: int
    stats: EngineStats


ToEngine = Start | Add | Abort | Ping
FromEngine = Phase | Ready | StartFailed | Admitted | Refused | Step | Pong
