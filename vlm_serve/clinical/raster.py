"""A PNG or JPEG file to a `ClinicalImage`. Serves `decode.py`.

Pillow's own two parsers are called by name, so that none of its many others ever sees a file.
"""

import hashlib
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from vlm_serve.clinical.dicom import finish
from vlm_serve.clinical.greyscale import percentile_window, receipt_of, to_grey
from vlm_serve.clinical.image import ClinicalImage, ImageReceipt, WindowReceipt
from vlm_serve.clinical.pixels import package_version
from vlm_serve.config import MIB, DecodeLimits
from vlm_serve.errors import ImageLimitError, UnsupportedImageError

PNG, JPEG = "image/png", "image/jpeg"

_INFLATE_FREE_BYTES = 64 * MIB
"""A PNG that grows to less harms nobody, whatever its ratio: an empty image deflates 1000:1."""

_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I")
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def decode_raster(data: bytes, media_type: str, limits: DecodeLimits) -> ClinicalImage:
    """Decodes a PNG or JPEG: upright after its EXIF orientation, transparency over black.

    16-bit greys are stretched between percentiles of the stored values, never clipped to 8 bits.

    Raises:
        ImageError: as its class says; `decode.py` translates what else Pillow throws.
    """
    image: ImageFile.ImageFile = PngImageFile(BytesIO(data)) if media_type == PNG else JpegImageFile(BytesIO(data))
    _check_size(image, len(data), media_type, limits)
    if image.mode not in (*_SIXTEEN_BIT_MODES, *_EIGHT_BIT_MODES):
        raise UnsupportedImageError("The colour mode of the image is not supported. Save it as grey or RGB.")
    notes = ("The first of several pictures was taken.",) if getattr(image, "n_frames", 1) > 1 else ()
    image.load()
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    upright: Image.Image = ImageOps.exif_transpose(image)
    if orientation in range(2, 9):
        notes = (*notes, f"EXIF orientation {orientation} was applied.")
    window: WindowReceipt | None = None
    if upright.mode in _SIXTEEN_BIT_MODES:
        values = np.asarray(upright)
        chosen = percentile_window(values)
        pixels, window = to_grey(values, chosen, inverted=False, black=None), receipt_of(chosen, "percentile")
    else:
        pixels = np.asarray(_over_black(upright))
    receipt = ImageReceipt(
        media_type=media_type,
        file_sha256=hashlib.sha256(data).hexdigest(),
        pixel_sha256="",
        rows=upright.height,
        columns=upright.width,
        decoder=f"pillow {package_version('pillow')}",
        bits_stored=1 if image.mode == "1" else 16 if window else 8,
        window=window,
        notes=notes,
    )
    return finish(pixels, receipt)


def _check_size(image: ImageFile.ImageFile, file_bytes: int, media_type: str, limits: DecodeLimits) -> None:
    """Reads only the header, before any pixel is decoded."""
    width, height = image.size
    if max(width, height) > limits.max_dimension:
        raise ImageLimitError(f"The image is {width}×{height}; at most {limits.max_dimension} a side is decoded.")
    decoded = width * height * max(3, len(image.getbands()))
    allowed = limits.max_decoded_bytes
    if media_type == PNG:
        allowed = min(allowed, max(_INFLATE_FREE_BYTES, limits.max_inflate_ratio * file_bytes))
    if decoded > allowed:
        raise ImageLimitError(
            f"The image would grow to {decoded // MIB} MiB; a file of its size may grow to {allowed // MIB}. "
            "Scale it down."
        )


def _over_black(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes the black of a film's border."""
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer).convert("RGB")
    return image.convert("RGB")
