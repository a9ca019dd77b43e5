"""Text models in GGUF files: converted once into a checkpoint folder in the user's cache, served like any other.

The folder holds what is quantized as float16, and what is float32 or bfloat16 as it is.
"""

import glob
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock

from vlm_serve.config import cache_dir
from vlm_serve.digests import folder_digest
from vlm_serve.errors import CheckpointError, ConfigurationError
from vlm_serve.families.gguf_model import GgufModel
from vlm_serve.families.gguf_tokenizer import end_tokens, write_tokenizer
from vlm_serve.layers import loading

VERSION = "2"
"""Raised when the conversion changes, so that a folder of an older one is not taken for it."""

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""In the header of a safetensors file."""


def prepare_gguf(file: Path, report: Callable[[str], None]) -> Path:
    """The checkpoint folder of a GGUF file; it is made if it is not there, whichever process comes first.

    Raises:
        CheckpointError: the file is damaged, in several parts, or of a kind that is not served.
        ConfigurationError: the cache cannot be written.
    """
    report(f"reading {file.name}")
    try:
        digest = folder_digest(file.parent, (glob.escape(file.name),))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}).") from None
    folder = cache_dir() / "models" / f"gguf-{VERSION}-{digest[:12]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():
                draft = folder.with_name(f"{folder.name}.draft")
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()
                try:
                    _convert(GgufModel(file), draft, report)
                    draft.rename(folder)
                finally:
                    shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise ConfigurationError(
            f"{file.name} cannot be converted under {folder.parent} ({error.strerror}). Make room for it as float16, "
            "or name another folder in VLM_SERVE_CACHE."
        ) from None
    return folder


def _convert(model: GgufModel, folder: Path, report: Callable[[str], None]) -> None:
    config = model.config() | {"eos_token_id": end_tokens(model)}
    write_tokenizer(model, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if isinstance(template := model.field("tokenizer.chat_template"), str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _write_weights(model, folder / "model.safetensors", report)


def _write_weights(model: GgufModel, path: Path, report: Callable[[str], None]) -> None:
    """A safetensors file, piece by piece: all of the model is never in memory.

    Format: https://huggingface.co/docs/safetensors/index, the length of the header, the header, the tensors.
    """
    tensors = list(model.tensors())
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    total = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (total, total + size),
        }
        total += size
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    report(f"converting {model.path.name} to {total / 1e6:,.0f} MB of weights")
    done, told = 0, time.monotonic()
    with path.open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        for tensor in tensors:
            for piece in tensor.pieces():
                done += file.write(piece.contiguous().view(torch.uint8).numpy().data)
                if (now := time.monotonic()) - told >= loading.TELL_EVERY:
                    told = now
                    report(f"converted {done / 1e6:,.0f} of {total / 1e6:,.0f} MB")
