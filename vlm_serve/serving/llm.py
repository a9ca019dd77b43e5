"""`LLM`: the offline class. The same engine in this process, for notebooks, scripts and batch work."""

import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vlm_serve.clinical.image import ImageReceipt
from vlm_serve.config import EngineConfig, IngestConfig, ModelConfig
from vlm_serve.engine.engine import Engine
from vlm_serve.errors import InvalidRequestError, ModelNotFoundError
from vlm_serve.families import load_family, resolve_model
from vlm_serve.lora.store import AdapterStore
from vlm_serve.serving.detokenizer import Detokenizer
from vlm_serve.serving.ingest import Ingest, PreparedPrompt
from vlm_serve.serving.media import read_conversation
from vlm_serve.types import Request, SamplingParams, TokenOutput

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
Conversation = Sequence[Message]
T = TypeVar("T")


@dataclass(slots=True)
class CompletionOutput:
    """One answer. `finish_reason` is `stop`, `length`, or `error` where a fault in the engine cut it short."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None


@dataclass(slots=True)
class RequestOutput:
    """The answer to one prompt, in vLLM's shape, with the receipts of its images.

    `prompt` is the text as given, None for a conversation; `notice` is what the model says of itself to
    be told with every answer about an image.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    num_cached_tokens: int = 0
    receipts: tuple[ImageReceipt, ...] = ()
    notice: str | None = None


class LLM:
    """A model in this process.

        llm = LLM("demo")
        for out in llm.generate(["The heart has"], SamplingParams(temperature=0)):
            print(out.outputs[0].text)

    Args:
        model: `demo`, or a checkpoint folder.
        dtype: `auto`, `bfloat16`, `float16` or `float32`.
        max_model_len: the longest prompt with its answer, in tokens; None for what the model and cache hold.
        adapters: a directory of PEFT folders; `adapter=NAME` in a call asks for one.
        device: `auto`, `cpu` or `cuda`.
        kv_cache_memory: bytes.
        **engine: further fields of `EngineConfig`.

    Raises:
        ConfigurationError: says what does not fit and what to do.
    """

    def __init__(
        self,
        model: str | Path = "demo",
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        adapters: str | Path | None = None,
        device: str = "auto",
        kv_cache_memory: int | None = None,
        on_phase: Callable[[str, float], None] = lambda name, seconds: None,
        **engine: Any,
    ) -> None:
        folder = resolve_model(str(model), logger.info)
        self._family = load_family(folder)
        self._adapters = AdapterStore(None if adapters is None else Path(adapters))
        self.engine = Engine.build(
            self._family,
            ModelConfig(str(model), None, dtype, device),
            EngineConfig(max_model_len=max_model_len, kv_cache_memory=kv_cache_memory, **engine),
            self._adapters.adapters,
            on_phase,
        )
        self._ingest = Ingest(self._family, IngestConfig())
        self._ids = itertools.count()

    def generate(
        self,
        prompts: str | Sequence[str],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continues plain prompts; no chat template is applied.

        Args:
            sampling_params: for all, or one for each prompt.
            adapter: for all, or one for each prompt; None is the base model.
            use_tqdm: shows a progress bar (vLLM's name for it).

        Raises:
            InvalidRequestError: a prompt cannot be served; nothing has run then.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        prepared = [self._ingest.prepare_text(text) for text in texts]
        return self._run(prepared, cast(list[str | None], texts), sampling_params, adapter, use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers one conversation or several; parts as in the API, or
        `{"type": "image", "image": PIL image, path or bytes}` (DICOM, PNG or JPEG).

        Raises:
            ImageError: an image cannot be used.
            InvalidRequestError: a conversation cannot be served; nothing has run then.
        """
        first = messages[0] if messages else None
        several = cast(Sequence[Conversation], [messages] if first is None or isinstance(first, Mapping) else messages)
        prepared = [self._ingest.prepare(read_conversation(conversation)) for conversation in several]
        return self._run(prepared, [None] * len(prepared), sampling_params, adapter, use_tqdm)

    def close(self) -> None:
        """Ends the decode workers."""
        self._ingest.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(
        self,
        prepared: list[PreparedPrompt],
        texts: list[str | None],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        adapter: str | Sequence[str | None] | None,
        show_progress: bool,
    ) -> list[RequestOutput]:
        count = len(prepared)
        samplings = _one_each(sampling_params or SamplingParams(), count, "sampling_params")
        adapters: list[str | None] = _one_each(adapter, count, "adapter")
        requests = [
            Request(
                request_id=str(next(self._ids)),
                token_ids=one.prompt.token_ids,
                sampling=sampling,
                images=one.prompt.images,
                adapter=self._adapter_digest(name),
                eos_token_ids=self._family.eos_token_ids,
            )
            for one, sampling, name in zip(prepared, samplings, adapters, strict=True)
        ]
        results = self._generate(requests, show_progress)
        for result, text, one in zip(results, texts, prepared, strict=True):
            result.prompt = text
            result.receipts = one.receipts
            result.notice = self._family.notice if one.receipts else None
        return results

    def _generate(self, requests: list[Request], show_progress: bool) -> list[RequestOutput]:
        results: dict[str, RequestOutput] = {}
        detokenizers: dict[str, Detokenizer] = {}
        try:
            for request in requests:
                self.engine.add(request)
                answer = CompletionOutput(0, "", [], None)
                results[request.request_id] = RequestOutput(
                    request.request_id, None, list(request.token_ids), [answer], finished=False
                )
                detokenizers[request.request_id] = Detokenizer(
                    self._family.backend_tokenizer, request.sampling.stop_strings
                )
            with _progress_bar(show_progress) as progress:
                task = progress.add_task("Answers", total=len(requests), speed="")
                began, tokens = time.perf_counter(), 0
                while self.engine.has_work:
                    for output in self.engine.step().outputs:
                        tokens += len(output.token_ids)
                        done = self._take(results[output.request_id], detokenizers[output.request_id], output)
                        progress.update(task, advance=done, speed=f"{tokens / (time.perf_counter() - began):.0f} tok/s")
        except BaseException:
            for request_id in results:
                self.engine.abort(request_id)
            raise
        return list(results.values())

    def _take(self, result: RequestOutput, detokenizer: Detokenizer, output: TokenOutput) -> bool:
        """Adds one step's tokens to an answer; True if it has ended."""
        delta = detokenizer.add(output.token_ids, output.finish_reason)
        answer = result.outputs[0]
        answer.text += delta.text
        answer.token_ids += delta.token_ids
        result.num_cached_tokens = output.cached_tokens
        if delta.finish_reason is None:
            return False
        if output.finish_reason is None:  # a stop string, which the engine does not know of
            self.engine.abort(result.request_id)
        answer.finish_reason = str(delta.finish_reason)
        result.finished = True
        return True

    def _adapter_digest(self, name: str | None) -> str | None:
        if name is None:
            return None
        folder = self._adapters.get(name)
        if folder is None:
            known = ", ".join(adapter.name for adapter in self._adapters.adapters) or "none"
            raise ModelNotFoundError(f"There is no adapter {name!r}. Known: {known}.", param="adapter")
        return folder.digest


def _one_each(value: T | Sequence[T], count: int, name: str) -> list[T]:
    """`value` for each of `count` prompts, or one of its own for each."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise InvalidRequestError(f"{len(value)} {name} for {count} prompts. Give one, or one for each.", param=name)
    return list(value)


def _progress_bar(show: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        disable=not show,
        transient=True,
    )
