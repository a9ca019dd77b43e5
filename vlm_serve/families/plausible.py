"""The fields of a config.json that a model's size follows from, looked at before anything is made of them: one zero too
many would take all of the memory.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.activations import ACT2FN

from vlm_serve.errors import CheckpointError

LAYERS, WIDTH, ENTRIES = 1 << 10, 1 << 17, 1 << 24

MOST: dict[str, int] = {
    **dict.fromkeys(("num_hidden_layers", "depth"), LAYERS),
    **dict.fromkeys(("hidden_size", "embed_dim", "out_hidden_size", "projection_dim", "head_dim"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_kv_heads", "num_heads"), WIDTH),
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"), WIDTH),
    **dict.fromkeys(("image_size", "patch_size", "temporal_patch_size", "in_channels", "num_channels"), WIDTH),
    **dict.fromkeys(("spatial_merge_size", "scale_factor", "window_size", "mm_tokens_per_image"), WIDTH),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "ffn_dim", "ffn_hidden_size"), ENTRIES),
    **dict.fromkeys(("vocab_size", "num_position_embeddings", "max_position_embeddings"), ENTRIES),
    **dict.fromkeys(("image_token_id", "image_token_index", "boi_token_index", "eoi_token_index"), ENTRIES),
}
"""The most that a whole number may be, far above every published model's. All but tokens are at least 1."""

REQUIRED = (
    *("model_type", "text_config", "vision_config", "image_token_id", "image_token_index"),
    *("image_size", "patch_size", "mm_tokens_per_image", "max_position_embeddings"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "activation", "activation_function"),
)
"""Fields that may be left out, but not be null."""

ACTIVATIONS = ("hidden_act", "hidden_activation", "projector_hidden_act", "activation_function", "activation")


def check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Whether a config.json, and the text and vision configs in it, can be those of a model.

    Raises:
        CheckpointError: a field cannot; names it.
    """
    for part in ("", "text_config", "vision_config"):
        settings = config.get(part, {}) if part else config
        if settings is None:
            continue  # it is refused as a field
        if not isinstance(settings, Mapping):
            raise _refusal(folder, part, settings, "an object")
        for name, value in settings.items():
            if wanted := _wanted(name, value):
                raise _refusal(folder, f"{part}.{name}".lstrip("."), value, wanted)


def _wanted(name: str, value: object) -> str | None:
    """What a field must be, if its value is not."""
    if value is None:
        return "a value, or be left out" if name in REQUIRED else None
    if name == "model_type" and not isinstance(value, str):
        return "a name"
    if name in ACTIVATIONS and not (isinstance(value, str) and value in ACT2FN):
        return f"one of {', '.join(sorted(ACT2FN))}"
    if name in MOST:
        least = 0 if "token_i" in name else 1
        sides = value if isinstance(value, list) and value else [value]  # a picture's may be two
        if not all(type(side) is int and least <= side <= MOST[name] for side in sides):
            return f"a whole number from {least} to {MOST[name]}"
    return None


def _refusal(folder: Path, name: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{name} in {folder}/config.json is {repr(value)[:80]}; it must be {wanted}. Take the file from the same "
        "checkpoint as the weights."
    )
