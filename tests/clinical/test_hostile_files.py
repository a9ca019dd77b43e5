"""Files made to hurt: each is refused by a typed error before it costs memory or time."""

import contextlib
import resource
import time

import numpy as np
import pytest
from pydicom import uid

from tests.clinical.dicom_files import (
    LIMITS,
    decoded,
    deflate_bomb,
    grey_file,
    nested_sequences,
    sample,
    siz,
    sof,
)
from vlm_serve.clinical.decode import decode
from vlm_serve.config import MIB, DecodeLimits
from vlm_serve.errors import CorruptImageError, ImageError, ImageLimitError

TINY = np.zeros((16, 16), np.uint16)

DISAGREE = "disagree on rows, columns, samples or bits"

HOSTILE = {
    "deflate bomb": (lambda: deflate_bomb(300), ImageLimitError, "grows past"),
    "J2K SIZ bomb": (lambda: grey_file(TINY, uid.JPEG2000, siz(12_000, 12_000)), CorruptImageError, DISAGREE),
    "HTJ2K SIZ bomb": (lambda: grey_file(TINY, uid.HTJ2K, siz(12_000, 12_000)), CorruptImageError, DISAGREE),
    "J2K tile bomb": (lambda: grey_file(np.zeros((4096, 4096), np.uint16), uid.JPEG2000, siz(4096, 4096, 1)),
                      CorruptImageError, "more tiles"),
    "JPEG SOF bomb": (lambda: grey_file(TINY.astype(np.uint8), uid.JPEGBaseline8Bit, sof(12_000, 12_000)),
                      CorruptImageError, DISAGREE),
    "JPEG lossless SOF bomb": (lambda: grey_file(TINY, uid.JPEGLosslessSV1, sof(12_000, 12_000, 0xC3)),
                               CorruptImageError, DISAGREE),
    "JPEG-LS SOF bomb": (lambda: grey_file(TINY, uid.JPEGLSLossless, sof(12_000, 12_000, 0xF7)),
                         CorruptImageError, DISAGREE),
    "RLE of 65535² in two frames": (
        lambda: grey_file(TINY, uid.RLELossless, bytes(64), Rows=65_535, Columns=65_535, NumberOfFrames=2),
        ImageLimitError, "at most 16384 rows and columns"),
    "a gigapixel": (lambda: grey_file(TINY, Rows=16_384, Columns=16_384, BitsAllocated=32, BitsStored=32),
                    CorruptImageError, "cannot be decoded"),
    "a frame past the limit": (
        lambda: grey_file(np.zeros((2, 2), np.uint8), Rows=16_384, Columns=16_384, SamplesPerPixel=3,
                          PhotometricInterpretation="RGB", PlanarConfiguration=0, BitsAllocated=16, BitsStored=16),
        ImageLimitError, "A decoded frame takes 1536 MiB"),
    "too many frames": (lambda: grey_file(TINY, NumberOfFrames=5000), ImageLimitError, "at most 4096"),
    "300 nested sequences": (lambda: nested_sequences(300), ImageLimitError, "deeper than 64"),
    "10,000 nested sequences": (lambda: nested_sequences(10_000), ImageLimitError, "deeper than 64"),
    "no rows": (lambda: grey_file(TINY, Rows=0), CorruptImageError, "contradicts itself"),
    "more bits stored than allocated": (lambda: grey_file(TINY, BitsStored=20), CorruptImageError, "contradicts"),
    "a codestream of nothing": (lambda: grey_file(TINY, uid.JPEG2000, bytes(64)), CorruptImageError, "begin"),
    "a codestream that breaks off": (lambda: grey_file(TINY, uid.JPEG2000, siz(16, 16)[:20]),
                                     CorruptImageError, "breaks off"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_at_once_and_costs_no_memory(name: str) -> None:
    make, expected, message = HOSTILE[name]
    data = make()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(expected, match=message):
        decoded(data)
    assert time.process_time() - start < 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


def test_sequences_may_nest_as_deep_as_the_limit() -> None:
    assert decoded(nested_sequences(64)).receipt.rows == 4


def test_the_limits_that_are_given_hold() -> None:
    data = sample("CT_small.dcm")
    for limits in (
        DecodeLimits(max_dimension=127),
        DecodeLimits(max_decoded_bytes=128 * 128 * 3 - 1),
        DecodeLimits(max_file_bytes=len(data) - 1),
    ):
        with pytest.raises(ImageLimitError):
            decode(data, "application/dicom", limits)
    decode(
        data,
        "application/dicom",
        DecodeLimits(max_dimension=128, max_decoded_bytes=128 * 128 * 3, max_file_bytes=len(data)),
    )


def test_a_deflated_file_may_grow_to_its_limit() -> None:
    data = sample("image_dfl.dcm")
    assert decoded(data).receipt.rows == 512
    with pytest.raises(ImageLimitError):
        decode(data, "application/dicom", DecodeLimits(max_inflated_bytes=MIB // 8))


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_is_decoded_or_refused_by_an_error_of_ours(seed: int) -> None:
    random = np.random.default_rng(seed)
    names = ["CT_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "examples_ybr_color.dcm",
             "MR_small_jpeg_ls_lossless.dcm", "emri_small.dcm", "vlut_04.dcm", "OBXXXX1A_rle.dcm"]  # fmt: skip
    data = bytearray(sample(names[seed % len(names)]))
    for position in random.integers(132, min(len(data), 3000), 12):
        data[position] = random.integers(0, 256)
    with contextlib.suppress(ImageError):
        decode(bytes(data), "application/dicom", LIMITS)


@pytest.mark.parametrize("seed", range(10))
def test_random_bytes_behind_a_preamble_are_refused(seed: int) -> None:
    noise = np.random.default_rng(seed).bytes(2000)
    with pytest.raises(ImageError):
        decoded(bytes(128) + b"DICM" + noise)
