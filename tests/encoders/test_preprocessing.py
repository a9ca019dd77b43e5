"""Every family's pixels are, bit for bit, what transformers' own processor of the checkpoint makes of the picture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.families.image_checkpoints import FAMILIES
from tests.families.pictures import picture
from vlm_serve.clinical.image import ClinicalImage
from vlm_serve.errors import ConfigurationError
from vlm_serve.families import load_family
from vlm_serve.families.base import ModelFamily
from vlm_serve.types import ImageInputs

# isort: split
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor
from transformers.image_processing_backends import TorchvisionBackend

SIZES = ((28, 28), (40, 60), (90, 30), (300, 517), (3, 20), (1, 1), (60, 9))

OPTIONS = {"Gemma3, pan and scan": {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20}}
"""What the whole model's processor does not read from the folder."""


def grey(rows: int, columns: int) -> ClinicalImage:
    """As radiographs are: three equal channels."""
    image = picture(rows, columns, seed=9)
    image.pixels[:] = image.pixels[:, :, :1]
    return image


PICTURES = [picture(*size, seed=seed) for seed, size in enumerate(SIZES)] + [grey(*size) for size in SIZES]


def own(family: ModelFamily, image: ClinicalImage) -> np.ndarray:
    """The pixels of all of an image's inputs, `[n, …]`."""
    inputs = [piece for piece in family.process_image(image) if isinstance(piece, ImageInputs)]
    return np.stack([one.tensors["pixel_values"] for one in inputs])


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("timm")])
def test_pixels_equal_those_of_transformers_processor(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = FAMILIES[name](tmp_path, monkeypatch)
    family = load_family(folder)
    # The folder of the original LLaVA has no processor; the same model in transformers' form lies beside it.
    processor = AutoProcessor.from_pretrained(tmp_path / "hf" if name == "LLaVA, original" else folder)
    for image in PICTURES:
        made = processor(
            images=[Image.fromarray(image.pixels)],
            text=family.template_image,
            return_tensors="np",
            **OPTIONS.get(name, {}),
        )
        expected, pixels = np.asarray(made["pixel_values"]), own(family, image)
        if name.startswith("Qwen"):  # pairs of frames, which are alike; one of them is kept
            frames = expected.reshape(len(expected), 3, 2, -1)
            np.testing.assert_array_equal(frames[:, :, 0], frames[:, :, 1])
            expected = frames[:, :, 0].reshape(1, len(expected), -1)
        assert pixels.dtype == np.float32
        np.testing.assert_array_equal(pixels, expected.reshape(pixels.shape), err_msg=f"{image.pixels.shape}")


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("timm")])
def test_a_processor_is_told_the_device_on_which_to_compute(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where it has computed elsewhere, its pixels come back."""
    family = load_family(FAMILIES[name](tmp_path, monkeypatch))
    expected, seen = own(family, PICTURES[1]), []
    put = TorchvisionBackend.process_image

    def looking(self: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(options["device"])
        return put(self, *arguments, **options)

    monkeypatch.setattr(TorchvisionBackend, "process_image", looking)
    own(family, PICTURES[1])
    family.process_pixels_on(torch.device("cpu", 0))
    np.testing.assert_array_equal(own(family, PICTURES[1]), expected)
    assert seen == [None, torch.device("cpu", 0)]


@pytest.mark.parametrize("name", ["LLaVA", "timm"])
def test_a_processor_of_a_cpu_alone_is_refused_for_a_gpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = FAMILIES[name](tmp_path, monkeypatch)
    family: Any = load_family(folder)
    if name == "LLaVA":
        family._image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    with pytest.raises(ConfigurationError, match=r"computes on a CPU alone\. Leave image_processor_device out"):
        family.process_pixels_on(torch.device("cuda"))
