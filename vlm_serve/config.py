"""The settings, typed and frozen, one small class for each part that reads them.

They are filled in one place, at the top (`api/cli/settings.py` from flags, environment and file; the
keyword arguments of `LLM` offline). A part is given the settings it uses and nothing else.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from vlm_serve.errors import ConfigurationError

MIB = 1024**2
GIB = 1024**3


def cache_dir() -> Path:
    """Where converted models and compiled kernels are kept: `$VLM_SERVE_CACHE`, else the user's cache folder."""
    if own := os.environ.get("VLM_SERVE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm-serve"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which model, and how its weights are held.

    `model` is `demo` or a checkpoint folder. `dtype` `auto` takes bfloat16 where the hardware computes in
    it, else float32. `device` `auto` takes the first GPU, else the CPU.
    """

    model: str = "demo"
    adapters: Path | None = None
    dtype: str = "auto"
    device: str = "auto"

    @property
    def served_name(self) -> str:
        """What requests call the base model: `demo`, or the name of the checkpoint's folder."""
        return Path(self.model).resolve().name if "/" in self.model or Path(self.model).is_dir() else self.model


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How the engine batches and caches. Tokens, unless a name says bytes.

    `max_model_len` None is the model's own context, cut to what the KV cache holds. `kv_cache_memory` is
    in bytes, or as a float the share of what the weights leave free on a GPU; None is 1 GiB on a CPU and 0.9 on a GPU.
    `max_num_batched_tokens` is the budget of one step; `max_encoder_tokens` the image tokens that may be
    encoded in one; `encoder_cache_tokens` those kept. `speculative_tokens` is how many tokens of an answer are
    guessed at once from the prompt and what is there of the answer; 0 guesses none. `enforce_eager` (vLLM's name)
    leaves out the CUDA graphs, which the vision tower has on a GPU.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    max_model_len: int | None = None
    block_size: int = 16
    kv_cache_memory: int | float | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_encoder_tokens: int = 1024
    encoder_cache_tokens: int = 16_384
    enable_prefix_caching: bool = True
    speculative_tokens: int = 0
    enforce_eager: bool = False
    max_adapters: int = 8
    max_adapter_rank: int = 64

    def __post_init__(self) -> None:
        for name in (
            "block_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_encoder_tokens",
            "encoder_cache_tokens",
            "max_adapters",
            "max_adapter_rank",
        ):
            if not _is_whole(getattr(self, name)) or getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be a whole number, at least 1.")
        for name in ("enable_prefix_caching", "enforce_eager"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"{name} must be True or False.")
        if not _is_whole(self.speculative_tokens) or self.speculative_tokens < 0:
            raise ConfigurationError("speculative_tokens must be a whole number, at least 0, which guesses none.")
        if isinstance(self.kv_cache_memory, float):
            if not 0 < self.kv_cache_memory <= 1:
                raise ConfigurationError("kv_cache_memory as a share must be above 0 and at most 1.")
        elif self.kv_cache_memory is not None and (not _is_whole(self.kv_cache_memory) or self.kv_cache_memory < 1):
            raise ConfigurationError("kv_cache_memory in bytes must be a whole number, at least 1.")
        if self.max_model_len is not None and (not _is_whole(self.max_model_len) or self.max_model_len < 2):
            raise ConfigurationError(
                "max_model_len must be a whole number, at least 2: a token of prompt and one of answer."
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigurationError(
                "max_num_batched_tokens must be at least max_num_seqs, so that every running request gets a token "
                "in a step. Raise the one or lower the other."
            )


def _is_whole(value: object) -> bool:
    """`LLM` takes what a script gives it, whatever its type."""
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What decoding one file may cost. Bytes and seconds; past one, the file is refused, not the server.

    `memory_bytes` and `cpu_seconds` are enforced by the kernel on the worker process, `wall_seconds` by its
    parent, the others by checks before anything is allocated.
    """

    max_file_bytes: int = 512 * MIB
    max_dimension: int = 16_384
    max_frames: int = 4_096
    max_decoded_bytes: int = 1 * GIB
    max_inflated_bytes: int = 1 * GIB
    max_inflate_ratio: int = 200
    max_sequence_depth: int = 64
    memory_bytes: int = 4 * GIB
    cpu_seconds: int = 20
    wall_seconds: float = 40.0


@dataclass(frozen=True, slots=True)
class IngestConfig:
    """The pool of decode workers and what one file may cost them.

    `image_processor_device` is where the model's own processor then resizes and normalises the pixels: on `cuda` it is
    faster, and its rounding differs from that of the CPU, which is transformers' bit for bit.
    """

    workers: int = 2
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    image_processor_device: str = "cpu"


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The HTTP face. `max_body_bytes` bounds a JSON body, `max_images` the image parts of one request.

    `api_keys` is a file that says which key is whose; without it there are no keys and one tenant.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_body_bytes: int = 64 * MIB
    max_images: int = 128
    max_waiting_requests: int = 256
    api_keys: Path | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """All of it, as the composition root holds it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    ingest: IngestConfig = field(default_factory=IngestConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
