"""PNG and JPEG: the modes, the orientation, the depth, and what is refused."""

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.clinical.dicom_files import LIMITS, decoded
from vlm_serve.clinical.decode import decode
from vlm_serve.config import DecodeLimits
from vlm_serve.errors import CorruptImageError, ImageError, ImageLimitError

RGB = np.random.default_rng(3).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A greyscale PNG that declares a size and holds `pixels`, deflated."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels, 9)) + chunk(b"IEND", b"")


def test_an_rgb_png_comes_out_as_it_is() -> None:
    image = decoded(saved(Image.fromarray(RGB)), "image/png")
    np.testing.assert_array_equal(image.pixels, RGB)
    assert image.receipt.media_type == "image/png"
    assert (image.receipt.rows, image.receipt.columns) == (12, 20)


def test_a_jpeg_comes_out_as_pillow_decodes_it() -> None:
    data = saved(Image.fromarray(RGB), "JPEG", quality=95)
    expected = np.asarray(Image.open(BytesIO(data)))
    np.testing.assert_array_equal(decoded(data, "image/jpeg").pixels, expected)
    np.testing.assert_array_equal(decoded(data, "image/jpg").pixels, expected)


def test_sixteen_bit_greys_are_stretched_from_the_stored_values_not_clipped() -> None:
    """Row 21 of engines.md."""
    stored = np.arange(1000, 11_000, dtype=np.uint16).reshape(100, 100)
    image = decoded(saved(Image.fromarray(stored)), "image/png")
    low, high = 1099.99, 10_899.01
    expected = np.clip((stored - low) / (high - low), 0, 1) * 255
    np.testing.assert_array_equal(image.pixels[:, :, 0], np.rint(expected).astype(np.uint8))
    window = image.receipt.window
    assert window is not None
    assert (window.source, window.center, window.width) == ("percentile", (low + high) / 2, high - low)


def test_one_bit_grey_and_palette_become_rgb() -> None:
    grey = RGB[:, :, 0]
    np.testing.assert_array_equal(
        decoded(saved(Image.fromarray(grey)), "image/png").pixels, grey[:, :, None].repeat(3, 2)
    )
    bits = Image.fromarray(grey > 127)
    np.testing.assert_array_equal(decoded(saved(bits), "image/png").pixels[:, :, 1], (grey > 127) * np.uint8(255))
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 210, 220])
    palette.putdata([1, 0])
    assert decoded(saved(palette), "image/png").pixels.tolist() == [[[200, 210, 220], [10, 20, 30]]]


def test_what_is_transparent_becomes_black() -> None:
    layered = np.dstack([RGB, np.where(np.arange(20) < 10, 0, 255).astype(np.uint8).reshape(1, 20).repeat(12, 0)])
    pixels = decoded(saved(Image.fromarray(layered)), "image/png").pixels
    assert not pixels[:, :10].any()
    np.testing.assert_array_equal(pixels[:, 10:], RGB[:, 10:])


def test_a_cmyk_jpeg_becomes_rgb() -> None:
    data = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    red, green, blue = decoded(data, "image/jpeg").pixels[4, 4]
    assert red > 240
    assert green < 15
    assert blue < 15


@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, 3), (8, 1)])
@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_the_exif_orientation_is_applied_and_noted(orientation: int, turns: int, depth: type) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = (np.arange(240) % 251).astype(depth).reshape(12, 20)
    image = decoded(saved(Image.fromarray(stored), exif=exif), "image/png")
    plain = decoded(saved(Image.fromarray(stored)), "image/png")
    np.testing.assert_array_equal(image.pixels, np.rot90(plain.pixels, turns))
    assert f"EXIF orientation {orientation} was applied." in image.receipt.notes


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("part", [0.05, 0.3, 0.6, 0.9])
def test_a_picture_that_breaks_off_is_refused(format: str, part: float) -> None:
    noise = np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), format)
    with pytest.raises(CorruptImageError):
        decoded(data[: int(len(data) * part)], f"image/{format.lower()}")


def test_a_picture_of_too_many_columns_is_refused_by_its_header() -> None:
    with pytest.raises(ImageLimitError, match="16384 a side"):
        decoded(png_header(16_385, 4), "image/png")


def test_a_png_that_would_grow_beyond_its_ratio_is_refused_by_its_header() -> None:
    with pytest.raises(ImageLimitError, match="would grow to"):
        decoded(png_header(16_000, 16_000, bytes(1000)), "image/png")


def test_an_empty_picture_is_no_bomb() -> None:
    assert not decoded(saved(Image.new("L", (2000, 2000))), "image/png").pixels.any()


def test_the_limits_are_the_callers_not_pillows() -> None:
    small = DecodeLimits(max_dimension=16)
    with pytest.raises(ImageLimitError):
        decode(saved(Image.fromarray(RGB)), "image/png", small)


def test_no_text_of_a_png_reaches_an_error() -> None:
    data = bytearray(saved(Image.fromarray(RGB)))
    position = data.index(b"IDAT")
    data[position + 10 : position + 18] = b"ZZSECRET"
    with pytest.raises(ImageError) as refusal:
        decode(bytes(data), "image/png", LIMITS)
    assert "ZZSECRET" not in str(refusal.value)
    assert refusal.value.__context__ is None


@pytest.mark.parametrize(
    ("name", "declared"), [("chest_radiograph.png", "image/png"), ("chest_radiograph.jpg", "image/jpeg")]
)
def test_the_sample_pictures_show_what_the_sample_dicom_file_shows(name: str, declared: str) -> None:
    folder = Path(__file__).parents[2] / "sample_data"
    dicom = decoded((folder / "chest_radiograph.dcm").read_bytes()).pixels
    picture = decoded((folder / name).read_bytes(), declared).pixels
    small = Image.fromarray(dicom).resize(picture.shape[1::-1], Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(small).astype(int) - picture.astype(int)).mean() < 1.5
