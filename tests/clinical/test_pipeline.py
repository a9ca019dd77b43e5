"""The display pipeline against arithmetic done here by hand, on stored values chosen for their corners."""

import hashlib
import math
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from tests.clinical.dicom_files import decoded, file_of, grey_file
from vlm_serve.clinical.greyscale import rescale
from vlm_serve.errors import UnsupportedImageError

SIGNED = np.array([[-2000, -1024, -200, -1], [0, 1, 39, 40], [41, 90, 500, 32767]], np.int16)
UNSIGNED = np.array([[0, 1, 24, 824], [1023, 1024, 1025, 1064], [1065, 1114, 4095, 65535]], np.uint16)


def grey(data: bytes) -> np.ndarray:
    """The grey levels of a decoded file; checks that its three channels are alike."""
    pixels = decoded(data).pixels
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[:, :, 0]


def linear(value: float, center: float, width: float) -> int:
    """PS3.3 C.11.2.1.2.1, the three cases as they are written there, to 0..255."""
    if value <= center - 0.5 - (width - 1) / 2:
        return 0
    if value > center - 0.5 + (width - 1) / 2:
        return 255
    return round(((value - (center - 0.5)) / (width - 1) + 0.5) * 255)


def linear_exact(value: float, center: float, width: float) -> int:
    """PS3.3 C.11.2.1.3.2."""
    if value <= center - width / 2:
        return 0
    if value > center + width / 2:
        return 255
    return round(((value - center) / width + 0.5) * 255)


def sigmoid(value: float, center: float, width: float) -> int:
    """PS3.3 C.11.2.1.3.1."""
    exponent = -4 * (value - center) / width
    return 0 if exponent > 700 else round(255 / (1 + math.exp(exponent)))


FUNCTIONS = {"LINEAR": linear, "LINEAR_EXACT": linear_exact, "SIGMOID": sigmoid}


def by_hand(values: np.ndarray, function: str, center: float, width: float) -> np.ndarray:
    return np.array([[FUNCTIONS[function](float(v), center, width) for v in row] for row in values], np.uint8)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("center", "width"), [(40, 400), (-600, 1500), (40.5, 81), (0, 1)])
def test_each_window_function_is_the_standards_to_the_grey_level(function: str, center: float, width: float) -> None:
    data = grey_file(SIGNED, WindowCenter=center, WindowWidth=width, VOILUTFunction=function)
    np.testing.assert_array_equal(grey(data), by_hand(SIGNED, function, center, width))


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("stored", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_the_window_applies_to_hounsfield_units_of_signed_and_unsigned_files(stored: np.ndarray, syntax: str) -> None:
    """Row 21 of engines.md: windowed from the stored values."""
    data = grey_file(stored, syntax, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=50, WindowWidth=350)
    units = stored.astype(np.int64) - 1024
    np.testing.assert_array_equal(grey(data), by_hand(units, "LINEAR", 50, 350))


@pytest.mark.parametrize("stored", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_hounsfield_units_are_exact_whole_numbers(stored: np.ndarray) -> None:
    units = rescale(stored, 1.0, -1024.0)
    assert units.dtype == np.float32
    np.testing.assert_array_equal(units, stored.astype(np.int64) - 1024)


def test_bits_beyond_bits_stored_are_not_part_of_the_value() -> None:
    stored = np.array([[0x0FFF, 0xF001, 0x0800, 0x0000]], np.uint16)
    data = grey_file(stored, BitsStored=12, WindowCenter=2048, WindowWidth=4096)
    np.testing.assert_array_equal(grey(data), by_hand(stored & 0x0FFF, "LINEAR", 2048, 4096))


def test_of_several_windows_the_first_is_taken_and_the_receipt_says_so() -> None:
    data = grey_file(SIGNED, WindowCenter=[40, 400], WindowWidth=[80, 1500])
    np.testing.assert_array_equal(grey(data), by_hand(SIGNED, "LINEAR", 40, 80))
    window = decoded(data).receipt.window
    assert window is not None
    assert (window.source, window.center, window.width) == ("file window 1 of 2", 40, 80)


@pytest.mark.parametrize(
    "elements", [{"PhotometricInterpretation": "MONOCHROME1"}, {"PresentationLUTShape": "INVERSE"}]
)
def test_an_inverted_film_is_turned_so_that_bone_is_white(elements: dict[str, str]) -> None:
    plain = grey(grey_file(SIGNED, WindowCenter=40, WindowWidth=400))
    inverted = decoded(grey_file(SIGNED, WindowCenter=40, WindowWidth=400, **elements))
    np.testing.assert_array_equal(inverted.pixels[:, :, 0], 255 - plain)
    assert inverted.receipt.inverted


def test_monochrome1_with_an_inverse_shape_is_inverted_once() -> None:
    elements = {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"}
    plain = grey(grey_file(SIGNED, WindowCenter=40, WindowWidth=400))
    np.testing.assert_array_equal(grey(grey_file(SIGNED, WindowCenter=40, WindowWidth=400, **elements)), 255 - plain)


def test_without_a_window_the_picture_spans_its_percentiles() -> None:
    stored = np.arange(10_000, dtype=np.uint16).reshape(100, 100)
    image = decoded(grey_file(stored))
    low, high = 99.99, 9899.01  # at 1 % and 99 % between the 10,000 values 0..9,999
    np.testing.assert_array_equal(image.pixels[:, :, 0], by_hand(stored, "LINEAR_EXACT", (low + high) / 2, high - low))
    assert image.receipt.window is not None
    assert image.receipt.window.source == "percentile"


@pytest.mark.parametrize("elements", [{}, {"PhotometricInterpretation": "MONOCHROME1"}])
def test_padding_counts_in_no_statistics_and_is_black_in_either_polarity(elements: dict[str, str]) -> None:
    inside = np.arange(10_000, dtype=np.int16).reshape(100, 100)
    padded = np.full((120, 100), -2000, np.int16)
    padded[10:110] = inside
    image = decoded(grey_file(padded, PixelPaddingValue=-2000, **elements)).pixels[:, :, 0]
    np.testing.assert_array_equal(image[10:110], grey(grey_file(inside, **elements)))
    assert not image[:10].any()
    assert not image[110:].any()


def test_a_flat_image_is_black_and_no_division_by_zero() -> None:
    assert not grey(grey_file(np.full((8, 8), 700, np.uint16))).any()


def test_eight_bits_without_a_window_are_shown_as_they_are() -> None:
    stored = np.arange(64, dtype=np.uint8).reshape(8, 8)
    np.testing.assert_array_equal(grey(grey_file(stored)), stored)


def test_eight_bits_under_a_transform_that_changes_nothing_are_shown_as_they_are() -> None:
    stored = np.arange(100, 164, dtype=np.uint8).reshape(8, 8)
    rescaled = decoded(grey_file(stored, RescaleSlope=1, RescaleIntercept=0))
    np.testing.assert_array_equal(rescaled.pixels[:, :, 0], stored)
    assert rescaled.receipt.window == decoded(grey_file(stored)).receipt.window
    assert rescaled.receipt.modality_transform == "rescale slope 1 intercept 0"
    identity = lut(0, list(range(256)), 16)
    np.testing.assert_array_equal(grey(grey_file(stored, ModalityLUTSequence=[identity])), stored)


@pytest.mark.parametrize("elements", [{"RescaleSlope": 2}, {"RescaleIntercept": -100}])
def test_eight_bits_that_a_rescale_changes_are_grey_levels_no_more(elements: dict[str, Any]) -> None:
    receipt = decoded(grey_file(np.arange(64, dtype=np.uint8).reshape(8, 8), **elements)).receipt
    assert receipt.window is not None
    assert receipt.window.source == "percentile"


@pytest.mark.parametrize("width", [0, -5, 0.5])
def test_a_window_without_a_width_is_set_aside_with_a_note(width: float) -> None:
    receipt = decoded(grey_file(SIGNED, WindowCenter=40, WindowWidth=width)).receipt
    assert receipt.window is not None
    assert receipt.window.source == "percentile"
    assert "The window of the file is not usable." in receipt.notes


def lut(first: int, entries: list[int], bits: int) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries), first, bits])
    item.add_new("LUTData", "US", entries)
    return item


def test_a_voi_lut_maps_by_its_descriptor_and_goes_before_a_window() -> None:
    table = lut(-1, [0, 100, 1000, 4095], 12)
    data = grey_file(SIGNED, VOILUTSequence=[table], WindowCenter=40, WindowWidth=400)
    entries = [0, 100, 1000, 4095]
    expected = [[round(entries[min(max(int(v) + 1, 0), 3)] / 4095 * 255) for v in row] for row in SIGNED]
    np.testing.assert_array_equal(grey(data), np.array(expected, np.uint8))


RAMP_LUT = [round(i * 4095 / 2047) for i in range(2048)]


@pytest.mark.parametrize("stored", [UNSIGNED, UNSIGNED[2:]], ids=["some below 0 HU", "none below 0 HU"])
def test_a_voi_lut_over_hounsfield_units_begins_below_zero_however_its_descriptor_is_written(
    stored: np.ndarray,
) -> None:
    table = lut(0x10000 - 1024, RAMP_LUT, 12)  # 64512 in a US element: the bits of -1024
    data = grey_file(stored, RescaleSlope=1, RescaleIntercept=-1024, VOILUTSequence=[table])
    expected = [[round(RAMP_LUT[min(int(v), 2047)] / 4095 * 255) for v in row] for row in stored]
    np.testing.assert_array_equal(grey(data), np.array(expected, np.uint8))


@pytest.mark.parametrize(
    ("stored", "elements"),
    [
        (np.array([[40_000, 40_500, 41_023]], np.uint16), {}),
        (np.array([[7232, 7732, 8255]], np.int16), {"RescaleSlope": 1, "RescaleIntercept": 32768}),
        (np.array([[-3, -2, -1]], np.int16), {"ModalityLUTSequence": [lut(-3, [40_000, 40_500, 41_023], 16)]}),
    ],
    ids=["stored", "rescaled", "modality LUT"],
)
def test_a_voi_lut_over_values_that_are_never_negative_may_begin_past_32767(
    stored: np.ndarray, elements: dict[str, Any]
) -> None:
    data = grey_file(stored, VOILUTSequence=[lut(40_000, list(range(1024)), 10)], **elements)
    assert grey(data).tolist() == [[0, round(500 / 1023 * 255), 255]]


def test_a_modality_lut_goes_before_the_window() -> None:
    stored = np.array([[0, 1, 2, 3, 9]], np.uint16)
    table = lut(1, [10, 200, 3000], 16)
    data = grey_file(stored, ModalityLUTSequence=[table], WindowCenter=200, WindowWidth=400)
    np.testing.assert_array_equal(grey(data), by_hand(np.array([[10, 10, 200, 3000, 3000]]), "LINEAR", 200, 400))


def test_functional_groups_of_an_enhanced_file_give_the_frame_its_rescale_and_window() -> None:
    def group(intercept: int, center: int) -> Dataset:
        item, transform, voi = Dataset(), Dataset(), Dataset()
        transform.RescaleSlope, transform.RescaleIntercept, transform.RescaleType = 1, intercept, "HU"
        voi.WindowCenter, voi.WindowWidth = center, 100
        item.PixelValueTransformationSequence = [transform]
        item.FrameVOILUTSequence = [voi]
        return item

    frames = np.stack([UNSIGNED, UNSIGNED, UNSIGNED])
    groups = [group(0, 0), group(-1024, 40), group(5, 5)]
    data = grey_file(frames, NumberOfFrames=3, PerFrameFunctionalGroupsSequence=groups)
    np.testing.assert_array_equal(grey(data), by_hand(UNSIGNED.astype(int) - 1024, "LINEAR", 40, 100))
    receipt = decoded(data).receipt
    assert (receipt.frame, receipt.frames) == (1, 3)
    assert "Frame 2 of 3" in receipt.notes[0]


# --- colour ------------------------------------------------------------------


def color_file(stored: np.ndarray, photometric: str, **elements: Any) -> bytes:
    return grey_file(
        stored.reshape(stored.shape[0], -1),
        SamplesPerPixel=3,
        PhotometricInterpretation=photometric,
        PlanarConfiguration=0,
        Rows=stored.shape[0],
        Columns=stored.shape[1],
        **elements,
    )


RAMP = np.random.default_rng(7).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def test_rgb_comes_out_as_it_is_stored() -> None:
    np.testing.assert_array_equal(decoded(color_file(RAMP, "RGB")).pixels, RAMP)


def test_rgb_of_16_bits_is_scaled_not_clipped() -> None:
    """Row 21 of engines.md."""
    wide = RAMP.astype(np.uint16) * 257
    np.testing.assert_array_equal(decoded(color_file(wide, "RGB")).pixels, RAMP)


def test_planes_of_colour_are_put_together() -> None:
    planes = np.ascontiguousarray(RAMP.transpose(2, 0, 1)).reshape(6, 8, 3)
    data = grey_file(
        planes.reshape(6, 24),
        SamplesPerPixel=3,
        PhotometricInterpretation="RGB",
        PlanarConfiguration=1,
        Rows=6,
        Columns=8,
    )
    np.testing.assert_array_equal(decoded(data).pixels, RAMP)


def test_ybr_full_is_converted_by_the_standards_matrix() -> None:
    y, cb, cr = (RAMP[..., i].astype(np.float64) - (128 if i else 0) for i in range(3))
    rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1)
    expected = np.clip(np.floor(rgb + 0.5), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(decoded(color_file(RAMP, "YBR_FULL")).pixels, expected)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_a_palette_colours_its_indices(syntax: str) -> None:
    stored = np.array([[0, 9, 10, 11, 12, 200]], np.uint8)
    palettes: dict[str, Any] = {}
    entries = {"Red": [0, 0x8080, 0xFFFF], "Green": [0x0100, 0x0200, 0x0300], "Blue": [0xFFFF, 0, 0x4040]}
    order = ">u2" if syntax == ExplicitVRBigEndian else "<u2"
    for color, values in entries.items():
        palettes[f"{color}PaletteColorLookupTableDescriptor"] = [3, 10, 16]
        palettes[f"{color}PaletteColorLookupTableData"] = np.array(values, order).tobytes()
    data = grey_file(stored.repeat(2, axis=0), syntax, PhotometricInterpretation="PALETTE COLOR", **palettes)
    first, middle, last = (0, 1, 255), (128, 2, 0), (255, 3, 64)
    assert [tuple(pixel) for pixel in decoded(data).pixels[0]] == [first, first, first, middle, last, last]


# --- receipt -----------------------------------------------------------------


def shape_notes(**elements: Any) -> list[str]:
    return [note for note in decoded(grey_file(SIGNED, **elements)).receipt.notes if "square" in note]


@pytest.mark.parametrize(
    ("elements", "ratio"),
    [
        ({"PixelAspectRatio": [5, 4]}, "1.25"),
        ({"PixelSpacing": [0.5, 1]}, "0.5"),
        ({"ImagerPixelSpacing": [0.204, 0.2]}, "1.02"),
        ({"PixelSpacing": [0, 0], "PixelAspectRatio": [2, 1]}, "2"),
    ],
)
def test_pixels_that_are_not_square_are_noted(elements: dict[str, Any], ratio: str) -> None:
    (note,) = shape_notes(**elements)
    assert f"{ratio} times as high as wide" in note


def test_pixels_of_an_enhanced_file_that_are_not_square_are_noted() -> None:
    measures, group = Dataset(), Dataset()
    measures.PixelSpacing = [2, 1]
    group.PixelMeasuresSequence = [measures]
    assert "2 times as high as wide" in shape_notes(SharedFunctionalGroupsSequence=[group])[0]


@pytest.mark.parametrize(
    "elements",
    [{}, {"PixelAspectRatio": [1, 1]}, {"PixelSpacing": [0.2, 0.201]}, {"PixelSpacing": [0, 0.2]}, {"PixelSpacing": 1}],
)
def test_square_pixels_and_sizes_that_say_nothing_are_not_noted(elements: dict[str, Any]) -> None:
    assert not shape_notes(**elements)


def test_a_spacing_that_is_no_number_keeps_no_image_from_being_decoded() -> None:
    data = grey_file(SIGNED, PixelSpacing=[0.5, 0.25], WindowCenter=40, WindowWidth=400)
    broken = data.replace(b"0.5\\0.25", b"about\\1m")
    assert broken != data
    image = decoded(broken)
    np.testing.assert_array_equal(image.pixels[:, :, 0], by_hand(SIGNED, "LINEAR", 40, 400))
    assert not [note for note in image.receipt.notes if "square" in note]


def test_a_supplemental_palette_is_not_applied_and_that_is_noted() -> None:
    palettes: dict[str, Any] = {}
    for color in ("Red", "Green", "Blue"):
        palettes[f"{color}PaletteColorLookupTableDescriptor"] = [2, 40, 16]
        palettes[f"{color}PaletteColorLookupTableData"] = b"\0\0\xff\xff"
    image = decoded(grey_file(UNSIGNED, WindowCenter=40, WindowWidth=400, **palettes))
    np.testing.assert_array_equal(image.pixels[:, :, 0], by_hand(UNSIGNED, "LINEAR", 40, 400))
    assert "The supplemental palette of the file was not applied; the picture shows greys alone." in image.receipt.notes


def test_the_receipt_tells_how_the_picture_came_about() -> None:
    data = grey_file(
        SIGNED,
        PhotometricInterpretation="MONOCHROME1",
        RescaleSlope=1,
        RescaleIntercept=-1024,
        WindowCenter=40,
        WindowWidth=400,
    )
    image = decoded(data)
    receipt = image.receipt
    assert receipt.media_type == "application/dicom"
    assert receipt.file_sha256 == hashlib.sha256(data).hexdigest()
    assert (receipt.rows, receipt.columns) == image.pixels.shape[:2] == SIGNED.shape
    assert receipt.transfer_syntax == ExplicitVRLittleEndian
    assert (receipt.photometric_interpretation, receipt.bits_stored) == ("MONOCHROME1", 16)
    assert receipt.modality_transform == "rescale slope 1 intercept -1024"
    assert receipt.decoder.startswith("pydicom ")
    assert receipt.inverted
    other = decoded(grey_file(SIGNED, WindowCenter=41, WindowWidth=400)).receipt
    assert other.pixel_sha256 != receipt.pixel_sha256


def test_one_picture_has_one_digest_whatever_its_file_says_besides() -> None:
    one = decoded(grey_file(SIGNED, WindowCenter=40, WindowWidth=400, PatientName="A^B")).receipt
    two = decoded(grey_file(SIGNED, WindowCenter=40, WindowWidth=400, PatientName="C^D")).receipt
    assert one.pixel_sha256 == two.pixel_sha256
    assert one.file_sha256 != two.file_sha256


def test_an_object_without_pixels_is_named_and_refused() -> None:
    dataset = Dataset()
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    with pytest.raises(UnsupportedImageError, match="Basic Text SR Storage"):
        decoded(file_of(dataset))
