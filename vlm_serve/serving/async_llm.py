"""`AsyncLLM`: a model behind an engine process, as the HTTP server uses it."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_serve.clinical.image import ImageReceipt
from vlm_serve.config import Settings
from vlm_serve.errors import AdapterError, ModelNotFoundError, OverloadedError
from vlm_serve.families import load_family, resolve_model
from vlm_serve.families.base import ModelFamily
from vlm_serve.lora.store import AdapterStore
from vlm_serve.serving.client import EngineClient, OutputStream
from vlm_serve.serving.detokenizer import Detokenizer
from vlm_serve.serving.ingest import Ingest
from vlm_serve.types import ChatInput, EngineStats, FinishReason, Request, SamplingParams

OnPhase = Callable[[str, float], None]

HEALTH_TIMEOUT = 30.0
"""Seconds; a step with a long prefill on a CPU may take several."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What `model` may name: the base model, or an adapter on it (`parent` is then the base).

    `notice` is what every answer about an image must say of the model itself.
    """

    id: str
    root: str
    parent: str | None
    digest: str
    max_model_len: int
    max_tokens_per_image: int
    notice: str | None
    created: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens so far. `cached_tokens` of the prompt were found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """What one step adds to an answer; `usage` is the running total."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    usage: Usage


class ChatRun:
    """One answer under way: what is known before its first token, then the deltas as they come. One reader.

    Iterating raises what `OutputStream` raises.
    """

    def __init__(
        self,
        request: Request,
        model: ServedModel,
        receipts: tuple[ImageReceipt, ...],
        outputs: OutputStream,
        detokenizer: Detokenizer,
    ) -> None:
        self.request_id = request.request_id
        self.model = model
        self.receipts = receipts
        self.image_digests = tuple(span.inputs.digest for span in request.images)
        self.prompt_tokens = len(request.token_ids)
        self._outputs = outputs
        self._detokenizer = detokenizer
        self._completion_tokens = 0
        self._has_ended = False

    def __aiter__(self) -> "ChatRun":
        return self

    async def __anext__(self) -> TokenDelta:
        if self._has_ended:
            raise StopAsyncIteration
        output = await anext(self._outputs)
        delta = self._detokenizer.add(output.token_ids, output.finish_reason)
        self._completion_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:  # perhaps before the engine knows: a stop string
            await self.aclose()
        usage = Usage(self.prompt_tokens, self._completion_tokens, output.cached_tokens)
        return TokenDelta(delta.text, delta.token_ids, delta.finish_reason, usage)

    async def aclose(self) -> None:
        """Aborts the request, if it has not ended."""
        self._has_ended = True
        self._outputs.abort()


class AsyncLLM:
    """One base model with its adapters. All methods belong to the event loop that called `start`."""

    def __init__(
        self,
        engine: EngineClient,
        ingest: Ingest,
        family: ModelFamily,
        models: tuple[ServedModel, ...],
        max_requests: int,
    ) -> None:
        self._engine = engine
        self._ingest = ingest
        self._family = family
        self._max_requests = max_requests
        self._in_ingest = 0
        self.models = models

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
            engine, max_model_len = await EngineClient.start(
                folder, settings.model, settings.engine, store.adapters, on_phase
            )
        except BaseException:
            await asyncio.to_thread(ingest.close)
            raise
        models = tuple(_served_models(name, folder, family, store, max_model_len))
        limit = settings.engine.max_num_seqs + settings.server.max_waiting_requests
        return cls(engine, ingest, family, models, limit)

    @property
    def stats(self) -> EngineStats:
        """As of the engine's last word."""
        return self._engine.stats

    async def chat(self, chat: ChatInput, *, model: str, sampling: SamplingParams, request_id: str) -> ChatRun:
        """Prepares the conversation and queues it; returns once the engine has admitted it.

        Raises:
            ModelNotFoundError: `model` is neither the base nor an adapter.
            ImageError, InvalidRequestError: the input cannot be served.
            OverloadedError: too many requests are under way.
            EngineDeadError: the engine process is gone.
        """
        served = self._find(model)
        # Nothing is awaited between this check and the count, so the bound is exact.
        if self._in_ingest + self._engine.num_requests >= self._max_requests:
            raise OverloadedError("Too many requests are waiting. Try again in a moment.")
        self._in_ingest += 1
        try:
            prepared = await self._ingest.prepare_async(chat)
        finally:
            self._in_ingest -= 1
        request = Request(
            request_id=request_id,
            token_ids=prepared.prompt.token_ids,
            sampling=sampling,
            images=prepared.prompt.images,
            adapter=None if served.parent is None else served.digest,
            eos_token_ids=self._family.eos_token_ids,
        )
        outputs = await self._engine.submit(request)
        detokenizer = Detokenizer(self._family.backend_tokenizer, sampling.stop_strings)
        return ChatRun(request, served, prepared.receipts, outputs, detokenizer)

    async def check_health(self) -> None:
        """A round trip through the engine's loop.

        Raises:
            EngineDeadError: it cannot answer.
        """
        await self._engine.ping(HEALTH_TIMEOUT)

    async def close(self) -> None:
        """Ends the engine process and the decode workers."""
        await self._engine.close()
        await asyncio.to_thread(self._ingest.close)

    def _find(self, name: str) -> ServedModel:
        for model in self.models:
            if model.id == name:
                return model
        raise ModelNotFoundError(
            "There is no model of this name. GET /v1/models lists the base model and its adapters.", param="model"
        )


def _served_models(
    name: str, folder: Path, family: ModelFamily, store: AdapterStore, max_model_len: int
) -> Iterator[ServedModel]:
    now = int(time.time())
    base = ServedModel(
        id=name,
        root=name,
        parent=None,
        digest=family.model_digest,
        max_model_len=max_model_len,
        max_tokens_per_image=family.max_tokens_per_image,
        notice=family.notice,
        created=now,
    )
    yield base
    for adapter in store.adapters:
        yield replace(base, id=adapter.name, parent=name, digest=adapter.digest)
