"""`AsyncLLM`: a model behind an engine process, as the HTTP server uses it."""

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np

from vlm_serve.config import DecodeLimits, Settings
from vlm_serve.errors import AdapterError, ModelNotFoundError, OverloadedError
from vlm_serve.families import load_family, resolve_model
from vlm_serve.families.base import ModelFamily
from vlm_serve.families.prompt import ToolFormat
from vlm_serve.lora.store import AdapterStore
from vlm_serve.serving.ingest import Ingest, OnImage, PreparedPrompt
from vlm_serve.serving.messages import Start
from vlm_serve.serving.run import Run
from vlm_serve.serving.run import TokenDelta as TokenDelta
from vlm_serve.serving.run import Usage as Usage
from vlm_serve.serving.served_model import ServedModel as ServedModel
from vlm_serve.serving.served_model import served_models
from vlm_serve.serving.submission import OutputStream
from vlm_serve.serving.supervisor import OnSeconds, OnStep, Supervisor
from vlm_serve.serving.token_bytes import TokenBytes
from vlm_serve.types import ChatInput, EngineStats, Request, SamplingParams

OnPhase = Callable[[str, float], None]
Prepare = Callable[[], Awaitable[PreparedPrompt]]

HEALTH_TIMEOUT = 30.0
"""Seconds; a step with a long prefill on a CPU may take several."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """A prompt's embedding, float32 `[hidden_size]` of norm 1."""

    vector: np.ndarray
    prompt_tokens: int


class AsyncLLM:
    """One base model with its adapters. All methods belong to the event loop that called `start`.

    `tenant` is who asks, as the server knows it: no cache entry of one is seen by another, and the scheduler is fair
    between them. A lower `priority` goes first; 0 is routine.

    At most `max_answers` (`max_num_seqs + max_waiting_requests`) are under way at once, those in ingest and those that
    wait for an engine to come back included; a request counts as its `n`. An idle server takes any `n`.
    """

    def __init__(
        self,
        engine: Supervisor,
        ingest: Ingest,
        family: ModelFamily,
        models: tuple[ServedModel, ...],
        max_answers: int,
        adapter_slots: int,
    ) -> None:
        self._engine = engine
        self._ingest = ingest
        self._family = family
        self.max_answers = max_answers
        self._in_ingest = 0
        self._token_bytes = TokenBytes(family.backend_tokenizer)
        self._salt_key = secrets.token_bytes(32)
        self.models = models
        self.adapter_slots = adapter_slots
        """How many adapters are on the device at once."""

    @classmethod
    async def start(
        cls,
        settings: Settings,
        on_phase: OnPhase = lambda name, seconds: None,
        on_progress: Callable[[str], None] = lambda what: None,
    ) -> "AsyncLLM":
        """Loads the model in an engine process of its own and the decode workers beside it.

        Args:
            on_phase: told each phase once it is done, with its seconds.
            on_progress: told what is being done while the embedded model is made, the first time.

        Raises:
            ConfigurationError: says what does not fit and what to do.
        """
        began = time.perf_counter()
        folder = await asyncio.to_thread(resolve_model, settings.model.model, on_progress)
        family = await asyncio.to_thread(load_family, folder)
        await asyncio.to_thread(lambda: family.prompts)  # a tokenizer or template that is no good is told now
        on_phase("model folder, tokenizer", time.perf_counter() - began)
        name = settings.model.served_name
        store = AdapterStore(settings.model.adapters)
        if store.get(name) is not None:
            raise AdapterError(f"An adapter has the base model's own name {name!r}. Rename its folder.")
        began = time.perf_counter()
        ingest = Ingest(family, settings.ingest)
        on_phase(f"decode workers ({settings.ingest.workers})", time.perf_counter() - began)
        try:
            engine = await Supervisor.start(
                Start(str(folder), settings.model, settings.engine, store.adapters), on_phase
            )
        except BaseException:
            await asyncio.to_thread(ingest.close)
            raise
        models = tuple(served_models(name, family, store, engine.ready.max_model_len, engine.ready.dtype))
        limit = settings.engine.max_num_seqs + settings.server.max_waiting_requests
        return cls(engine, ingest, family, models, limit, settings.engine.max_adapters)

    @property
    def stats(self) -> EngineStats:
        """As of the engine's last word; a new engine process counts from zero."""
        return self._engine.stats

    @property
    def is_ready(self) -> bool:
        """Whether the engine process is there and loaded: a request would go to it at once."""
        return self._engine.is_ready

    @property
    def decode_limits(self) -> DecodeLimits:
        """What decoding one file may cost."""
        return self._ingest.limits

    @property
    def tool_format(self) -> ToolFormat | None:
        """How the model writes a call of a function; None: its chat template knows no tools."""
        return self._family.prompts.tool_format

    @property
    def engine_restarts(self) -> int:
        """How often the engine process has been started again."""
        return self._engine.restarts

    def on_step(self, callback: OnStep) -> None:
        """`callback` is told of every step of the engine from now on; it must not block."""
        self._engine.on_step(callback)

    def on_image(self, callback: OnImage) -> None:
        """`callback` is told of every image that is decoded and processed from now on, on a thread of ingest."""
        self._ingest.on_image(callback)

    def on_adapters(self, callback: OnSeconds) -> None:
        """`callback` is told the seconds in which each engine process read and checked the adapters, those of the one
        that is there included.
        """
        self._engine.on_adapters(callback)

    async def chat(
        self,
        chat: ChatInput,
        *,
        model: str,
        sampling: SamplingParams,
        request_id: str,
        tenant: str = "",
        priority: int = 0,
    ) -> Run:
        """Prepares the conversation and queues it; returns once the engine has admitted it.

        While the engine process is being started again, it waits for it.

        Raises:
            ModelNotFoundError: `model` is neither the base nor an adapter.
            ImageError, InvalidRequestError: the input cannot be served.
            OverloadedError: too many requests are under way.
            PoisonedRequestError: it has ended the engine process twice.
            EngineDeadError: the engine process is gone for good.
        """
        served = self._find(model)
        prepare = partial(self._ingest.prepare_async, chat)
        return await self._run(prepare, served, sampling, request_id, tenant, priority)

    async def complete(
        self,
        prompt: str | Sequence[int],
        *,
        model: str,
        sampling: SamplingParams,
        request_id: str,
        tenant: str = "",
        priority: int = 0,
    ) -> Run:
        """Continues a plain prompt, given as text or as token ids; no chat template is applied.

        Raises:
            As `chat` does.
        """
        served = self._find(model)
        prepare = partial(asyncio.to_thread, self._ingest.prepare_text, prompt)
        return await self._run(prepare, served, sampling, request_id, tenant, priority)

    async def embed(
        self, prompt: str | Sequence[int], *, model: str, request_id: str, tenant: str = "", priority: int = 0
    ) -> Embedding:
        """The embedding of a plain prompt; cancelled, it leaves nothing behind.

        Raises:
            As `chat` does, and RequestFailedError: a fault in the engine ended it.
        """
        served = self._find(model)
        prepare = partial(asyncio.to_thread, self._ingest.prepare_text, prompt)
        sampling = SamplingParams(max_tokens=1)
        request, _, outputs = await self._submit(prepare, served, sampling, request_id, tenant, priority, pooling=True)
        try:
            async for output in outputs:
                if output.embedding is not None:
                    return Embedding(output.embedding, len(request.token_ids))
        finally:
            outputs.abort()
        raise AssertionError("a request that pools ends with its embedding")

    async def tokenize(self, prompt: str | ChatInput, *, model: str) -> tuple[int, ...]:
        """The token ids of a plain prompt, or of a conversation as `chat` would send it to the engine.

        Raises:
            As `chat` does, but for the engine's.
        """
        self._find(model)
        with self._room_for(1):
            if isinstance(prompt, str):
                prepared = await asyncio.to_thread(self._ingest.prepare_text, prompt)
            else:
                prepared = await self._ingest.prepare_async(prompt)
        return prepared.prompt.token_ids

    async def detokenize(self, token_ids: Sequence[int], *, model: str) -> str:
        """The text of token ids, special tokens included.

        Raises:
            ModelNotFoundError: `model` is neither the base nor an adapter.
            InvalidRequestError: an id is not of the vocabulary.
        """
        self._find(model)
        return await asyncio.to_thread(self._ingest.decode_text, token_ids)

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """What each token stands for, with U+FFFD for bytes that are no whole character.

        Raises:
            OverloadedError: too many requests are under way.
        """
        with self._room_for(1):
            return await asyncio.to_thread(self._token_bytes.texts, token_ids)

    async def check_health(self) -> None:
        """A round trip through the engine's loop.

        Raises:
            EngineDeadError: it cannot answer: it is being started again, is gone for good, or hangs.
        """
        await self._engine.ping(HEALTH_TIMEOUT)

    async def close(self) -> None:
        """Ends the engine process and the decode workers."""
        await self._engine.close()
        await asyncio.to_thread(self._ingest.close)

    async def _run(
        self,
        prepare: Prepare,
        served: ServedModel,
        sampling: SamplingParams,
        request_id: str,
        tenant: str,
        priority: int,
    ) -> Run:
        request, prepared, outputs = await self._submit(prepare, served, sampling, request_id, tenant, priority)
        return Run(request, served, prepared, outputs, self._token_bytes)

    async def _submit(
        self,
        prepare: Prepare,
        served: ServedModel,
        sampling: SamplingParams,
        request_id: str,
        tenant: str,
        priority: int,
        *,
        pooling: bool = False,
    ) -> tuple[Request, PreparedPrompt, OutputStream]:
        with self._room_for(sampling.n):
            prepared = await prepare()
            request = await self._ingest.request_async(
                prepared,
                sampling,
                request_id=request_id,
                adapter=None if served.parent is None else served.digest,
                cache_salt=self._salt(tenant),
                tenant=tenant,
                priority=priority,
                pooling=pooling,
            )
        # Nothing is awaited between leaving ingest and the engine's count, so the bound is exact.
        return request, prepared, await self._engine.submit(request)

    def _salt(self, tenant: str) -> str:
        """The server's word for a tenant, which nobody outside can guess; "" where there are no tenants."""
        return hmac.new(self._salt_key, tenant.encode(), hashlib.sha256).hexdigest() if tenant else ""

    @contextmanager
    def _room_for(self, answers: int) -> Iterator[None]:
        """Counts answers as under way while their prompt is made.

        Raises:
            OverloadedError: there are too many.
        """
        under_way = self._in_ingest + self._engine.num_answers
        if under_way and under_way + answers > self.max_answers:
            raise OverloadedError("Too many requests are waiting. Try again in a moment.")
        self._in_ingest += answers
        try:
            yield
        finally:
            self._in_ingest -= answers

    def _find(self, name: str) -> ServedModel:
        for model in self.models:
            if model.id == name:
                return model
        raise ModelNotFoundError(
            "There is no model of this name. GET /v1/models lists the base model and its adapters.", param="model"
        )
