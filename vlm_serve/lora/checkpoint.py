"""A PEFT adapter folder, read and checked: every matrix has its module, its shape and its scaling.

An adapter that does not fit is refused by name here, so that none can silently do nothing.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vlm_serve.errors import AdapterError
from vlm_serve.layers.linear import LoraPair
from vlm_serve.layers.loading import Splitter, whole

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_LORA_TENSOR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """One adapter in host memory: for each module of the model by its canonical name (`decoder.layers.0.
    self_attn.q_proj`, `vision.…`, `projector.…`) the pair A `[r, in]`, B `[out, r]` with the scaling folded into B.
    """

    digest: str
    modules: Mapping[str, LoraPair]

    @property
    def max_rank(self) -> int:
        return max(a.shape[0] for a, _ in self.modules.values())

    @property
    def image_modules(self) -> list[str]:
        """Those of the tower and the projector, which change the embeddings of images."""
        return [name for name in self.modules if not name.startswith("decoder.")]


def read_adapter(
    folder: Path,
    digest: str,
    rename: Callable[[str], str | None],
    shapes: Mapping[str, tuple[int, int]],
    max_rank: int,
    split: Splitter = whole,
) -> AdapterWeights:
    """Reads a folder as `peft` saves it (LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732).

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        digest: the adapter's identity.
        rename: the family's map from a checkpoint's tensor name to the model's. What it maps to None is passed over, as
            the base's own weights there are: layers of the tower behind those whose states are taken.
        shapes: `(in_features, out_features)` of every module that can take an adapter, by canonical name.
        max_rank: the largest rank that is served.
        split: as `load_checkpoint` takes it, for modules that the checkpoint keeps merged.

    Raises:
        AdapterError: names what is unsupported, unmatched, misshapen or too large.
    """
    config = _read_config(folder)
    pairs = _pair_up(folder, _read_tensors(folder))
    modules: dict[str, LoraPair] = {}
    for module, sides in pairs.items():
        if sides.keys() != {"A", "B"}:
            raise AdapterError(f"Adapter {folder.name}: {module} has one of lora_A and lora_B only. Save it again.")
        a = sides["A"]
        rank = a.shape[0]
        if rank > max_rank:
            raise AdapterError(
                f"Adapter {folder.name}: {module} has rank {rank}; this server takes up to {max_rank}. "
                "Raise --max-adapter-rank."
            )
        renamed = rename(f"{module}.weight")
        for name, b in () if renamed is None else split(renamed, sides["B"]):
            canonical = name.removesuffix(".weight")
            if canonical not in shapes:
                raise AdapterError(
                    f"Adapter {folder.name}: its module {module} matches nothing in the base model that can take an "
                    "adapter. Check that it was trained on this base; linear layers can be adapted, of the decoder's "
                    "blocks, the tower and the projector."
                )
            expected = ((rank, shapes[canonical][0]), (shapes[canonical][1], rank))
            if (tuple(a.shape), tuple(b.shape)) != expected:
                raise AdapterError(
                    f"Adapter {folder.name}: {module} has shapes {tuple(a.shape)} and {tuple(b.shape)} where the base "
                    f"model takes {expected[0]} and {expected[1]}. It belongs to another base model."
                )
            modules[canonical] = (a, b * _scaling(config, module, rank))
    if not modules:
        raise AdapterError(f"Adapter {folder.name} holds no LoRA matrices that change an answer of the base model.")
    return AdapterWeights(digest, modules)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        raise AdapterError(f"Adapter {folder.name}: {CONFIG_FILE} cannot be read ({error}).") from None
    unsupported = {
        f"peft_type {config.get('peft_type')}": config.get("peft_type") != "LORA",
        "use_dora": config.get("use_dora"),
        "modules_to_save": config.get("modules_to_save"),
        f"bias {config.get('bias')!r}": config.get("bias", "none") != "none",
        "lora_bias": config.get("lora_bias"),
        "fan_in_fan_out": config.get("fan_in_fan_out"),
        "target_parameters": config.get("target_parameters"),
        "trainable_token_indices": config.get("trainable_token_indices"),
    }
    if found := [name for name, present in unsupported.items() if present]:
        raise AdapterError(
            f"Adapter {folder.name} uses {', '.join(found)}, which would change the base model's own weights or "
            "is no LoRA. Train a plain LoRA adapter, or merge this one into its base model."
        )
    return config  # type: ignore[no-any-return]


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise AdapterError(
            f"Adapter {folder.name} has no {WEIGHTS_FILE}. Save it with safetensors; pickled weights are not opened."
        )
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"Adapter {folder.name}: {WEIGHTS_FILE} is damaged ({error}). Copy it again.") from None


def _pair_up(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _LORA_TENSOR.match(name)
        if match is None or tensor.dim() != 2:
            raise AdapterError(
                f"Adapter {folder.name}: {name}, of shape {tuple(tensor.shape)}, is no LoRA matrix of a linear layer. "
                "Train one that leaves convolutions, such as a tower's patch embedding, and embeddings as they are."
            )
        pairs.setdefault(match["module"], {})[match["side"]] = tensor
    return pairs


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", 8)
    for pattern, own_alpha in (config.get("alpha_pattern") or {}).items():
        # As PEFT matches them: the pattern is the end of the module's path, at a dot.
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = own_alpha
            break
    return float(alpha / math.sqrt(rank)) if config.get("use_rslora") else float(alpha / rank)
