"""An `AsyncLLM` that does what a test tells it: for faults and for a client's timing, which a sound engine
does not show on demand. Everything that an answer's content depends on is tested with the real one.
"""

import asyncio
import threading
from dataclasses import dataclass, field

from vlm_serve.clinical.image import ImageReceipt, WindowReceipt
from vlm_serve.errors import ModelNotFoundError
from vlm_serve.serving.async_llm import ServedModel, TokenDelta, Usage
from vlm_serve.types import ChatInput, EngineStats, FinishReason, SamplingParams

BASE = ServedModel("base", "base", None, "b" * 64, 512, 16, "The projector is untrained.", 1)
ADAPTER = ServedModel("thorax", "base", "base", "a" * 64, 512, 16, "The projector is untrained.", 1)

RECEIPT = ImageReceipt(
    media_type="application/dicom",
    file_sha256="f" * 64,
    pixel_sha256="e" * 64,
    rows=4,
    columns=5,
    decoder="pydicom",
    window=WindowReceipt("file window 1 of 2", 40.0, 400.0),
    attributes={"Modality": "CT"},
)


def delta(text: str, count: int, finish: FinishReason | None = None, tokens: int = 1) -> TokenDelta:
    """`count` tokens so far, `tokens` of them new."""
    return TokenDelta(text, tuple(range(tokens)), finish, Usage(7, count, 3))


@dataclass
class Script:
    """`refuse` is raised by `chat`; `deltas` are given out, an exception among them raised.

    `hold_admission` and `hold` keep the request waiting: before it is admitted, or after its deltas.
    """

    deltas: list[TokenDelta | Exception] = field(
        default_factory=lambda: [delta("Hel", 1), delta("lo", 2, FinishReason.STOP)]
    )
    refuse: Exception | None = None
    hold_admission: bool = False
    hold: bool = False


class ScriptedRun:
    def __init__(self, llm: "ScriptedLLM", request_id: str, model: ServedModel, images: int, script: Script) -> None:
        self.request_id = request_id
        self.model = model
        self.receipts = (RECEIPT,) * images
        self.image_digests = ("d" * 64,) * images
        self.prompt_tokens = 7
        self._llm = llm
        self._script = script
        self._deltas = iter(script.deltas)

    def __aiter__(self) -> "ScriptedRun":
        return self

    async def __anext__(self) -> TokenDelta:
        item = next(self._deltas, None)
        if isinstance(item, Exception):
            raise item
        if item is None:
            if self._script.hold:
                self._llm.waiting.set()
                await asyncio.Event().wait()
            raise StopAsyncIteration
        return item

    async def aclose(self) -> None:
        self._llm.closed.append(self.request_id)
        self._llm.run_closed.set()


class ScriptedLLM:
    def __init__(self) -> None:
        self.models = (BASE, ADAPTER)
        self.reset()

    def reset(self) -> None:
        self.script = Script()
        self.health: Exception | None = None
        self.stats = EngineStats(2, 1, 5, 20, 100, 60, 8, 4, 1)
        self.asked: list[tuple[str, ChatInput, SamplingParams]] = []
        self.closed: list[str] = []
        self.waiting = threading.Event()
        self.run_closed = threading.Event()

    async def chat(self, chat: ChatInput, *, model: str, sampling: SamplingParams, request_id: str) -> ScriptedRun:
        script = self.script
        served = next((entry for entry in self.models if entry.id == model), None)
        if served is None:
            raise ModelNotFoundError("There is no model of this name.", param="model")
        self.asked.append((request_id, chat, sampling))
        if script.refuse is not None:
            raise script.refuse
        if script.hold_admission:
            try:
                self.waiting.set()
                await asyncio.Event().wait()
            finally:
                self.run_closed.set()
        return ScriptedRun(self, request_id, served, len(chat.images), script)

    async def check_health(self) -> None:
        if self.health is not None:
            raise self.health
