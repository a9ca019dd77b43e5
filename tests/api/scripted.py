"""An `AsyncLLM` that does what a test tells it: for faults and for a client's timing, which a sound engine
does not show on demand. Everything that an answer's content depends on is tested with the real one.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlm_serve.clinical.image import ImageReceipt, WindowReceipt
from vlm_serve.config import DecodeLimits
from vlm_serve.errors import ModelNotFoundError, RequestFailedError
from vlm_serve.families.prompt import ToolFormat
from vlm_serve.serving.async_llm import Embedding
from vlm_serve.serving.run import TokenDelta, Usage
from vlm_serve.serving.served_model import ServedModel
from vlm_serve.types import ChatInput, EngineStats, FinishReason, SamplingParams, StepOutput, TokenLogprobs

BASE = ServedModel("base", "base", None, "b" * 64, 512, 16, 16, "float32", "The projector is untrained.", 1)
ADAPTER = replace(BASE, id="thorax", parent="base", digest="a" * 64)

HERMES = ToolFormat("<tool_call>\n", "\n</tool_call>", "arguments")

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


def delta(
    text: str,
    count: int,
    finish: FinishReason | None = None,
    tokens: int = 1,
    index: int = 0,
    stop_reason: int | str | None = None,
    **more: Any,
) -> TokenDelta:
    """`count` tokens so far, `tokens` of them new."""
    ids = tuple(range(tokens))
    return TokenDelta(index, text, ids, finish, stop_reason, Usage(7, count, 3), **more)


def hello(n: int) -> list[TokenDelta | Exception]:
    first: list[TokenDelta | Exception] = [delta("Hel", index + 1, index=index) for index in range(n)]
    return first + [delta("lo", n + index + 1, FinishReason.STOP, index=index) for index in range(n)]


@dataclass
class Script:
    """`refuse` is raised by `chat`; `deltas` are given out, an exception among them raised. None are `Hello`, in two
    deltas for each answer.

    `hold_admission` and `hold` keep the request waiting: before it is admitted, or after its deltas.
    """

    deltas: list[TokenDelta | Exception] | None = None
    refuse: Exception | None = None
    hold_admission: bool = False
    hold: bool = False
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class Asked:
    """What the routes gave to one call."""

    request_id: str
    prompt: Any
    sampling: SamplingParams | None
    tenant: str
    priority: int

    @property
    def params(self) -> SamplingParams:
        assert self.sampling is not None
        return self.sampling


class ScriptedRun:
    def __init__(self, llm: "ScriptedLLM", asked: "Asked", model: ServedModel, images: int, script: Script) -> None:
        n = asked.sampling.n if asked.sampling is not None else 1
        self.request_id = asked.request_id
        self.model = model
        self.receipts = (RECEIPT,) * images
        self.image_digests = ("d" * 64,) * images
        self.prompt_token_ids = tuple(range(7))
        self.prompt_tokens = 7
        self.prompt_logprobs = script.prompt_logprobs
        self._llm = llm
        self._script = script
        self._deltas = iter(script.deltas if script.deltas is not None else hello(n))

    def withhold(self) -> None:
        """Nothing is run again here."""

    hidden_ids = frozenset({25})

    @staticmethod
    def token_bytes(token_id: int) -> bytes:
        """Token 7 is the first two bytes of a euro sign, token 8 its last; others are letters."""
        return {7: b"\xe2\x82", 8: b"\xac"}.get(token_id, bytes([ord("a") + token_id % 26]))

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
        self.adapter_slots = 4
        self.decode_limits = DecodeLimits()
        self.max_answers = 256
        self.engine_restarts = 0
        self.steps: list[Callable[[StepOutput], None]] = []
        self.reset()

    def reset(self) -> None:
        self.script = Script()
        self.health: Exception | None = None
        self.is_ready = True
        self.tool_format: ToolFormat | None = None
        self.stats = EngineStats(2, 1, 5, 20, 100, 60, 8, 4, 1, 90, 100, 50, 20)
        self.refuse_after: int | None = None
        """How many requests are let in before one fails."""
        self.hold_texts = False
        self.texts_asked: list[tuple[int, ...]] = []
        self.asked: list[Asked] = []
        self.closed: list[str] = []
        self.waiting = threading.Event()
        self.run_closed = threading.Event()

    def on_step(self, callback: Callable[[StepOutput], None]) -> None:
        self.steps.append(callback)

    def on_image(self, callback: Callable[[float, float], None]) -> None:
        """No image is decoded here."""

    def on_adapters(self, callback: Callable[[float], None]) -> None:
        """No adapter is read here."""

    async def chat(
        self,
        chat: ChatInput,
        *,
        model: str,
        sampling: SamplingParams,
        request_id: str,
        tenant: str = "",
        priority: int = 0,
    ) -> ScriptedRun:
        asked = Asked(request_id, chat, sampling, tenant, priority)
        return await self._admit(asked, model, len(chat.images))

    async def complete(
        self,
        prompt: str | Sequence[int],
        *,
        model: str,
        sampling: SamplingParams,
        request_id: str,
        tenant: str = "",
        priority: int = 0,
    ) -> ScriptedRun:
        return await self._admit(Asked(request_id, prompt, sampling, tenant, priority), model, 0)

    async def _admit(self, asked: Asked, model: str, images: int) -> ScriptedRun:
        script = self.script
        served = self._find(model)
        self.asked.append(asked)
        if script.refuse is not None:
            raise script.refuse
        if self.refuse_after is not None and len(self.asked) > self.refuse_after:
            raise RequestFailedError("It failed.")
        if script.hold_admission:
            try:
                self.waiting.set()
                await asyncio.Event().wait()
            finally:
                self.run_closed.set()
        return ScriptedRun(self, asked, served, images, script)

    async def embed(
        self, prompt: str | Sequence[int], *, model: str, request_id: str, tenant: str = "", priority: int = 0
    ) -> Embedding:
        await self._admit(Asked(request_id, prompt, None, tenant, priority), model, 0)
        return Embedding(np.array([0.6, len(prompt), -0.8], dtype=np.float32), 7)

    async def tokenize(self, prompt: str | ChatInput, *, model: str) -> tuple[int, ...]:
        self._find(model)
        return (1, 2, 3)

    async def detokenize(self, token_ids: Sequence[int], *, model: str) -> str:
        self._find(model)
        return "".join(ScriptedRun.token_bytes(token).decode("utf-8", "replace") for token in token_ids)

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        self.texts_asked.append(tuple(token_ids))
        if self.hold_texts:
            try:
                self.waiting.set()
                await asyncio.Event().wait()
            finally:
                self.run_closed.set()
        return [ScriptedRun.token_bytes(token).decode("utf-8", "replace") for token in token_ids]

    def _find(self, model: str) -> ServedModel:
        served = next((entry for entry in self.models if entry.id == model), None)
        if served is None:
            raise ModelNotFoundError("There is no model of this name.", param="model")
        return served

    async def check_health(self) -> None:
        if self.health is not None:
            raise self.health
