"""The model families, and the choice of the one that a checkpoint folder belongs to."""

from pathlib import Path

import vlm_serve.encoders  # noqa: F401 - the first: it makes sure that torchvision can be imported
from vlm_serve.errors import CheckpointError
from vlm_serve.families.base import ModelFamily, read_json
from vlm_serve.families.demo import Progress, prepare_demo
from vlm_serve.families.llava import LlavaFamily
from vlm_serve.families.timm_vlm import TimmVlmFamily

FAMILIES: tuple[type[ModelFamily], ...] = (LlavaFamily, TimmVlmFamily)


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
            return family(folder, config)
    raise CheckpointError(
        f"Models of type {config.get('model_type')!r} are not served. Served are LLaVA checkpoints "
        "(model_type 'llava': CLIP or SigLIP tower, Llama-type decoder) and the embedded 'demo'."
    )


def resolve_model(name: str, progress: Progress | None = None) -> Path:
    """The checkpoint folder that `--model` names: `demo`, which is made if need be, or a path.

    Raises:
        CheckpointError: there is no such folder.
        ConfigurationError: the embedded model cannot be made; says what to do.
    """
    if name == "demo":
        return prepare_demo(progress)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"There is no model folder {name}. Give a checkpoint folder, or demo.")
    return folder
