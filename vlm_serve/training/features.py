"""What a vision tower gives for the images of studies, computed once and kept on disk for every epoch.

Files go the way that they go in the server: decoded by `clinical`, processed by the family, encoded in batches.
"""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vlm_serve.clinical.decode import decode
from vlm_serve.config import DecodeLimits
from vlm_serve.digests import file_digest
from vlm_serve.errors import CheckpointError, ImageError, InvalidRequestError
from vlm_serve.families.base import ModelFamily, uninitialized
from vlm_serve.layers.loading import load_checkpoint
from vlm_serve.training.batches import FeatureArray
from vlm_serve.training.dataset import Study
from vlm_serve.training.progress import Progress

BATCH_IMAGES = 16
_VERSION = 1
"""Raised when the way from a file to its features changes, so that older ones are not taken for them."""


def load_vision(family: ModelFamily, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Tower and projector of a checkpoint folder, frozen and in eval mode; the decoder stays on disk.

    Raises:
        CheckpointError: the model takes no images, or the weights do not fit the config.
    """

    def rename(name: str) -> str | None:
        canonical = family.rename(name)
        return None if canonical is None or canonical.startswith("decoder.") else canonical

    with uninitialized(dtype, device):
        vision, projector = family.build_vision(), family.build_projector()
    if vision is None or projector is None:
        raise CheckpointError(f"The model in {family.folder} takes no images. Train on one that does.")
    parts = nn.ModuleDict({"vision": vision, "projector": projector})
    load_checkpoint(family.folder, parts, rename, quantization=family.quantization)
    parts.requires_grad_(False).eval()
    return parts["vision"], parts["projector"]


@torch.inference_mode()
def encode_studies(
    family: ModelFamily,
    vision: nn.Module,
    studies: Sequence[Study],
    limits: DecodeLimits,
    folder: Path,
    progress: Progress,
) -> FeatureArray:
    """The tower's features of every image, study by study: float16 `[1, images, tokens, out_features]`, read from
    disk as they are asked for.

    Args:
        vision: of `load_vision`.
        folder: where they are kept, under a digest of the model, the tower's dtype and the files; what lies there
            under that name is taken as it is. Made if need be, for this user alone.

    Raises:
        ImageError: a file cannot be used; it names the study by its id.
    """
    files = [(study, number, path) for study in studies for number, path in enumerate(study.images, start=1)]
    dtype = next(vision.parameters()).dtype
    sha = hashlib.sha256(repr((_VERSION, family.model_digest, dtype)).encode())
    for _, _, path in files:
        sha.update(file_digest(path).encode())
    kept = folder / f"features-{sha.hexdigest()[:32]}.npy"
    if not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = kept.with_suffix(f".{os.getpid()}.tmp")
        try:
            _encode(family, vision, files, limits, draft, progress)
            draft.replace(kept)
        finally:
            with contextlib.suppress(FileNotFoundError):
                draft.unlink()
    features: FeatureArray = np.load(kept, mmap_mode="r", allow_pickle=False)
    return features


def _encode(
    family: ModelFamily,
    vision: nn.Module,
    files: Sequence[tuple[Study, int, Path]],
    limits: DecodeLimits,
    draft: Path,
    progress: Progress,
) -> None:
    weight = next(vision.parameters())
    array: np.memmap | None = None
    with progress.task("encoding the images", len(files)) as task:
        for start in range(0, len(files), BATCH_IMAGES):
            batch = [_pixels(family, *file, limits) for file in files[start : start + BATCH_IMAGES]]
            pixels = torch.from_numpy(np.stack(batch)).to(weight.device, weight.dtype)
            # The largest float16 stands for what is larger: towers have few outliers, if any.
            encoded = vision(pixels).float().clamp(-65504, 65504).to(torch.float16).cpu().numpy()
            if array is None:
                shape = (1, len(files), *encoded.shape[1:])
                array = np.lib.format.open_memmap(draft, mode="w+", dtype=np.float16, shape=shape)
            array[0, start : start + len(batch)] = encoded
            task.advance(len(batch))
    assert array is not None, "every study has an image"
    array.flush()


def _pixels(family: ModelFamily, study: Study, number: int, path: Path, limits: DecodeLimits) -> np.ndarray:
    """`pixel_values` of one file, float32 `[3, H, W]`."""
    place = f"Study {study.id!r}, image {number}"
    try:
        image = decode(path.read_bytes(), "", limits)
    except OSError as error:
        raise InvalidRequestError(f"{place}: the file cannot be read ({error.strerror}).") from None
    except ImageError as error:
        raise type(error)(f"{place}: {error} Mend the file or leave the study out.") from None
    pieces = family.process_image(image)
    inputs = pieces[0]
    if len(pieces) != 1 or isinstance(inputs, str):
        raise CheckpointError(
            f"The model in {family.folder} shows an image in several pieces. Training is for those that take it whole."
        )
    return inputs.tensors["pixel_values"]
