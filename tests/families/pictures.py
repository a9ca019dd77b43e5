"""Clinical images of noise, for tests of processors."""

import numpy as np

from vlm_serve.clinical.image import ClinicalImage, ImageReceipt


def picture(rows: int = 40, columns: int = 60, seed: int = 0) -> ClinicalImage:
    """Random RGB pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return ClinicalImage(pixels, ImageReceipt("image/png", "", "", rows, columns, "test"))
