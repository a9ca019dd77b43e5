"""Random LoRA adapters, made and saved by PEFT."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model


def make_adapter(
    model: Any, folder: Path, *, rank: int, seed: int, targets: str | list[str], **config: Any
) -> PeftModel:
    """Saves a random adapter as `peft` does and returns PEFT's model with it. `model` stays as it is."""
    torch.manual_seed(seed)
    wrapped = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, **config)
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.05
    wrapped.save_pretrained(folder)
    return wrapped.eval()
