"""Weights from a checkpoint folder, straight into the parameters of a model.

Safetensors only: they are memory-mapped, read tensor by tensor, and hold no code.
"""

import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from vlm_serve.config import MIB
from vlm_serve.errors import CheckpointError
from vlm_serve.layers.linear import Linear
from vlm_serve.layers.quantization import Quantization, RoundingError

STRETCH = 16 * MIB
"""Bytes of a file that are read through one mapping of it. Pages that have been read count as memory of the process
until their mapping is gone.
"""

COMPARED_ROWS = 1024
"""Rows of two matrices that are compared at once."""

TELL_EVERY = 2.0
"""Seconds between two words on how far the reading is."""

Tell = Callable[[str], None]
"""Told how far the reading is, and what is lost by it."""

Splitter = Callable[[str, torch.Tensor], Iterable[tuple[str, torch.Tensor]]]
"""Takes a tensor of a checkpoint, under the model's name for it, apart into the model's own."""


def whole(name: str, tensor: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
    """The `Splitter` of a checkpoint that keeps nothing merged."""
    yield name, tensor


Writer = Callable[[torch.Tensor], str | None]
"""Copies one whole tensor of a checkpoint to its place; says what does not fit, if it does not."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, by its index where it has one.

    Raises:
        CheckpointError: there are none, or the index names one that is not there.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in _names_of(index)]
        if absent := [file.name for file in files if not file.is_file()]:
            raise CheckpointError(f"{folder} lacks {', '.join(absent)}, which its index names. Copy it there.")
        return files
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} has no .safetensors file. Weights in other formats are not opened: they can hold code. Take the "
            "checkpoint's safetensors, or save it as such where you trust it."
        )
    return files


def _names_of(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is damaged. Copy it again.") from None
    if wrong := [str(name) for name in names if name != Path(str(name)).name or Path(name).suffix != ".safetensors"]:
        raise CheckpointError(
            f"{index} names {', '.join(sorted(wrong)[:5])}: only .safetensors files beside it are read. Copy it again."
        )
    return sorted(names)


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the folder with its name, one at a time, a file's largest modules first: whoever copies them into
    place never needs much memory beside that of the copies. They are views of a mapped file, so keep none for long: a
    module's own come one after the other.
    """
    for file in weight_files(folder):
        for stretch in _stretches(_sizes(file)):
            with safe_open(file, framework="pt") as tensors:
                for name in stretch:
                    yield name, tensors.get_tensor(name)


def read_weights(
    folder: Path, quantization: Quantization | None, error: RoundingError, tell: Tell = lambda what: None
) -> Iterator[tuple[str, torch.Tensor]]:
    """As `read_tensors`, with what is quantized expanded to plain matrices, whose error is added to `error`.

    Raises:
        CheckpointError: a quantized matrix lacks a part of its own, or they do not fit.
    """
    tensors = _telling(read_tensors(folder), folder, tell)
    if quantization is None:
        return tensors
    names = [name for file in weight_files(folder) for name in _sizes(file)]
    return quantization.expand(tensors, names, error)


def differ(folder: Path, rename: Callable[[str], str | None], one: str, other: str) -> bool:
    """Whether the folder has both of two tensors of the model, by the model's names, and they are not alike."""
    found = {rename(name): (file, name) for file in weight_files(folder) for name in _sizes(file)}
    if one not in found or other not in found:
        return False
    (file, name), (other_file, other_name) = found[one], found[other]
    with safe_open(file, framework="pt") as tensors, safe_open(other_file, framework="pt") as other_tensors:
        rows, other_rows = tensors.get_slice(name), other_tensors.get_slice(other_name)
        if rows.get_shape() != other_rows.get_shape():
            return True
        spans = (slice(start, start + COMPARED_ROWS) for start in range(0, rows.get_shape()[0], COMPARED_ROWS))
        return not all(torch.equal(rows[span].float(), other_rows[span].float()) for span in spans)


def _sizes(file: Path) -> dict[str, int]:
    """Bytes of each tensor of a file, by its name.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - not a mapping
            return {name: math.prod(one.get_shape()) * _width(one.get_dtype()) for name, one in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({error}). Copy it again.") from None


def _width(dtype: str) -> int:
    """Bytes of a number of this type of safetensors', such as `BF16` or `F8_E4M3`."""
    bits = re.search(r"\d+", dtype)
    return 1 if bits is None else max(1, int(bits[0]) // 8)


def _stretches(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Names in lists of up to `STRETCH` bytes, those of a module together, the largest module first."""
    modules: dict[str, int] = defaultdict(int)
    for name, size in sizes.items():
        modules[name.rpartition(".")[0]] += size
    stretch: list[str] = []
    total = 0
    for name in sorted(sizes, key=lambda name: (-modules[name.rpartition(".")[0]], name.rpartition(".")[0])):
        if stretch and total + sizes[name] > STRETCH:
            yield stretch
            stretch, total = [], 0
        stretch.append(name)
        total += sizes[name]
    if stretch:
        yield stretch


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    rename: Callable[[str], str | None],
    split: Splitter = whole,
    quantization: Quantization | None = None,
    tell: Tell = lambda what: None,
) -> None:
    """Fills every parameter and persistent buffer of `model`.

    Beside the model itself this takes the memory of one stretch of a file, or of the largest tensor.

    Args:
        folder: the checkpoint.
        model: its parts are `decoder`, and where there is one `vision` and `projector`.
        rename: a checkpoint's name to the model's (`decoder.layers.0.self_attn.q_proj.weight`), or None
            for a tensor that is known to be superfluous.
        split: for checkpoints that keep several of the model's tensors in one.
        quantization: how the checkpoint is quantized.
        tell: told how far the reading is where it takes longer, and what quantization has cost.

    Raises:
        CheckpointError: lists tensors that are missing, that nothing asks for, that have another shape, or that are
            there twice under two names.
    """
    writers = dict(_writers(model))
    tied = {f"{parent}.{part}.weight" for parent, module in _linears(model) if module.tied for part in module.parts}
    extra: list[str] = []
    misshapen: list[str] = []
    filled: set[str] = set()
    twice: list[str] = []
    error = RoundingError()

    def place(name: str, tensor: torch.Tensor) -> None:
        renamed = rename(name)
        for canonical, own in () if renamed is None else split(renamed, tensor):
            if canonical in tied:
                continue
            if canonical not in writers:
                if quantization is None or not quantization.is_filler(name, own):
                    extra.append(name)
                continue
            if problem := writers[canonical](own):
                misshapen.append(f"{name} ({problem})")
            if canonical in filled:
                twice.append(name)
            filled.add(canonical)

    for name, tensor in read_weights(folder, quantization, error, tell):
        place(name, tensor)
        del tensor  # before the next one is made
    missing = writers.keys() - filled
    found = {"missing": missing, "not in the model": extra, "of another shape": misshapen, "there twice": twice}
    problems = [f"{title}: {', '.join(sorted(names))}" for title, names in found.items() if names]
    if problems:
        raise CheckpointError(
            f"The weights in {folder} do not fit its config.json. {'; '.join(problems)}. "
            "Take both from the same checkpoint."
        )
    if quantization is not None:
        tell(f"{quantization.name}, expanded: {error}")


def _telling(
    tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, tell: Tell
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same, and every `TELL_EVERY` seconds the bytes that have been read."""
    total = sum(file.stat().st_size for file in weight_files(folder))
    done, told = 0, time.monotonic()
    for name, tensor in tensors:
        yield name, tensor
        done += tensor.nbytes
        if (now := time.monotonic()) - told >= TELL_EVERY:
            told = now
            tell(f"{min(done, total) / 1e9:.1f} of {total / 1e9:.1f} GB")


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
