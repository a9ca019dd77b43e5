"""The model families, and the choice of the one that a checkpoint folder belongs to."""

from collections.abc import Iterable
from pathlib import Path

import vlm_serve.encoders  # noqa: F401 - the first: it makes sure that torchvision can be imported
from vlm_serve.errors import CheckpointError
from vlm_serve.families.base import ModelFamily, read_json
from vlm_serve.families.demo import Progress, prepare_demo
from vlm_serve.families.gemma3 import Gemma3Family
from vlm_serve.families.gguf import prepare_gguf
from vlm_serve.families.idefics3 import Idefics3Family
from vlm_serve.families.internvl import InternVlFamily
from vlm_serve.families.llava import LlavaFamily
from vlm_serve.families.llava_next import LlavaNextFamily
from vlm_serve.families.llava_original import OriginalLlavaFamily, OriginalLlavaNextFamily
from vlm_serve.families.llava_rad import LlavaRadFamily
from vlm_serve.families.paligemma import PaliGemmaFamily
from vlm_serve.families.plausible import check_config
from vlm_serve.families.qwen_vl import QwenVlFamily
from vlm_serve.families.text import TextFamily
from vlm_serve.families.timm_vlm import TimmVlmFamily

FAMILIES: tuple[type[ModelFamily], ...] = (
    Gemma3Family,
    Idefics3Family,
    InternVlFamily,
    LlavaRadFamily,
    OriginalLlavaNextFamily,
    OriginalLlavaFamily,
    LlavaFamily,
    LlavaNextFamily,
    PaliGemmaFamily,
    QwenVlFamily,
    TimmVlmFamily,
    TextFamily,
)


def load_family(folder: Path) -> ModelFamily:
    """The family of a checkpoint folder; its weights are not read yet.

    Raises:
        CheckpointError: it is no checkpoint, or of a kind that is not served.
    """
    config = read_json(folder / "config.json")
    if not config:
        raise CheckpointError(f"{folder} has no config.json: it is not a checkpoint folder. Check --model.")
    for family in FAMILIES:
        if family.matches(config):
            check_config(folder, config)
            return family(folder, config)
    raise CheckpointError(
        f"Models of type {config.get('model_type')!r} are not served (model_type in {folder}/config.json). Served are, "
        f"with images: {_listed(family for family in FAMILIES if family is not TextFamily)}; of text alone: "
        f"{_listed([TextFamily])}; and the embedded demo."
    )


def _listed(families: Iterable[type[ModelFamily]]) -> str:
    return ", ".join(sorted({model_type for family in families for model_type in family.model_types}))


def resolve_model(name: str, progress: Progress | None = None) -> Path:
    """The checkpoint folder that `--model` names: `demo` or a GGUF file, for which one is made if need be, or a path.

    Raises:
        CheckpointError: there is no such folder, or the GGUF file cannot be served.
        ConfigurationError: a folder cannot be made; says what to do.
    """
    if name == "demo":
        return prepare_demo(progress)
    folder = Path(name).expanduser()
    if folder.suffix == ".gguf" and folder.is_file():
        return prepare_gguf(folder, progress or (lambda what: None))
    if not folder.is_dir():
        raise CheckpointError(f"There is no model folder {name}. Give a checkpoint folder, or demo.")
    return folder
