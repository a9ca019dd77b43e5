"""What a DICOM header tells about a picture that its pixels do not show: notes of the receipt, no values of the file's.

Serves `dicom.py`. A note refuses no file: an element that cannot be read says nothing.
"""

import math

from pydicom.dataset import Dataset

from vlm_serve.clinical.elements import code_string, functional_group, numbers
from vlm_serve.errors import CorruptImageError

_PIXEL_SIZES = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio")
"""Each holds the vertical size first (PS3.3 10.7.1.3, C.7.6.3.1.7); the first one that can be used has the word."""

KEYWORDS = ("BurnedInAnnotation", *_PIXEL_SIZES)

_BURNED_IN_MODALITIES = ("US", "XA", "OT", "SC")
_SQUARE_WITHIN = 0.01


def header_notes(dataset: Dataset, frame: int, frames: int) -> tuple[str, ...]:
    """Notes on which frame (from 0) stands for the file, on burned-in text and on pixels that are not square."""
    return (*_frame_notes(frame, frames), *_burned_in_notes(dataset), *_pixel_shape_notes(dataset, frame))


def _frame_notes(frame: int, frames: int) -> tuple[str, ...]:
    return (f"Frame {frame + 1} of {frames}, the middle one, stands for the file.",) if frames > 1 else ()


def _burned_in_notes(dataset: Dataset) -> tuple[str, ...]:
    burned_in = code_string(dataset, "BurnedInAnnotation")
    if burned_in == "YES":
        return ("The file says that text is burned into its pixels; it may identify the patient.",)
    if not burned_in and code_string(dataset, "Modality") in _BURNED_IN_MODALITIES:
        return ("The file does not say whether text is burned into its pixels.",)
    return ()


def _pixel_shape_notes(dataset: Dataset, frame: int) -> tuple[str, ...]:
    measures = functional_group(dataset, frame, "PixelMeasuresSequence")
    for source in (dataset,) if measures is None else (measures, dataset):
        for keyword in _PIXEL_SIZES:
            ratio = _height_over_width(source, keyword)
            if ratio is None:
                continue
            if max(ratio, 1 / ratio) <= 1 + _SQUARE_WITHIN:
                return ()
            return (f"Pixels are not square, {ratio:.3g} times as high as wide; the picture shows them as square.",)
    return ()


def _height_over_width(dataset: Dataset, keyword: str) -> float | None:
    try:
        sizes = numbers(dataset, keyword)
    except (CorruptImageError, ValueError, TypeError, OverflowError, NotImplementedError):
        return None
    if len(sizes) != 2 or not all(size > 0 and math.isfinite(size) for size in sizes):
        return None
    ratio = sizes[0] / sizes[1]
    return ratio if ratio > 0 and math.isfinite(1 / ratio) and math.isfinite(ratio) else None
