"""What scripts for vLLM give to its `LLM`, as settings of ours, and the sampling that a model recommends.

A setting is taken where it holds here or changes no answer; else it is refused with what to use in its place.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from vlm_serve.config import EngineConfig
from vlm_serve.errors import CheckpointError, ConfigurationError, InvalidRequestError
from vlm_serve.families.base import read_json
from vlm_serve.types import SamplingParams

GPU_SHARE = "gpu_memory_utilization"
RENAMED = {
    GPU_SHARE: "kv_cache_memory",
    "kv_cache_memory_bytes": "kv_cache_memory",
    "max_loras": "max_adapters",
    "max_lora_rank": "max_adapter_rank",
}

WITHOUT_EFFECT = frozenset(
    {
        "compilation_config",
        "disable_custom_all_reduce",
        "disable_log_stats",
        "max_cpu_loras",
        "max_seq_len_to_capture",
        "runner",
        "swap_space",
        "task",
    }
)
"""Whatever their value, answers are the same here: it is about how vLLM computes and logs, or which calls it allows."""

_ONE_DEVICE = "A model is on one device here."
_FOLDER = "A model is a folder here; nothing is downloaded."
_IN_FOLDER = "The files of the checkpoint's folder are used; change them there."

FIXED: Mapping[str, tuple[object, str]] = {
    "allowed_local_media_path": ("", "LLM.chat reads the paths in parts of type image."),
    "chat_template": (None, "Put it into the checkpoint's folder, as chat_template.jinja."),
    "code_revision": (None, _FOLDER),
    "config_format": ("auto", _IN_FOLDER),
    "cpu_offload_gb": (0, _ONE_DEVICE),
    "data_parallel_size": (1, _ONE_DEVICE),
    "disable_sliding_window": (False, _IN_FOLDER),
    "download_dir": (None, _FOLDER),
    "enable_chunked_prefill": (True, "A long prompt is always cut; max_num_batched_tokens says into what pieces."),
    "enable_expert_parallel": (False, _ONE_DEVICE),
    "enable_lora": (False, "Give adapters=FOLDER, and adapter=NAME in a call."),
    "fully_sharded_loras": (False, _ONE_DEVICE),
    "generation_config": ("auto", "Give SamplingParams of your own."),
    "hf_config_path": (None, _IN_FOLDER),
    "hf_overrides": (None, _IN_FOLDER),
    "hf_token": (None, _FOLDER),
    "kv_cache_dtype": ("auto", "The cache has the dtype of the weights; set dtype."),
    "limit_mm_per_prompt": (None, "A prompt may have as many images as max_model_len has room for."),
    "load_format": ("auto", "Weights are read from safetensors."),
    "logits_processors": (None, "SamplingParams has logit_bias, bad_words, allowed_token_ids, structured_outputs."),
    "mm_processor_kwargs": (None, _IN_FOLDER),
    "override_generation_config": (None, "Give SamplingParams of your own."),
    "pipeline_parallel_size": (1, _ONE_DEVICE),
    "pooler_config": (None, "An embedding is the last hidden state at the last token, of norm 1."),
    "quantization": (None, "Weights are held in dtype: bfloat16, float16 or float32."),
    "revision": (None, _FOLDER),
    "served_model_name": (None, "The name is that of the checkpoint's folder."),
    "skip_tokenizer_init": (False, "Leave it out, and give prompt_token_ids."),
    "speculative_config": (None, "speculative_tokens=N guesses N tokens from the prompt."),
    "tensor_parallel_size": (1, _ONE_DEVICE),
    "tokenizer": (None, _IN_FOLDER),
    "tokenizer_mode": ("auto", _IN_FOLDER),
    "tokenizer_revision": (None, _FOLDER),
    "trust_remote_code": (False, "Code from a checkpoint is never run; architectures are known or not."),
}
"""The one value that holds here, and what to do for another."""

RECOMMENDED = {name: name for name in ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")} | {
    "max_new_tokens": "max_tokens"
}
"""What of a generation config is a field of `SamplingParams`, as vLLM reads it."""


def engine_config(given: Mapping[str, Any], *, is_on_gpu: bool) -> EngineConfig:
    """The settings under our names and vLLM's; None is the default.

    `gpu_memory_utilization` is taken for a share of what the weights leave free; on a CPU it says nothing.

    Raises:
        ConfigurationError: a name that nobody knows, or a value that cannot be had here, with what to use.
    """
    ours = [field.name for field in fields(EngineConfig)]
    settings: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name, value in given.items():
        meant = RENAMED.get(name, name)
        if name in WITHOUT_EFFECT:
            continue
        if name in FIXED:
            held, remedy = FIXED[name]
            if value is not None and value != held:
                raise ConfigurationError(f"{name} can only be {held!r} here. {remedy}")
        elif meant not in ours:
            raise ConfigurationError(f"LLM has no setting {name!r}. Those of the engine are {', '.join(ours)}.")
        elif value is not None and (is_on_gpu or name != GPU_SHARE):
            if meant in settings:
                raise ConfigurationError(f"{names[meant]} and {name} are one setting here. Give one of them.")
            settings[meant] = float(value) if name == GPU_SHARE and isinstance(value, int) else value
            names[meant] = name
    return EngineConfig(**settings)


def default_sampling(folder: Path) -> SamplingParams:
    """What the generation config of a checkpoint recommends; vLLM's own defaults for what it leaves open.

    Raises:
        CheckpointError: a value of it cannot be used.
    """
    recommended = read_json(folder / "generation_config.json")
    found = {ours: recommended[name] for name, ours in RECOMMENDED.items() if recommended.get(name) is not None}
    try:
        return SamplingParams(**found)
    except (InvalidRequestError, TypeError):
        raise CheckpointError(
            f"generation_config.json of {folder} has a value that is no setting of sampling. Mend it, or give "
            "SamplingParams of your own."
        ) from None
