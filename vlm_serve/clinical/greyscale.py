"""The greyscale pipeline of PS3.4 N.2 in plain arithmetic: modality, values of interest, 8 bits.

Serves `dicom.py` and `raster.py`. Formulas work on float64 in blocks, so that a large film needs no large
temporaries, and round to the nearest grey only at the end: nothing is clipped on the way.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vlm_serve.clinical.image import WindowReceipt
from vlm_serve.errors import CorruptImageError

PERCENTILES = (1.0, 99.0)
"""What a picture without a window of its own is stretched between."""

_BLOCK = 1 << 20

WINDOW_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


@dataclass(frozen=True, slots=True)
class LookupTable:
    """A modality or VOI LUT (PS3.3 C.11.1.1, C.11.2.1.1): `entries[i]` is for the input `first + i`.

    Inputs below the first or above the last entry take that entry. `entries` hold `bits` bits.
    """

    first: int
    entries: np.ndarray
    bits: int

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Maps values (any shape, whole numbers) to float64 entries."""
        index = np.clip(np.rint(values) - self.first, 0, len(self.entries) - 1).astype(np.intp)
        return np.asarray(self.entries[index], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Window:
    """A window of PS3.3 C.11.2.1.2 in modality units. LINEAR needs a width of 1 at least, the others one above 0."""

    center: float
    width: float
    function: str = "LINEAR"

    @property
    def is_usable(self) -> bool:
        least = self.width >= 1 if self.function == "LINEAR" else self.width > 0
        return bool(np.isfinite(self.center) and np.isfinite(self.width) and least)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Maps modality values (float64, any shape) to 0..1."""
        if self.function == "SIGMOID":
            exponent = np.clip(-4.0 * (values - self.center) / self.width, -700.0, 700.0)  # exp overflows at 709
            return np.asarray(1.0 / (1.0 + np.exp(exponent)))
        if self.function == "LINEAR_EXACT":
            center, width = self.center, self.width
        else:
            center, width = self.center - 0.5, self.width - 1.0
        if width == 0:  # LINEAR of width 1: black up to the centre less one half, white above
            return np.asarray(values > center, dtype=np.float64)
        return np.clip((values - center) / width + 0.5, 0.0, 1.0)


def rescale(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """Modality values, float32 of the same shape: Hounsfield units of a CT are exact, signed or not."""
    if not (np.isfinite(slope) and np.isfinite(intercept)) or slope == 0:
        raise CorruptImageError("Rescale Slope or Rescale Intercept is not usable. Correct the file's header.")
    values = stored.astype(np.float32)
    if slope != 1:
        values *= np.float32(slope)
    if intercept != 0:
        values += np.float32(intercept)
    return values


def percentile_window(values: np.ndarray, ignored: np.ndarray | None = None) -> Window:
    """From the 1st to the 99th percentile of the finite values outside the mask `ignored`.

    Where these are one value, from the least to the greatest; where those are too, that value is black.
    """
    counted = np.isfinite(values)
    if ignored is not None:
        counted &= ~ignored
    sample = values[counted]
    if sample.size == 0:
        return Window(0.5, 1.0, "LINEAR_EXACT")
    low, high = (float(value) for value in np.percentile(sample, PERCENTILES))
    if low == high:
        low, high = float(sample.min()), float(sample.max())
    if low == high:
        high = low + 1.0
    return Window((low + high) / 2, high - low, "LINEAR_EXACT")


def receipt_of(window: Window, source: str) -> WindowReceipt:
    return WindowReceipt(source, window.center, window.width, window.function)


def to_grey(
    values: np.ndarray, transform: Callable[[np.ndarray], np.ndarray], *, inverted: bool, black: np.ndarray | None
) -> np.ndarray:
    """Grey levels, uint8 of the shape of `values`.

    Args:
        values: modality values.
        transform: maps a float64 block of them to 0..1.
        inverted: white stands for the least value.
        black: mask of pixels that are no image (padding), black in either polarity; also what is not a number.
    """
    grey = np.empty(values.shape, np.uint8)
    flat_values, flat_grey = values.reshape(-1), grey.reshape(-1)
    for start in range(0, flat_values.size, _BLOCK):
        block = flat_values[start : start + _BLOCK].astype(np.float64)
        missing = np.isnan(block)
        unit = transform(np.where(missing, 0.0, block))
        levels = np.rint(255.0 * (1.0 - unit if inverted else unit)).astype(np.uint8)
        levels[missing] = 0
        flat_grey[start : start + _BLOCK] = levels
    if black is not None:
        grey[black] = 0
    return grey
