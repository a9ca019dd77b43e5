"""`LLM`: the offline class. The same engine in this process, for notebooks, scripts and batch work."""

import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

from vlm_serve.config import EngineConfig, IngestConfig, ModelConfig
from vlm_serve.engine.engine import Engine, choose_device
from vlm_serve.errors import (
    ConfigurationError,
    InvalidRequestError,
    ModelNotFoundError,
    RequestFailedError,
    VlmServeError,
)
from vlm_serve.families import load_family, resolve_model
from vlm_serve.families.prompt import ToolFormat
from vlm_serve.lora.store import AdapterStore
from vlm_serve.serving.flight import Flight, Running
from vlm_serve.serving.ingest import Ingest
from vlm_serve.serving.media import PromptInput, read_conversation, read_prompts
from vlm_serve.serving.outputs import Answers, EmbeddingRequestOutput, Pooled, RequestOutput
from vlm_serve.serving.served_model import ServedModel, served_models
from vlm_serve.serving.token_bytes import TokenBytes
from vlm_serve.serving.vllm_arguments import default_sampling, engine_config
from vlm_serve.types import ChatInput, SamplingParams

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
Conversation = Sequence[Message]
T = TypeVar("T")
Output = RequestOutput | EmbeddingRequestOutput

DEFAULTS = EngineConfig()

READ_AHEAD = 8
"""Jobs of a stream whose images are decoded while the engine is full."""


@dataclass(slots=True)
class Job:
    """One request of a stream: a conversation, a text or token ids. Without `sampling` it asks for its embedding.

    A lower `priority` goes first. `key` is the caller's, to know its answer by.
    """

    input: ChatInput | str | tuple[int, ...]
    sampling: SamplingParams | None
    adapter: str | None = None
    priority: int = 0
    key: object = None


class LLM:
    """A model in this process. Not thread-safe.

        llm = LLM("demo")
        for out in llm.generate(["The heart has"], SamplingParams(temperature=0)):
            print(out.outputs[0].text)

    Args:
        model: `demo`, or a checkpoint folder.
        dtype: `auto`, `bfloat16`, `float16` or `float32`.
        max_model_len: the longest prompt with its answer, in tokens; None for what the model and cache hold.
        enable_prefix_caching: whether prompts that begin alike share what was computed for them.
        max_num_batched_tokens: computed in one step.
        block_size: tokens in a block of the KV cache.
        adapters: a directory of PEFT folders; `adapter=NAME` in a call asks for one.
        device: `auto`, `cpu` or `cuda`.
        kv_cache_memory: bytes; on a GPU also a share of what the weights leave free, as a float such as 0.8.
        seed: makes calls repeat from run to run whose `SamplingParams` have no seed of their own.
        **engine: further fields of `EngineConfig`, and vLLM's settings where they hold here.

    Raises:
        ConfigurationError: says what does not fit and what to do.
    """

    def __init__(
        self,
        model: str | Path = "demo",
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        enable_prefix_caching: bool = DEFAULTS.enable_prefix_caching,
        max_num_batched_tokens: int = DEFAULTS.max_num_batched_tokens,
        block_size: int = DEFAULTS.block_size,
        adapters: str | Path | None = None,
        device: str = "auto",
        kv_cache_memory: int | float | None = None,
        seed: int | None = None,
        ingest: IngestConfig | None = None,
        on_phase: Callable[[str, float], None] = lambda name, seconds: None,
        **engine: Any,
    ) -> None:
        given = engine | {
            "max_model_len": max_model_len,
            "enable_prefix_caching": enable_prefix_caching,
            "max_num_batched_tokens": max_num_batched_tokens,
            "block_size": block_size,
            "kv_cache_memory": kv_cache_memory,
        }
        config = engine_config(given, is_on_gpu=choose_device(device).type == "cuda")
        if not isinstance(seed, int | None):
            raise ConfigurationError("seed must be a whole number.")
        self._seeds = None if seed is None else random.Random(seed)
        folder = resolve_model(str(model), logger.info)
        self._family = load_family(folder)
        self._adapters = AdapterStore(None if adapters is None else Path(adapters))
        model_config = ModelConfig(str(model), None, dtype, device)
        self.engine = Engine.build(self._family, model_config, config, self._adapters.adapters, on_phase)
        self._folder, self._name = folder, model_config.served_name
        self.token_bytes = TokenBytes(self._family.backend_tokenizer)
        self._at_once = config.max_num_seqs + READ_AHEAD
        self._ingest = Ingest(self._family, ingest or IngestConfig())
        self._preparing = ThreadPoolExecutor(2, thread_name_prefix="prepare")
        self._ids = itertools.count()
        self._is_busy = threading.Lock()

    @cached_property
    def models(self) -> tuple[ServedModel, ...]:
        """The base model and its adapters, as the server lists them. The first time, it reads the whole checkpoint."""
        engine = self.engine
        return tuple(served_models(self._name, self._family, self._adapters, engine.max_model_len, engine.dtype))

    @property
    def tool_format(self) -> ToolFormat | None:
        """How the model writes a call of a tool; None if its template knows none."""
        return self._family.prompts.tool_format

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer, to make prompts with."""
        return self._family.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation config recommends: that of calls without `SamplingParams`. They are frozen;
        `dataclasses.replace` makes others of them.

        Raises:
            CheckpointError: a value of it cannot be used.
        """
        return self._default_sampling

    @cached_property
    def _default_sampling(self) -> SamplingParams:
        return default_sampling(self._folder)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included.

        Raises:
            InvalidRequestError: an id is not of the vocabulary.
        """
        return self._ingest.decode_text(token_ids)

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Continues plain prompts; no chat template is applied. Answers are in the order of the prompts.

        A fault in the engine ends one prompt's answers, whose `finish_reason` is then `error`; the others go on.

        Args:
            prompts: one or several, each a text, `{"prompt": text}` or `{"prompt_token_ids": ids}`.
            sampling_params: for all, or one for each prompt; None is `get_default_sampling_params`.
            use_tqdm: shows a progress bar (vLLM's name for it).
            adapter: for all, or one for each prompt; None is the base model.

        Raises:
            InvalidRequestError: a prompt cannot be served; nothing has run then.
            KeyboardInterrupt: all is aborted; the engine can be used again.
        """
        return self._answer(read_prompts(prompts), sampling_params, adapter, use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        adapter: str | Sequence[str | None] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several; parts as in the API, or
        `{"type": "image", "image": PIL image, path or bytes}` (DICOM, PNG or JPEG). Otherwise as `generate`.

        Args:
            add_generation_prompt: whether the prompt ends with the cue for an answer.
            continue_final_message: whether the answer goes on with the last message instead.
            tools: functions that the model is told of, in OpenAI's form.
            chat_template_kwargs: further variables of the model's chat template.

        Raises:
            ImageError: an image cannot be used.
            InvalidRequestError: a conversation cannot be served; nothing has run then.
            KeyboardInterrupt: all is aborted; the engine can be used again.
        """
        first = messages[0] if messages else None
        several = cast(Sequence[Conversation], [messages] if first is None or isinstance(first, Mapping) else messages)
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message needs add_generation_prompt=False: there is no new answer to cue.",
                param="continue_final_message",
            )
        inputs = [
            replace(
                read_conversation(one),
                tools=tuple(tools or ()),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                template_kwargs=chat_template_kwargs or {},
            )
            for one in several
        ]
        return self._answer(inputs, sampling_params, adapter, use_tqdm)

    def embed(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        *,
        adapter: str | Sequence[str | None] | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """Embeds plain prompts: for each a vector of norm 1, in `outputs.embedding`.

        Raises:
            InvalidRequestError: a prompt cannot be served; nothing has run then.
            KeyboardInterrupt: all is aborted; the engine can be used again.
        """
        inputs = read_prompts(prompts)
        adapters: list[str | None] = _one_each(adapter, len(inputs), "adapter")
        jobs = [Job(one, None, name) for one, name in zip(inputs, adapters, strict=True)]
        return cast(list[EmbeddingRequestOutput], self._run_all(jobs, "Embeddings", use_tqdm))

    def stream(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Answers | Pooled | VlmServeError]]:
        """Runs any number of jobs and yields each as it ends, in whatever order that is.

        Jobs are taken from the iterable as there is room: about as many are in memory as run at once. What is wrong
        with one comes back as its result. Closed early, it aborts what is under way.
        """
        with self._alone() as flight:
            source, preparing = iter(jobs), dict[Future[Running], Job]()
            waiting_for: dict[str, Job] = {}
            try:
                while True:
                    room = self._at_once - len(preparing) - len(flight)
                    for job in itertools.islice(source, room):
                        preparing[self._preparing.submit(self._prepare_safely, job)] = job
                    if not preparing and not flight:
                        return
                    if not flight:
                        wait(preparing, return_when=FIRST_COMPLETED)
                    for future in [future for future in preparing if future.done()]:
                        job = preparing.pop(future)
                        try:
                            waiting_for[flight.add(future.result())] = job
                        except VlmServeError as error:
                            yield job, error
                    for ended in flight.step():
                        yield waiting_for.pop(ended.request_id), ended
            finally:
                for future in preparing:
                    future.cancel()

    def close(self) -> None:
        """Ends the decode workers."""
        self._preparing.shutdown(cancel_futures=True)
        self._ingest.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(
        self,
        inputs: Sequence[ChatInput | str | tuple[int, ...]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        adapter: str | Sequence[str | None] | None,
        show_progress: bool,
    ) -> list[RequestOutput]:
        default = self._default_sampling if sampling_params is None else sampling_params
        samplings = [self._seeded(one) for one in _one_each(default, len(inputs), "sampling_params")]
        adapters: list[str | None] = _one_each(adapter, len(inputs), "adapter")
        jobs = [Job(*one) for one in zip(inputs, samplings, adapters, strict=True)]
        return cast(list[RequestOutput], self._run_all(jobs, "Answers", show_progress))

    def _seeded(self, sampling: SamplingParams) -> SamplingParams:
        if self._seeds is None or sampling.seed is not None:
            return sampling
        return replace(sampling, seed=self._seeds.getrandbits(63))

    def _run_all(self, jobs: Sequence[Job], title: str, show_progress: bool) -> list[Output]:
        """The results in the jobs' order; nothing runs unless all of them can be served."""
        prepared = [self._prepare(job) for job in jobs]
        notice = self._family.notice
        with self._alone() as flight, _progress_bar(show_progress) as progress:
            for one in prepared:
                flight.add(one)
            task = progress.add_task(title, total=len(jobs), speed="")
            began = time.perf_counter()
            while flight:
                ended = len(flight.step())
                speed = flight.num_tokens / (time.perf_counter() - began)
                progress.update(task, advance=ended, speed=f"{speed:.0f} tok/s" if speed else "")
        return [one.answers.output(notice) for one in prepared]

    def _prepare(self, job: Job) -> Running:
        """A job as the engine takes it, its images decoded. Raises what `Ingest` raises."""
        prepared = (
            self._ingest.prepare(job.input)
            if isinstance(job.input, ChatInput)
            else self._ingest.prepare_text(job.input)
        )
        request = self._ingest.request(
            prepared,
            job.sampling or SamplingParams(max_tokens=1),
            request_id=str(next(self._ids)),
            adapter=self._adapter_digest(job.adapter),
            priority=job.priority,
            pooling=job.sampling is None,
        )
        if job.sampling is None:
            return Running(request, Pooled(request))
        text = job.input if isinstance(job.input, str) else None
        return Running(request, Answers(request, text, prepared, self.token_bytes))

    def _prepare_safely(self, job: Job) -> Running:
        """As `_prepare`; a fault in it ends this job alone, and its text, which may echo a prompt, is not shown."""
        try:
            return self._prepare(job)
        except VlmServeError:
            raise
        except Exception as error:  # noqa: BLE001
            logger.error("A request could not be prepared: %s", type(error).__name__)
            raise RequestFailedError("A fault in preparing this request ended it.") from None

    @contextmanager
    def _alone(self) -> Iterator[Flight]:
        """The engine for one run at a time, all of whose requests are aborted if it ends before them."""
        if not self._is_busy.acquire(blocking=False):
            raise InvalidRequestError("This LLM is at work. Let the run that is under way end, or close it, first.")
        flight = Flight(self.engine)
        try:
            yield flight
        finally:
            flight.abort()
            self._is_busy.release()

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
        console=Console(stderr=True),
        disable=not show,
        transient=True,
    )
