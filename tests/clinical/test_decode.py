"""Real files of every kind, and what is refused of them: only ever by one of our own errors."""

import subprocess
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import Dataset

from tests.clinical.dicom_files import LIMITS, all_samples, decoded, file_of, grey_file, sample
from vlm_serve.clinical.attributes import age_band
from vlm_serve.clinical.decode import decode
from vlm_serve.clinical.pixels import PLUGINS
from vlm_serve.errors import CorruptImageError, ImageError, MediaMismatchError, UnsupportedImageError

REFUSED = {
    "ExplVR_BigEndNoMeta.dcm": UnsupportedImageError,  # plans, structures, reports, waveforms: no pixels
    "ExplVR_LitEndNoMeta.dcm": UnsupportedImageError,
    "UN_sequence.dcm": UnsupportedImageError,
    "empty_charset_LEI.dcm": UnsupportedImageError,
    "meta_missing_tsyntax.dcm": UnsupportedImageError,
    "nested_priv_SQ.dcm": UnsupportedImageError,
    "no_meta_group_length.dcm": UnsupportedImageError,
    "priv_SQ.dcm": UnsupportedImageError,
    "reportsi.dcm": UnsupportedImageError,
    "reportsi_with_empty_number_tags.dcm": UnsupportedImageError,
    "rtplan.dcm": UnsupportedImageError,
    "rtstruct.dcm": UnsupportedImageError,
    "test-SR.dcm": UnsupportedImageError,
    "waveform_ecg.dcm": UnsupportedImageError,
    "JPEG2000-embedded-sequence-delimiter.dcm": CorruptImageError,  # damaged on purpose
    "MR_truncated.dcm": CorruptImageError,
    "badVR.dcm": CorruptImageError,
    "emri_small_jpeg_2k_lossless_too_short.dcm": CorruptImageError,
    "rtplan_truncated.dcm": CorruptImageError,
    "no_meta.dcm": MediaMismatchError,  # begins with a stray byte
}
"""The test files without a picture, or with a broken one; directories and the bare headers they list come on top."""


@pytest.mark.parametrize("path", all_samples(), ids=lambda path: path.name)
def test_every_file_of_pydicom_is_decoded_or_refused_by_an_error_of_ours(path: Path) -> None:
    expected: type[ImageError] | None = REFUSED.get(path.name)
    if path.name.startswith("DICOMDIR") or "TINY_ALPHA" in path.parts:
        expected = UnsupportedImageError
    data = path.read_bytes()
    if expected is None:
        image = decoded(data)
        assert image.pixels.shape == (image.receipt.rows, image.receipt.columns, 3)
        assert image.pixels.dtype == np.uint8
        assert image.pixels.any()
    else:
        with pytest.raises(expected):
            decoded(data)


ALIKE = [
    ("RG1_UNCR.dcm", "RG1_J2KR.dcm"),
    ("RG3_UNCR.dcm", "RG3_J2KR.dcm"),
    ("MR2_UNCR.dcm", "MR2_J2KR.dcm"),
    ("693_UNCR.dcm", "693_J2KR.dcm"),
    ("US1_UNCR.dcm", "US1_J2KR.dcm"),
    ("MR_small.dcm", "MR_small_RLE.dcm"),
    ("MR_small.dcm", "MR_small_bigendian.dcm"),
    ("MR_small.dcm", "MR_small_implicit.dcm"),
    ("MR_small.dcm", "MR_small_jp2klossless.dcm"),
    ("MR_small.dcm", "MR_small_jpeg_ls_lossless.dcm"),
    ("MR_small.dcm", "MR_small_padded.dcm"),
    ("emri_small.dcm", "emri_small_RLE.dcm"),
    ("emri_small.dcm", "emri_small_big_endian.dcm"),
    ("emri_small.dcm", "emri_small_jpeg_2k_lossless.dcm"),
    ("emri_small.dcm", "emri_small_jpeg_ls_lossless.dcm"),
    ("OBXXXX1A.dcm", "OBXXXX1A_expb.dcm"),
    ("OBXXXX1A.dcm", "OBXXXX1A_rle.dcm"),
    ("OBXXXX1A_2frame.dcm", "OBXXXX1A_rle_2frame.dcm"),
    ("SC_rgb_32bit.dcm", "SC_rgb_rle_32bit.dcm"),
    ("SC_rgb_16bit.dcm", "SC_rgb_expb_16bit.dcm"),
    ("SC_rgb_small_odd.dcm", "SC_rgb_small_odd_big_endian.dcm"),
    ("gdcm-US-ALOKA-16.dcm", "gdcm-US-ALOKA-16_big.dcm"),
    ("liver.dcm", "liver_expb.dcm"),
    ("rtdose.dcm", "rtdose_expb.dcm"),
    ("rtdose.dcm", "rtdose_rle.dcm"),
    ("color-pl.dcm", "color-px.dcm"),
    ("SC_rgb_jpeg_dcmd.dcm", "SC_rgb_jpeg.dcm"),
]


@pytest.mark.parametrize(("one", "other"), ALIKE, ids=lambda name: name.removesuffix(".dcm"))
def test_the_same_picture_in_another_syntax_gives_the_same_pixels(one: str, other: str) -> None:
    first, second = decoded(sample(one)), decoded(sample(other))
    assert first.receipt.pixel_sha256 == second.receipt.pixel_sha256
    np.testing.assert_array_equal(first.pixels, second.pixels)


STORED = np.arange(0, 4096, dtype=np.uint16).reshape(64, 64)
LOSSLESS = {
    uid.JPEGLosslessSV1: lambda frame: imagecodecs.ljpeg_encode(frame, bitspersample=12),
    uid.JPEGLossless: lambda frame: imagecodecs.ljpeg_encode(frame, bitspersample=12),
    uid.JPEGLSLossless: imagecodecs.jpegls_encode,
    uid.JPEGLSNearLossless: lambda frame: imagecodecs.jpegls_encode(frame, level=0),
    uid.JPEG2000Lossless: lambda frame: imagecodecs.jpeg2k_encode(frame, level=0, codecformat="j2k"),
    uid.JPEG2000: lambda frame: imagecodecs.jpeg2k_encode(frame, level=0, codecformat="jp2"),
    uid.HTJ2KLossless: lambda frame: imagecodecs.htj2k_encode(frame, reversible=True),
    uid.HTJ2KLosslessRPCL: lambda frame: imagecodecs.htj2k_encode(frame, reversible=True),
    uid.HTJ2K: lambda frame: imagecodecs.htj2k_encode(frame, reversible=True),
}


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.keyword)
def test_each_lossless_codec_gives_back_what_was_put_in(syntax: uid.UID) -> None:
    window = {"BitsStored": 12, "WindowCenter": 2048, "WindowWidth": 4096}
    plain = decoded(grey_file(STORED, **window))
    coded = decoded(grey_file(STORED, syntax, LOSSLESS[syntax](STORED), **window))
    np.testing.assert_array_equal(coded.pixels, plain.pixels)
    assert coded.receipt.transfer_syntax == syntax


def test_twelve_bit_jpeg_is_decoded_to_within_a_grey_level_of_its_lossless_twin() -> None:
    """JPGExtended.dcm and JPEG2000_UNC.dcm are one bone scan, the first through 12-bit lossy JPEG."""
    smooth = np.tile(np.linspace(0, 4095, 64).astype(np.uint16), (64, 1))
    window = {"BitsStored": 12, "WindowCenter": 2048, "WindowWidth": 4096}
    encoded = imagecodecs.jpeg8_encode(smooth, level=100, bitspersample=12)
    image = decoded(grey_file(smooth, uid.JPEGExtended12Bit, encoded, **window))
    plain = decoded(grey_file(smooth, **window))
    assert image.receipt.decoder.startswith("imagecodecs ")
    assert np.abs(image.pixels.astype(int) - plain.pixels.astype(int)).max() <= 1


def test_no_decoder_in_the_table_is_pydicoms_gpl_one() -> None:
    assert {plugin for plugins in PLUGINS.values() for plugin in plugins} == {
        *("rle", "pydicom", "pillow", "gdcm", "imagecodecs", "pyjpegls", "openjpeg")
    }


@pytest.mark.parametrize("syntax", [uid.MPEG2MPML, uid.MPEG4HP41, uid.HEVCMP51, uid.HEVCM10P51], ids=str)
def test_video_and_other_syntaxes_are_refused_by_their_name(syntax: uid.UID) -> None:
    data = grey_file(STORED, syntax, bytes(100))
    with pytest.raises(UnsupportedImageError) as refusal:
        decoded(data)
    assert syntax.name in str(refusal.value)


def test_a_private_syntax_is_refused_without_repeating_it() -> None:
    with pytest.raises(UnsupportedImageError) as refusal:
        decoded(grey_file(STORED, uid.UID("1.2.999.777.1"), bytes(100)))
    assert "999" not in str(refusal.value)


@pytest.mark.parametrize("name", ["CT_small.dcm", "693_J2KR.dcm", "MR_small_RLE.dcm", "examples_ybr_color.dcm"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.7, 0.99])
def test_a_file_that_breaks_off_is_refused(name: str, part: float) -> None:
    data = sample(name)
    with pytest.raises(ImageError):
        decoded(data[: int(len(data) * part)])


# --- media types -------------------------------------------------------------


@pytest.mark.parametrize(
    "declared", ["application/dicom", "Application/DICOM; transfer-syntax=*", "application/octet-stream", ""]
)
def test_a_dicom_file_may_come_under_these_names(declared: str) -> None:
    assert decoded(sample("CT_small.dcm"), declared).receipt.media_type == "application/dicom"


def test_bytes_of_another_type_than_declared_are_refused() -> None:
    png = imagecodecs.png_encode(np.zeros((4, 4), np.uint8))
    with pytest.raises(MediaMismatchError, match="declared as application/dicom, but its bytes are a PNG file"):
        decoded(png, "application/dicom")
    with pytest.raises(MediaMismatchError, match="declared as image/jpeg"):
        decoded(png, "image/jpeg")
    with pytest.raises(MediaMismatchError, match="declared as image/png"):
        decoded(sample("CT_small.dcm"), "image/png")


def test_a_media_type_that_is_not_served_is_refused() -> None:
    with pytest.raises(UnsupportedImageError, match="Send application/dicom, image/png or image/jpeg"):
        decoded(sample("CT_small.dcm"), "application/pdf")


def test_bytes_of_no_known_type_are_refused() -> None:
    with pytest.raises(UnsupportedImageError, match="neither DICOM nor PNG nor JPEG"):
        decoded(b"GIF89a" + bytes(500), "")


def test_a_picture_hidden_in_a_dicom_preamble_is_refused() -> None:
    polyglot = b"\x89PNG\r\n\x1a\n" + sample("CT_small.dcm")[8:]
    for declared in ("image/png", "application/dicom", ""):
        with pytest.raises(MediaMismatchError, match="DICOM and PNG at once"):
            decoded(polyglot, declared)


def test_a_file_without_a_preamble_is_read_if_it_begins_as_only_dicom_does() -> None:
    whole = sample("CT_small.dcm")
    assert decoded(whole[132:]).receipt.pixel_sha256 == decoded(whole).receipt.pixel_sha256


# --- what may be seen of a patient -------------------------------------------

SECRET = "ZZSECRET"
NUMBER = "12345678"
"""Stands where the mark shall be and pydicom would not write it."""


def marked_file(**elements: object) -> bytes:
    """A CT slice that has the mark wherever free text fits, and in `elements`."""
    dataset = pydicom.dcmread(pydicom.filebase.DicomBytesIO(sample("CT_small.dcm")))
    texts = ("PN", "LO", "SH", "LT", "ST", "UT", "AE")
    for element in list(dataset):
        if element.VR in texts and not element.tag.is_private:
            element.value = SECRET
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return file_of(dataset).replace(NUMBER.encode(), SECRET.encode())


def test_no_text_of_the_file_reaches_the_receipt() -> None:
    data = marked_file(BodyPartExamined=SECRET, ViewPosition=SECRET, PatientSex=SECRET, PatientAge="")
    assert SECRET.encode() in data
    receipt = decoded(data).receipt
    assert SECRET not in repr(receipt)
    assert receipt.attributes == {"Modality": "CT"}
    assert "BodyPartExamined was left out: it is not a term that the standard defines." in receipt.notes


@pytest.mark.parametrize(
    "broken",
    [
        {"Rows": 9999},
        {"PhotometricInterpretation": SECRET},
        {"NumberOfFrames": NUMBER},
        {"WindowCenter": NUMBER, "WindowWidth": NUMBER},
        {"RescaleSlope": NUMBER, "RescaleIntercept": 0},
        {"SOPClassUID": NUMBER, "PixelRepresentation": 7},
    ],
    ids=lambda broken: next(iter(broken)),
)
def test_no_text_of_the_file_reaches_an_error_or_what_it_was_raised_from(
    broken: dict[str, object], caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    data = marked_file(**broken)
    assert SECRET.encode() in data
    with pytest.raises(ImageError) as refusal:
        decode(data, "application/dicom", LIMITS)
    error: BaseException | None = refusal.value
    while error is not None:
        assert SECRET not in str(error)
        error = error.__context__
    assert SECRET not in caplog.text
    assert not [warning for warning in recwarn if SECRET in str(warning.message)]


def test_attributes_are_the_standards_terms_and_a_band_of_age() -> None:
    dataset_elements = {
        "Modality": "CR",
        "BodyPartExamined": "CHEST ",
        "ViewPosition": "PA",
        "ImageLaterality": "R",
        "PatientSex": "F",
        "PatientAge": "067Y",
    }
    image = decoded(grey_file(STORED, **dataset_elements))
    assert image.attributes == {
        "Modality": "CR",
        "BodyPartExamined": "CHEST",
        "ViewPosition": "PA",
        "Laterality": "R",
        "PatientSex": "F",
        "PatientAgeBand": "60-69",
    }


@pytest.mark.parametrize(
    ("age", "band"),
    [
        ("003D", "under 1"),
        ("051W", "under 1"),
        ("011M", "under 1"),
        ("012M", "1-4"),
        ("017Y", "12-17"),
        ("018Y", "18-29"),
        ("089Y", "80-89"),
        ("090Y", "90 or over"),
        ("112Y", "90 or over"),
        ("SMITH", None),
        ("45", None),
    ],
)
def test_an_age_becomes_a_band(age: str, band: str | None) -> None:
    assert age_band(age) == band


def test_burned_in_text_is_pointed_out() -> None:
    assert any("burned into" in note for note in decoded(grey_file(STORED, BurnedInAnnotation="YES")).receipt.notes)
    assert any("does not say" in note for note in decoded(grey_file(STORED, Modality="US")).receipt.notes)
    assert not decoded(grey_file(STORED, Modality="US", BurnedInAnnotation="NO")).receipt.notes


def test_decoding_imports_no_torch() -> None:
    code = (
        "import sys, vlm_serve.clinical.decode, vlm_serve.serving.decode_worker;"
        "sys.exit(any(name.partition('.')[0] in ('torch', 'transformers') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_a_dataset_without_a_picture_has_no_pixels_even_if_it_has_their_description() -> None:
    dataset = Dataset()
    dataset.Rows = dataset.Columns = 4
    dataset.SOPClassUID = uid.CTImageStorage
    with pytest.raises(UnsupportedImageError, match="without pixels"):
        decoded(file_of(dataset))
