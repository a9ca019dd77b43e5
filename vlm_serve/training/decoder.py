"""The decoder as fine-tuning takes it: transformers' causal language model with a folder's weights, and PEFT's LoRA
on it. What is saved is an adapter in PEFT's format that the engine serves.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from vlm_serve.errors import CheckpointError
from vlm_serve.families.base import ModelFamily, uninitialized
from vlm_serve.layers.loading import read_weights
from vlm_serve.layers.quantization import RoundingError
from vlm_serve.lora.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from vlm_serve.training.fused import CAUSAL_MATMUL, FusedLoraLinear

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer of a block."""

_BODIES = ("model.", "model.language_model.")
"""Where checkpoints keep the decoder's body, by the names of their modules in transformers 5."""


def load_decoder(
    family: ModelFamily, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> LlamaForCausalLM:
    """The decoder of a checkpoint folder, frozen and in eval mode; the tower and the projector stay on disk.

    Raises:
        CheckpointError: it is of another architecture, or weights are missing or of another shape.
    """
    device = device or torch.device("cpu")
    text = family.config.get("text_config")
    if not isinstance(text, dict):
        raise CheckpointError(
            f"Training takes checkpoints whose config.json has a text_config; {family.folder} has none. Save it in "
            "transformers' form."
        )
    text = dict(text)
    config = AutoConfig.for_model(text.pop("model_type", "llama"), **text)
    if not isinstance(config, LlamaConfig):
        raise CheckpointError(f"Training takes decoders of type 'llama' alone; {family.folder} has another.")
    family.untie_a_head_of_its_own()
    config.tie_word_embeddings = family.decoder_config.tie_word_embeddings
    # On a CPU transformers' attention costs a third of a step; see `fused.py`.
    config._attn_implementation = CAUSAL_MATMUL if device.type == "cpu" else "sdpa"
    with uninitialized(dtype, device):
        decoder = LlamaForCausalLM(config)
    decoder.tie_weights()
    _fill(decoder, family)
    return decoder.requires_grad_(False).eval()  # type: ignore[no-any-return]


def _fill(decoder: LlamaForCausalLM, family: ModelFamily) -> None:
    targets = dict(decoder.named_parameters())  # a tied head is not among them
    missing = set(targets)
    for name, tensor in read_weights(family.folder, family.quantization, RoundingError()):
        canonical = family.rename(name) or ""
        if not canonical.startswith("decoder."):
            continue
        inner = canonical.removeprefix("decoder.")
        target = targets.get(inner if inner.startswith("lm_head.") else f"model.{inner}")
        if target is None:
            continue
        if target.shape != tensor.shape:
            raise CheckpointError(
                f"{name} in {family.folder} is {tuple(tensor.shape)}; its config.json says {tuple(target.shape)}."
            )
        target.data.copy_(tensor)
        missing.discard(inner if inner.startswith("lm_head.") else f"model.{inner}")
    if missing:
        raise CheckpointError(f"{family.folder} lacks weights of its decoder: {', '.join(sorted(missing)[:20])}.")


def add_lora(decoder: LlamaForCausalLM, *, rank: int, alpha: int, dropout: float, seed: int) -> PeftModel:
    """Wraps the decoder in PEFT with one fresh LoRA (arXiv 2106.09685) on every linear layer of its blocks.

    A is random by `seed`, B is zero: the model is still the base. The matrices are float32 whatever the base is.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(TARGET_MODULES),
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({nn.Linear: FusedLoraLinear})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a property that transformers renames
        torch.manual_seed(seed)
        model = get_peft_model(decoder, config)
    assert isinstance(model, PeftModel)
    return model


def save_adapter(model: PeftModel, family: ModelFamily, folder: Path, base_model: str) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` (bfloat16), as PEFT does.

    Args:
        model: of `add_lora`.
        family: of the base model; its checkpoint's names become those of the adapter's modules.
        folder: made if need be; the two files are replaced.
        base_model: what the base model is called, a name and no path: adapters travel.
    """
    body = _body(family.rename)
    tensors = {
        name.replace("base_model.model.model.", f"base_model.model.{body}", 1): tensor.to("cpu", torch.bfloat16)
        for name, tensor in get_peft_model_state_dict(model).items()
    }
    config: dict[str, Any] = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": base_model, "inference_mode": True, "target_modules": list(TARGET_MODULES)}
    if body != _BODIES[0]:
        # The tower has layers of the same names; PEFT must not put matrices there.
        config["exclude_modules"] = rf"(?!{body.replace('.', chr(92) + '.')}).*"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    (folder / WEIGHTS_FILE).chmod(0o644)  # it is served by another user than the one who trains
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, default=_plain) + "\n", encoding="utf-8")


def _body(rename: Callable[[str], str | None]) -> str:
    """Where the checkpoint's own names have the decoder's layers."""
    return next(body for body in _BODIES if rename(f"{body}norm.weight") == "decoder.norm.weight")


def _plain(value: object) -> object:
    """Sets and enumerations of PEFT's config as JSON has them."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
