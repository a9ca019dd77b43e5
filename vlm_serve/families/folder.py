"""What transformers reads from a checkpoint folder: config and image processor; nothing is fetched, and none of the
folder's code is run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor, PretrainedConfig

from vlm_serve.errors import CheckpointError, ImageLimitError

MOST_ELONGATED = 200
"""The longer side of an image over the shorter. Qwen's processor takes none past it; one that scales the shorter side
up to its tower's would make gigabytes of a line of pixels.
"""


@contextmanager
def config_errors(folder: Path) -> Iterator[None]:
    """Inside, transformers makes a config of a folder's config.json.

    Raises:
        CheckpointError: it cannot; says why.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"transformers cannot read {folder}/config.json ({reason[:300]}).") from None


def read_config(folder: Path) -> Any:
    """The config, of transformers' class for it, with the defaults that this fills in.

    Raises:
        CheckpointError: it cannot be read.
    """
    with config_errors(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    assert isinstance(config, PretrainedConfig)
    return config


def text_settings(config: Any) -> dict[str, Any]:
    """The text config for `DecoderConfig.from_hf`; a whole model's word embeddings are tied by its outer one."""
    settings: dict[str, Any] = config.text_config.to_dict()
    return settings | {"tie_word_embeddings": config.tie_word_embeddings}


def read_image_processor(folder: Path) -> Any:
    """The image processor.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        made = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError):
        raise CheckpointError(f"{folder} has no image processor that can be read (preprocessor_config.json).") from None
    assert isinstance(made, BaseImageProcessor)
    return made


def check_no_strip(pixels: np.ndarray) -> None:
    """Whether an image, uint8 `[rows, columns, 3]`, is at most `MOST_ELONGATED` times as long as it is wide.

    Raises:
        ImageLimitError: it is not.
    """
    rows, columns = pixels.shape[:2]
    if max(rows, columns) > MOST_ELONGATED * min(rows, columns):
        raise ImageLimitError(
            f"The image is {columns} by {rows} pixels; the model takes none whose longer side is more than "
            f"{MOST_ELONGATED} times the shorter. Crop it."
        )


def process_pixels(processor: Any, pixels: np.ndarray, **options: Any) -> dict[str, np.ndarray]:
    """What an image processor makes of one image, uint8 `[rows, columns, 3]`, by name; float arrays are float32.

    Raises:
        ImageLimitError: the image is a strip.
    """
    check_no_strip(pixels)
    # A copy: torch takes no array that is read-only, as decoded pixels are.
    made = processor(images=pixels.copy(), input_data_format="channels_last", return_tensors="pt", **options)
    arrays = {name: torch.as_tensor(value).cpu().numpy() for name, value in made.items()}
    return {
        name: array.astype(np.float32, copy=False) if np.issubdtype(array.dtype, np.floating) else array
        for name, array in arrays.items()
    }


def square_pixels(folder: Path, processor: Any, pixels: np.ndarray, side: int, **options: Any) -> np.ndarray:
    """What the image processor of a tower for squares makes of one image: float32 `[n, 3, side, side]`, several where
    it cuts the image up.

    Raises:
        CheckpointError: it gives another size than the tower takes.
    """
    made = process_pixels(processor, pixels, **options)["pixel_values"]
    check_square(folder, made, side)
    return made


def check_square(folder: Path, pixel_values: np.ndarray, side: int) -> None:
    """Whether an image processor's `pixel_values`, `[…, 3, side, side]`, are as the tower takes them.

    Raises:
        CheckpointError: they are not.
    """
    if pixel_values.shape[-3:] != (3, side, side):
        raise CheckpointError(
            f"The image processor in {folder} gives {pixel_values.shape[-3:]}, but the tower takes {(3, side, side)}. "
            "Take preprocessor_config.json from the same checkpoint."
        )
