"""`decode`: the bytes of one file to a `ClinicalImage`. Serves the decode worker; imports no torch.

The one place where foreign exceptions end: what a parser throws at a hostile file is translated here, by a
table, into errors of our own that repeat nothing from the file.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from vlm_serve.clinical import dicom, raster
from vlm_serve.clinical.image import ClinicalImage
from vlm_serve.clinical.part10 import PREAMBLE_BYTES, PREFIX, looks_like_dicom
from vlm_serve.config import MIB, DecodeLimits
from vlm_serve.errors import (
    CorruptImageError,
    ImageError,
    ImageLimitError,
    MediaMismatchError,
    UnsupportedImageError,
    VlmServeError,
)

_DECLARED = {
    "application/dicom": dicom.MEDIA_TYPE,
    "image/png": raster.PNG,
    "image/jpeg": raster.JPEG,
    "image/jpg": raster.JPEG,
    "application/octet-stream": None,
    "": None,
}
"""What a part may call itself, and what that is; None is found out from the bytes."""

_NAMES = {dicom.MEDIA_TYPE: "DICOM", raster.PNG: "PNG", raster.JPEG: "JPEG"}
_TALKATIVE = ("pydicom", "pylibjpeg", "openjpeg", "rle", "PIL")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8\xff"

_TRANSLATION: tuple[tuple[type[Exception], ImageError], ...] = (
    (RecursionError, ImageLimitError("The file nests its structure too deeply; no image needs that.")),
    (MemoryError, ImageLimitError("Decoding the file needs more memory than one file may use. Send a smaller image.")),
    (
        Exception,
        CorruptImageError("The file cannot be decoded: it is damaged or breaks off. Send it again, or export it anew."),
    ),
)
"""First match wins. Parsers of hostile files throw whatever they come to: SyntaxError, AttributeError, …"""


def decode(data: bytes | memoryview, media_type: str, limits: DecodeLimits) -> ClinicalImage:
    """Decodes a DICOM, PNG or JPEG file.

    Args:
        data: the whole file.
        media_type: what the caller says it is. Parameters after `;` are ignored; empty and
            `application/octet-stream` mean that the bytes decide.
        limits: sizes and ratios. Memory and time are the worker's, `serving/decode_worker.py`.

    Raises:
        MediaMismatchError: the bytes are of another type, or of two at once.
        UnsupportedImageError: a sound file of a kind that is not decoded here.
        CorruptImageError: it breaks off, contradicts itself or cannot be decoded.
        ImageLimitError: it is past one of `limits`.
    """
    if len(data) > limits.max_file_bytes:
        raise ImageLimitError(f"The file is larger than {limits.max_file_bytes // MIB} MiB.")
    data = bytes(data)
    actual = _checked_media_type(data, media_type)
    with _silence():
        try:
            if actual == dicom.MEDIA_TYPE:
                return dicom.decode_dicom(data, limits)
            return raster.decode_raster(data, actual, limits)
        except VlmServeError as error:
            translated: VlmServeError = error
        except Exception as error:  # noqa: BLE001 - the table decides, and nothing foreign may pass
            translated = next(ours for kind, ours in _TRANSLATION if isinstance(error, kind))
    # Made anew and raised out here, it has no foreign exception as its context, whose text a traceback may print.
    raise type(translated)(str(translated))


def _checked_media_type(data: bytes, declared: str) -> str:
    name = declared.partition(";")[0].strip().lower()
    if name not in _DECLARED:
        raise UnsupportedImageError(
            "The media type of the image part is not supported. Send application/dicom, image/png or image/jpeg."
        )
    found = _sniff(data)
    expected = _DECLARED[name]
    if expected is None:
        if found is None:
            raise UnsupportedImageError("The file is neither DICOM nor PNG nor JPEG.")
        return found
    if found != expected:
        what = f"a {_NAMES[found]} file" if found else "something else"
        raise MediaMismatchError(
            f"The part is declared as {expected}, but its bytes are {what}. Correct one of the two."
        )
    return expected


def _sniff(data: bytes) -> str | None:
    """The type that the bytes begin like.

    Raises:
        MediaMismatchError: they are of two types at once. A DICOM preamble may hold anything, so a picture
            can hide before a `DICM` (CVE-2019-11687): what is shown would depend on who reads the file.
    """
    raster_type = (
        raster.PNG if data.startswith(_PNG_SIGNATURE) else raster.JPEG if data.startswith(_JPEG_SIGNATURE) else None
    )
    if raster_type and data[PREAMBLE_BYTES : PREAMBLE_BYTES + 4] == PREFIX:
        raise MediaMismatchError(f"The file is DICOM and {_NAMES[raster_type]} at once. Send one or the other.")
    if raster_type:
        return raster_type
    return dicom.MEDIA_TYPE if looks_like_dicom(data) else None


@contextmanager
def _silence() -> Iterator[None]:
    """No warnings and no log of the parsers: both repeat values of the file."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL + 1)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
