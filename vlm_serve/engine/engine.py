"""The engine: requests in, tokens out, one step at a time.

`step()` is the whole of it: schedule, run, update. It knows nothing of text, HTTP or processes.
"""

import logging
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from vlm_serve.config import EngineConfig, ModelConfig
from vlm_serve.decoders.config import DecoderConfig
from vlm_serve.decoders.kinds import NormKind
from vlm_serve.engine.batch import ScheduledBatch
from vlm_serve.engine.kv_cache import KVCache, KVPlan, plan_blocks
from vlm_serve.engine.model_runner import ModelRunner, adaptable_linears, tower_linears
from vlm_serve.engine.scheduler import Scheduler
from vlm_serve.engine.structured import Structures
from vlm_serve.errors import ConfigurationError, InputError
from vlm_serve.families.base import ModelFamily, VisionLanguageModel
from vlm_serve.kernels import dispatch
from vlm_serve.layers.loading import pack_linears
from vlm_serve.layers.tower_linear import replace_linears
from vlm_serve.lora.checkpoint import AdapterWeights, read_adapter
from vlm_serve.lora.store import AdapterFolder
from vlm_serve.types import EngineStats, Request, StepOutput, TokenOutput

logger = logging.getLogger(__name__)

OnPhase = Callable[[str, float], None]
"""Told the name of each start-up phase and the seconds it took."""

FAULT_MESSAGE = "A fault inside the engine ended this request. Send it again; if it persists, tell your operator."


class Engine:
    """A model served with continuous batching over a paged KV cache.

    Not thread-safe: one thread adds, aborts and steps.
    """

    def __init__(self, scheduler: Scheduler, runner: ModelRunner) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.on_batch: Callable[[tuple[str, ...]], None] = lambda request_ids: None
        """Told which requests are in a step before it is run."""

    @classmethod
    def build(
        cls,
        family: ModelFamily,
        model_config: ModelConfig,
        config: EngineConfig,
        adapters: Sequence[AdapterFolder] = (),
        on_phase: OnPhase = lambda name, seconds: None,
    ) -> "Engine":
        """Loads the weights, plans the caches and checks the adapters.

        Raises:
            ConfigurationError: the checkpoint, an adapter or the memory does not fit; says which and what to do.
        """
        if family.max_tokens_per_image > config.encoder_cache_tokens:
            raise ConfigurationError(
                f"An image takes up to {family.max_tokens_per_image} tokens; the encoder cache holds "
                f"{config.encoder_cache_tokens}. Raise encoder_cache_tokens."
            )
        device = choose_device(model_config.device)
        dtype = choose_dtype(model_config.dtype, device, family.decoder_config)
        with _phase("kernels", on_phase):
            dispatch.prepare(device)
        began = time.perf_counter()
        model = family.build(dtype, device, lambda what: on_phase(f"weights: {what}", time.perf_counter() - began))
        size = sum(parameter.nbytes for parameter in model.parameters())
        pack_linears(model)
        name = f"weights ({str(dtype).removeprefix('torch.')}, {device}, {size / 1e9:.2f} GB)"
        on_phase(name, time.perf_counter() - began)
        decoder_config = family.decoder_config
        atomic = family.max_tokens_per_image if family.attends_both_ways else 0
        plan = plan_blocks(decoder_config, config, dtype, device, longest_span=atomic)
        max_model_len = plan_context(decoder_config, config, plan)
        with _phase(f"kv cache ({plan.describe(max_model_len)})", on_phase):
            kv_cache = KVCache.allocate(decoder_config, plan.num_blocks, config.block_size, dtype, device)
        with _phase(f"adapters ({len(adapters)})", on_phase):
            weights = read_adapters(adapters, family, model, config.max_adapter_rank)
            names = {name for one in weights.values() for name in one.image_modules}
            replace_linears(model, names, model.tower_adapter)
        runner = ModelRunner(
            model,
            kv_cache,
            max_rows=config.max_num_seqs,
            max_model_len=max_model_len,
            adapters=weights,
            load_structures=lambda: Structures(
                family.backend_tokenizer, decoder_config.vocab_size, family.eos_token_ids
            ),
            rope_positions=family.rope_positions,
            enforce_eager=config.enforce_eager,
        )
        scheduler = Scheduler(
            config,
            num_blocks=plan.num_blocks,
            max_model_len=max_model_len,
            windows=plan.windows,
            stretches_from=decoder_config.stretches_from,
            image_adapters={digest for digest, one in weights.items() if one.image_modules},
        )
        return cls(scheduler, runner)

    @property
    def max_model_len(self) -> int:
        return self.scheduler.max_model_len

    @property
    def dtype(self) -> str:
        """Of weights and KV cache, as `float32`."""
        return str(self.runner.dtype).removeprefix("torch.")

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def stats(self) -> EngineStats:
        return self.scheduler.stats()

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            InvalidRequestError: it cannot be served as it is; nothing else is touched.
        """
        self.scheduler.add(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one of its answers, and gives back what it holds; no output follows."""
        self.scheduler.abort(request_id, index)

    def step(self) -> StepOutput:
        """One step: the next batch is scheduled, run and taken in.

        A fault in it ends one request. What it raises has ended the requests of the batch.

        Raises:
            torch.AcceleratorError: of the device, which has failed for good.
            BaseException: an interrupt, which is the caller's.
        """
        batch = self.scheduler.schedule()
        if batch is None:
            return StepOutput((), self.stats)
        self.on_batch(self.scheduler.request_ids(batch))
        try:
            result = self.runner.run(batch)
        except BaseException as error:
            is_fault = isinstance(error, Exception) and not isinstance(error, torch.AcceleratorError)
            outputs = self._recover(batch, error, can_run_again=is_fault)
            if not is_fault:
                raise
            return StepOutput(outputs, self.stats)
        outputs = self.scheduler.update(batch, result)
        return StepOutput(outputs, self.stats, batch.num_tokens, len(batch.encode), result.encoder_seconds)

    def _recover(self, batch: ScheduledBatch, error: BaseException, *, can_run_again: bool) -> tuple[TokenOutput, ...]:
        """A fault ends one request: those of a step that failed are run again one at a time, to find it."""
        place = traceback.extract_tb(error.__traceback__)[-1]
        # No text of the exception: it may carry what a patient's prompt held.
        logger.error(
            "A step of %d requests failed: %s at %s:%d", len(batch.rows), type(error).__name__, place.name, place.lineno
        )
        if can_run_again and len(batch.rows) > 1:
            self.scheduler.suspect(batch)
            return ()
        if isinstance(error, InputError) and len(batch.rows) == 1:
            return self.scheduler.fail(batch, str(error), error.param)
        return self.scheduler.fail(batch, FAULT_MESSAGE)


def read_adapters(
    adapters: Sequence[AdapterFolder], family: ModelFamily, model: VisionLanguageModel, max_rank: int
) -> dict[str, AdapterWeights]:
    """The weights of each by its digest.

    Raises:
        AdapterError: one does not fit the model.
    """
    shapes = {
        f"{parent}.{part}": (linear.whole_in_features, width)
        for parent, linear in adaptable_linears(model)
        for part, width in linear.whole_parts.items()
    }
    shapes |= {name: (linear.in_features, linear.out_features) for name, linear in tower_linears(model)}
    return {
        one.digest: read_adapter(one.folder, one.digest, family.rename, shapes, max_rank, family.split)
        for one in adapters
    }


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"There is no device {name!r}. Use auto, cpu or cuda.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(f"torch sees {torch.cuda.device_count()} GPUs, and {name} is none of them. Use cpu.")
    return device


def choose_dtype(name: str, device: torch.device, decoder: DecoderConfig) -> torch.dtype:
    """`auto` is bfloat16 where the hardware computes in it; else float16 on a GPU and float32 on a CPU.

    Raises:
        ConfigurationError: there is no such dtype, or not on this device or for this decoder.
    """
    # What Gemma adds up from layer to layer passes 65,504, where float16 ends.
    overflows = decoder.norm is NormKind.RMS_PLUS_ONE
    if name == "auto":
        if device.type == "cuda":
            short = torch.float32 if overflows else torch.float16
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else short
        return torch.bfloat16 if _cpu_has_bf16() else torch.float32
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in dtypes:
        raise ConfigurationError(f"There is no dtype {name!r}. Use auto, {', '.join(dtypes)}.")
    if name == "float16" and device.type == "cpu":
        raise ConfigurationError("float16 is slow and imprecise on a CPU. Use bfloat16 or float32.")
    if name == "float16" and overflows:
        raise ConfigurationError("Gemma's numbers overflow in float16. Use bfloat16 or float32.")
    return dtypes[name]


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 itself (AVX512-BF16 or AMX); emulation is slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def plan_context(decoder: DecoderConfig, config: EngineConfig, plan: KVPlan) -> int:
    """The longest prompt with its answer: what was asked for, or what the model and the cache hold.

    Raises:
        ConfigurationError: more was asked for than either holds.
    """
    room = plan.longest(decoder.max_positions)
    if config.max_model_len is None:
        return room
    if config.max_model_len > decoder.max_positions:
        raise ConfigurationError(f"--max-model-len is {config.max_model_len}; the model has {decoder.max_positions}.")
    if config.max_model_len > room:
        needed = plan.blocks_of(config.max_model_len) * plan.block_bytes
        raise ConfigurationError(
            f"A context of {config.max_model_len} tokens takes {needed} bytes of KV cache; it holds {room} tokens. "
            "Raise --kv-cache-memory or lower --max-model-len."
        )
    return config.max_model_len


@contextmanager
def _phase(name: str, on_phase: OnPhase) -> Iterator[None]:
    began = time.perf_counter()
    yield
    on_phase(name, time.perf_counter() - began)
