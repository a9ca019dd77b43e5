"""Clinical images of noise, for tests of processors."""

import numpy as np

from vlm_serve.clinical.image import ClinicalImage, ImageReceipt
from vlm_serve.families.base import ModelFamily
from vlm_serve.types import ImageInputs


def picture(rows: int = 40, columns: int = 60, seed: int = 0) -> ClinicalImage:
    """Random RGB pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return ClinicalImage(pixels, ImageReceipt("image/png", "", "", rows, columns, "test"))


def whole(family: ModelFamily, image: ClinicalImage) -> ImageInputs:
    """What a family makes of a picture that it does not cut up."""
    (inputs,) = family.process_image(image)
    assert isinstance(inputs, ImageInputs)
    return inputs
