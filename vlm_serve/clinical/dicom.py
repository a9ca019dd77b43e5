"""A DICOM file to a `ClinicalImage`: header checks, one decoded frame, the display pipeline, the receipt.

Serves `decode.py`. Everything that costs memory is checked against the limits before it is allocated.
"""

import dataclasses
import hashlib

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut
from pydicom.uid import UID, ExplicitVRBigEndian

from vlm_serve.clinical.attributes import KEYWORDS as ATTRIBUTE_KEYWORDS
from vlm_serve.clinical.attributes import allowed_attributes
from vlm_serve.clinical.elements import code_string, functional_group, items, lookup_table, numbers, whole_number
from vlm_serve.clinical.greyscale import (
    WINDOW_FUNCTIONS,
    LookupTable,
    Window,
    percentile_window,
    receipt_of,
    rescale,
    to_grey,
)
from vlm_serve.clinical.image import ClinicalImage, ImageReceipt, WindowReceipt
from vlm_serve.clinical.notes import KEYWORDS as NOTE_KEYWORDS
from vlm_serve.clinical.notes import header_notes
from vlm_serve.clinical.part10 import read_part10
from vlm_serve.clinical.pixels import PixelLayout, check_supported, decode_frame
from vlm_serve.config import MIB, DecodeLimits
from vlm_serve.errors import CorruptImageError, ImageLimitError, UnsupportedImageError

MEDIA_TYPE = "application/dicom"

_PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_PALETTE_KEYWORDS = tuple(
    f"{segmented}{color}PaletteColorLookupTable{part}"
    for color in ("Red", "Green", "Blue")
    for segmented, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
)
_KEYWORDS = (
    *_PIXEL_KEYWORDS,
    *_PALETTE_KEYWORDS,
    *ATTRIBUTE_KEYWORDS,
    *NOTE_KEYWORDS,
    *("SOPClassUID", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "NumberOfFrames"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"),
    *("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "PresentationLUTShape"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)

_MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
_COLOR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


def decode_dicom(data: bytes, limits: DecodeLimits) -> ClinicalImage:
    """Decodes the middle frame of a DICOM file for display.

    Raises:
        ImageError: as its class says; `decode.py` translates what else the parsers throw.
    """
    file = read_part10(data, limits, _KEYWORDS)
    dataset = file.dataset
    check_supported(file.transfer_syntax)
    layout = _layout(dataset, file.transfer_syntax)
    _check_size(layout, limits)
    frame = layout.frames // 2
    stored = decode_frame(dataset[layout.keyword].value, layout, frame, _extended_offsets(dataset))
    attributes, notes = allowed_attributes(dataset)
    receipt = ImageReceipt(
        media_type=MEDIA_TYPE,
        file_sha256=hashlib.sha256(data).hexdigest(),
        pixel_sha256="",
        rows=layout.rows,
        columns=layout.columns,
        decoder=stored.decoder,
        transfer_syntax=file.transfer_syntax,
        photometric_interpretation=layout.photometric_interpretation,
        bits_stored=layout.bits_stored,
        frame=frame,
        frames=layout.frames,
        attributes=attributes,
        notes=(*header_notes(dataset, frame, layout.frames), *notes),
    )
    if layout.photometric_interpretation in _MONOCHROME:
        return _render_greyscale(dataset, layout, stored.values, receipt)
    if layout.photometric_interpretation == "PALETTE COLOR":
        return finish(_render_palette(dataset, layout, stored.values), receipt)
    if stored.photometric_interpretation != "RGB":
        raise UnsupportedImageError("The colours of the file cannot be converted to RGB. Export the file as RGB.")
    return finish(to_8_bits(stored.values, layout.bits_stored), receipt)


def finish(pixels: np.ndarray, receipt: ImageReceipt) -> ClinicalImage:
    """Makes the pixels three channels of C order, and the receipt whole with their digest."""
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, np.newaxis], 3, axis=2)
    pixels = np.ascontiguousarray(pixels)
    sha = hashlib.sha256(repr((pixels.dtype.str, pixels.shape)).encode())
    sha.update(pixels.data)
    return ClinicalImage(pixels, dataclasses.replace(receipt, pixel_sha256=sha.hexdigest()))


def to_8_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned samples of `bits` bits to uint8, the full range to the full range, rounded to the nearest."""
    if bits == 8:
        return values.astype(np.uint8)
    greatest = float(2**bits - 1)
    return to_grey(values, lambda block: np.clip(block / greatest, 0.0, 1.0), inverted=False, black=None)


# --- header ------------------------------------------------------------------


def _layout(dataset: Dataset, transfer_syntax: str) -> PixelLayout:
    """Group 0028, each number checked on its own."""
    present = [keyword for keyword in _PIXEL_KEYWORDS if keyword in dataset]
    if not present:
        raise UnsupportedImageError(
            f"The file is a DICOM object without pixels ({_sop_class_name(dataset)}). Send an image object."
        )
    keyword = present[0]
    photometric = code_string(dataset, "PhotometricInterpretation")
    if photometric not in (*_MONOCHROME, *_COLOR, "PALETTE COLOR"):
        raise UnsupportedImageError(
            "The photometric interpretation of the file is missing or not supported. "
            f"Supported are {', '.join((*_MONOCHROME, 'PALETTE COLOR', *_COLOR))}."
        )
    allocated = whole_number(dataset, "BitsAllocated")
    stored = whole_number(dataset, "BitsStored", allocated)
    layout = PixelLayout(
        transfer_syntax=transfer_syntax,
        photometric_interpretation=photometric,
        rows=whole_number(dataset, "Rows"),
        columns=whole_number(dataset, "Columns"),
        samples_per_pixel=whole_number(dataset, "SamplesPerPixel", 1),
        bits_allocated=allocated,
        bits_stored=stored,
        pixel_representation=whole_number(dataset, "PixelRepresentation", 0),
        planar_configuration=whole_number(dataset, "PlanarConfiguration", 0),
        frames=whole_number(dataset, "NumberOfFrames", 1),
        keyword=keyword,
        vr=dataset[keyword].VR if dataset[keyword].VR in ("OB", "OW") else "OW",
    )
    _check_layout(dataset, layout)
    return layout


def _check_layout(dataset: Dataset, layout: PixelLayout) -> None:
    allowed_bits = {"PixelData": (1, 8, 16, 32), "FloatPixelData": (32,), "DoubleFloatPixelData": (64,)}
    samples = 3 if layout.photometric_interpretation in _COLOR else 1
    is_consistent = (
        layout.rows > 0
        and layout.columns > 0
        and layout.frames > 0
        and layout.samples_per_pixel == samples
        and layout.bits_allocated in allowed_bits[layout.keyword]
        and 0 < layout.bits_stored <= layout.bits_allocated
        and layout.pixel_representation in (0, 1)
        and layout.planar_configuration in (0, 1)
        and not (samples == 3 and (layout.is_signed or layout.bits_allocated == 1))
        and not (layout.photometric_interpretation == "PALETTE COLOR" and layout.bits_allocated not in (8, 16))
    )
    if not is_consistent:
        raise CorruptImageError(
            "The pixel description of the file's header contradicts itself (rows, columns, frames, samples, bits). "
            "Export the file again from its source."
        )
    if layout.bits_allocated > 1 and whole_number(dataset, "HighBit", layout.bits_stored - 1) != layout.bits_stored - 1:
        raise UnsupportedImageError(
            "High Bit is not Bits Stored - 1: the samples do not lie in the low bits. Export the file again."
        )
    if layout.photometric_interpretation.startswith("YBR") and layout.bits_allocated != 8:
        raise UnsupportedImageError("YBR images of other than 8 bits are not supported. Export the file as RGB.")


def _check_size(layout: PixelLayout, limits: DecodeLimits) -> None:
    if max(layout.rows, layout.columns) > limits.max_dimension:
        raise ImageLimitError(
            f"The image is {layout.columns}×{layout.rows}; at most {limits.max_dimension} rows and columns are decoded."
        )
    if layout.frames > limits.max_frames:
        raise ImageLimitError(f"The file has {layout.frames} frames; at most {limits.max_frames} are accepted.")
    sample_bytes = max(1, layout.bits_allocated // 8)
    frame_bytes = layout.rows * layout.columns * max(3, layout.samples_per_pixel * sample_bytes)
    if frame_bytes > limits.max_decoded_bytes:
        raise ImageLimitError(
            f"A decoded frame takes {frame_bytes // MIB} MiB; at most {limits.max_decoded_bytes // MIB} are allowed."
        )


def _sop_class_name(dataset: Dataset) -> str:
    value = dataset.get("SOPClassUID")
    uid = UID(value) if isinstance(value, str) else UID("")
    # An unknown UID is its own name, and may identify whoever made it up.
    return uid.name if uid.type == "SOP Class" else "no SOP class that the standard knows"


def _extended_offsets(dataset: Dataset) -> tuple[bytes, bytes] | None:
    offsets, lengths = dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths")
    return (offsets, lengths) if isinstance(offsets, bytes) and isinstance(lengths, bytes) else None


# --- greyscale ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _ModalityValues:
    """What the modality transform made of the stored values.

    Attributes:
        values: float32, or the stored ones where the file declares no transform.
        transform: a word on how, None where the file declares none.
        are_stored: no value was changed.
        may_be_negative: the least value that the file's samples can take is below zero.
    """

    values: np.ndarray
    transform: str | None
    are_stored: bool
    may_be_negative: bool


def _render_greyscale(
    dataset: Dataset, layout: PixelLayout, stored: np.ndarray, receipt: ImageReceipt
) -> ClinicalImage:
    padding = _padding_mask(dataset, layout, stored)
    modality = _modality_values(dataset, layout, stored, receipt.frame)
    transform, window, notes = _values_of_interest(dataset, layout, modality, padding, receipt.frame)
    # INVERSE is how an image of the DX family repeats its MONOCHROME1 (PS3.3 C.8.11.3.1.2), not a second inversion.
    inverted = (
        layout.photometric_interpretation == "MONOCHROME1" or code_string(dataset, "PresentationLUTShape") == "INVERSE"
    )
    if padding is not None and padding.any():
        notes = (*notes, "Padding pixels are black and count in no statistics.")
    if any(keyword in dataset for keyword in _PALETTE_KEYWORDS):
        notes = (*notes, "The supplemental palette of the file was not applied; the picture shows greys alone.")
    pixels = to_grey(modality.values, transform, inverted=inverted, black=padding)
    return finish(
        pixels,
        dataclasses.replace(
            receipt,
            modality_transform=modality.transform,
            window=window,
            inverted=inverted,
            notes=(*receipt.notes, *notes),
        ),
    )


def _padding_mask(dataset: Dataset, layout: PixelLayout, stored: np.ndarray) -> np.ndarray | None:
    """Pixels that are no part of the image (PS3.3 C.7.5.1.1.2), None where the file declares none."""
    if "PixelPaddingValue" not in dataset or layout.keyword != "PixelData":
        return None
    value = _like_stored(whole_number(dataset, "PixelPaddingValue", 0), layout)
    limit = _like_stored(whole_number(dataset, "PixelPaddingRangeLimit", value), layout)
    return (stored >= min(value, limit)) & (stored <= max(value, limit))


def _like_stored(value: int, layout: PixelLayout) -> int:
    """Padding is often written in the VR of the other sign."""
    if layout.is_signed and value > 0x7FFF and layout.bits_allocated == 16:
        return value - 0x10000
    if not layout.is_signed and value < 0:
        return value + (1 << layout.bits_allocated)
    return value


def _modality_values(dataset: Dataset, layout: PixelLayout, stored: np.ndarray, frame: int) -> _ModalityValues:
    if tables := items(dataset, "ModalityLUTSequence"):
        table = _table_of(tables[0], layout, is_signed=layout.is_signed)
        values = table(stored).astype(np.float32)
        name = f"modality LUT of {len(table.entries)} entries"
        return _ModalityValues(values, name, are_stored=np.array_equal(values, stored), may_be_negative=False)
    source = functional_group(dataset, frame, "PixelValueTransformationSequence") or dataset
    slopes, intercepts = numbers(source, "RescaleSlope"), numbers(source, "RescaleIntercept")
    is_float = layout.keyword != "PixelData"
    if not slopes and not intercepts:
        return _ModalityValues(stored, None, are_stored=True, may_be_negative=layout.is_signed or is_float)
    slope, intercept = (slopes or [1.0])[0], (intercepts or [0.0])[0]
    values = rescale(stored, slope, intercept)
    least = -(2 ** (layout.bits_stored - 1)) if layout.is_signed else 0
    greatest = least + 2**layout.bits_stored - 1
    return _ModalityValues(
        values,
        f"rescale slope {slope:g} intercept {intercept:g}",
        are_stored=slope == 1 and intercept == 0,
        may_be_negative=is_float or min(slope * least, slope * greatest) + intercept < 0,
    )


def _values_of_interest(
    dataset: Dataset,
    layout: PixelLayout,
    modality: _ModalityValues,
    padding: np.ndarray | None,
    frame: int,
) -> tuple["Window | _UnitTable", WindowReceipt, tuple[str, ...]]:
    """The VOI transform to 0..1: the file's LUT, its first window, or one made here."""
    source = functional_group(dataset, frame, "FrameVOILUTSequence") or dataset
    if tables := items(source, "VOILUTSequence"):
        # PS3.3 C.11.2.1.1: the first value mapped has the sign of what comes in, not of the stored samples.
        table = _table_of(tables[0], layout, is_signed=modality.may_be_negative)
        return _UnitTable(table), WindowReceipt("file VOI LUT", function="LUT"), ()
    notes: tuple[str, ...] = ()
    centers, widths = numbers(source, "WindowCenter"), numbers(source, "WindowWidth")
    if centers and widths:
        function = code_string(source, "VOILUTFunction") or "LINEAR"
        if function not in WINDOW_FUNCTIONS:
            function, notes = "LINEAR", ("The VOI LUT function of the file is not a known one; LINEAR was used.",)
        window = Window(centers[0], widths[0], function)
        if window.is_usable:
            return window, receipt_of(window, f"file window 1 of {min(len(centers), len(widths))}"), notes
        notes = ("The window of the file is not usable.",)
    if layout.bits_stored <= 8 and not layout.is_signed and modality.are_stored:
        # Without a window, 8 bits are grey levels already: stretching them would invent contrast.
        greatest = float(2**layout.bits_stored - 1)
        window = Window(greatest / 2, greatest, "LINEAR_EXACT")
        return window, receipt_of(window, "full range"), notes
    window = percentile_window(modality.values, padding)
    return window, receipt_of(window, "percentile"), notes


@dataclasses.dataclass(frozen=True, slots=True)
class _UnitTable:
    """A VOI LUT as a transform to 0..1."""

    table: LookupTable

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return np.asarray(self.table(values) / (2**self.table.bits - 1))


def _table_of(item: Dataset, layout: PixelLayout, *, is_signed: bool) -> LookupTable:
    return lookup_table(
        item.get("LUTDescriptor"),
        item.get("LUTData"),
        is_signed=is_signed,
        little_endian=layout.transfer_syntax != ExplicitVRBigEndian,
    )


# --- colour ------------------------------------------------------------------


def _render_palette(dataset: Dataset, layout: PixelLayout, stored: np.ndarray) -> np.ndarray:
    """Indices through the three palettes (PS3.3 C.7.6.3.1.5, C.7.9), uint8 RGB."""
    if "SegmentedRedPaletteColorLookupTableData" in dataset:
        colors = apply_color_lut(stored, dataset)
        return to_8_bits(colors[:, :, :3], 8 * colors.dtype.itemsize)
    channels = []
    for color in ("Red", "Green", "Blue"):
        table = lookup_table(
            dataset.get(f"{color}PaletteColorLookupTableDescriptor"),
            dataset.get(f"{color}PaletteColorLookupTableData"),
            is_signed=layout.is_signed,
            little_endian=layout.transfer_syntax != ExplicitVRBigEndian,
        )
        channels.append(to_8_bits(table(stored), table.bits))
    return np.stack(channels, axis=-1)
