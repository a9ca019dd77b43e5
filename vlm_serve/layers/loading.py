"""Weights from a checkpoint folder, straight into the parameters of a model.

Safetensors only: they are memory-mapped, read tensor by tensor, and hold no code.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from vlm_serve.errors import CheckpointError
from vlm_serve.layers.linear import Linear

Writer = Callable[[torch.Tensor], str | None]
"""Copies one whole tensor of a checkpoint to its place; says what does not fit, if it does not."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, by its index where it has one.

    Raises:
        CheckpointError: there are none, or the index names one that is not there.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / Path(name).name for name in names]
        if absent := [file.name for file in files if not file.is_file()]:
            raise CheckpointError(f"{folder} lacks {', '.join(absent)}, which its index names. Copy it there.")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no .safetensors file. Weights in other formats are not opened.")
    return files


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the folder with its name, one at a time."""
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged ({error}). Copy it again.") from None


def load_checkpoint(folder: Path, model: nn.Module, rename: Callable[[str], str | None]) -> None:
    """Fills every parameter and persistent buffer of `model`.

    Args:
        folder: the checkpoint.
        model: its parts are `decoder`, and where there is one `vision` and `projector`.
        rename: a checkpoint's name to the model's (`decoder.layers.0.self_attn.q_proj.weight`), or None
            for a tensor that is known to be superfluous.

    Raises:
        CheckpointError: lists tensors that are missing, that nothing asks for, or that have another shape.
    """
    writers = dict(_writers(model))
    tied = {f"{parent}.{part}.weight" for parent, module in _linears(model) if module.tied for part in module.parts}
    missing, extra, misshapen = set(writers), [], []
    for name, tensor in read_tensors(folder):
        canonical = rename(name)
        if canonical is None or canonical in tied:
            continue
        if canonical not in writers:
            extra.append(name)
            continue
        if problem := writers[canonical](tensor):
            misshapen.append(f"{name} ({problem})")
        missing.discard(canonical)
    problems = [
        f"{title}: {', '.join(sorted(names)[:20])}{f' and {len(names) - 20} more' if len(names) > 20 else ''}"
        for title, names in (("missing", missing), ("not in the model", extra), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"The weights in {folder} do not fit its config.json. {'; '.join(problems)}. "
            "Take both from the same checkpoint."
        )


def pack_linears(model: nn.Module) -> None:
    """Gives every `Linear` its final form, one at a time, so that no second copy of the model ever exists."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.pack()


def _linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Every `Linear` with the path of the module that holds it."""
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            yield path.rpartition(".")[0], module


def _writers(model: nn.Module) -> Iterator[tuple[str, Writer]]:
    """By canonical name, how each tensor of the checkpoint gets to its place."""
    inside_linear: set[int] = set()
    for parent, module in _linears(model):
        inside_linear.update(id(tensor) for tensor in (module.weight, module.bias) if tensor is not None)
        if module.tied:
            inside_linear.discard(id(module.weight))
            continue
        for part in module.parts:
            yield f"{parent}.{part}.weight", _linear_writer(module, part, "weight")
            if module.bias is not None:
                yield f"{parent}.{part}.bias", _linear_writer(module, part, "bias")
    for name, tensor in model.named_parameters():
        if id(tensor) not in inside_linear:
            yield name, _plain_writer(tensor.data)
    persistent = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in persistent:
            yield name, _plain_writer(buffer)


def _plain_writer(target: torch.Tensor) -> Writer:
    def write(whole: torch.Tensor) -> str | None:
        if whole.shape != target.shape:
            return f"{tuple(whole.shape)} instead of {tuple(target.shape)}"
        target.copy_(whole)
        return None

    return write


def _linear_writer(module: Linear, part: str, kind: Literal["weight", "bias"]) -> Writer:
    def write(whole: torch.Tensor) -> str | None:
        width = module.whole_parts[part]
        expected = (width, module.whole_in_features) if kind == "weight" else (width,)
        if tuple(whole.shape) != expected:
            return f"{tuple(whole.shape)} instead of {expected}"
        target = module.target(part, kind)
        assert target is not None
        target.copy_(module.share_of(whole, kind))
        return None

    return write
