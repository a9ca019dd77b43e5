"""Decoding plug-ins for pydicom, where its own list has none that may be used here. `pixels.py` adds them.

For 12-bit JPEG Extended pydicom knows only a GPL decoder. For JPEG 2000, HTJ2K and RLE it goes through
pylibjpeg, which would load that same decoder wherever somebody has installed it.
"""

import imagecodecs
from openjpeg.utils import decode_pixel_data as decode_openjpeg
from pydicom import uid
from pydicom.pixels.decoders.base import DecodeRunner
from pydicom.uid import UID
from rle.utils import decode_pixel_data as decode_rle_frame

_JPEG_2000_FAMILY = (uid.JPEG2000Lossless, uid.JPEG2000, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K)

DECODER_DEPENDENCIES: dict[UID, tuple[str, ...]] = {
    uid.JPEGExtended12Bit: ("imagecodecs>=2025.3.30",),
    uid.RLELossless: ("pylibjpeg-rle>=2.1",),
    **dict.fromkeys(_JPEG_2000_FAMILY, ("pylibjpeg-openjpeg>=2.4",)),
}
"""A name that pydicom asks for."""


def is_available(transfer_syntax: str) -> bool:
    """True where a plug-in of this module decodes the transfer syntax."""
    return transfer_syntax in DECODER_DEPENDENCIES


def decode_jpeg_12_bit(src: bytes, runner: DecodeRunner) -> bytes:
    """One frame of JPEG Extended: 16-bit samples for a precision of 9 to 12 bits, else 8-bit ones."""
    frame = imagecodecs.jpeg8_decode(src)
    runner.set_option("bits_allocated", 8 * frame.dtype.itemsize)
    return bytes(frame.tobytes())


def decode_jpeg2000(src: bytes, runner: DecodeRunner) -> bytearray:
    """One frame of JPEG 2000 or HTJ2K, in as many bytes a sample as its precision needs."""
    frame = decode_openjpeg(src, version=2, **runner.options)
    if runner.photometric_interpretation in ("YBR_ICT", "YBR_RCT"):  # undone by the codec
        runner.set_option("photometric_interpretation", "RGB")
    precision = runner.get_option("j2k_precision", runner.bits_stored)
    runner.set_option("bits_allocated", 8 if precision <= 8 else 16 if precision <= 16 else 32)
    assert isinstance(frame, bytearray)
    return frame


def decode_rle(src: bytes, runner: DecodeRunner) -> bytearray:
    """One frame of RLE, its samples in planes as they are encoded."""
    try:
        frame = decode_rle_frame(src, version=2, **runner.options)
    except BaseException as error:
        # A panic of the Rust code is no `Exception`, so neither pydicom nor `decode.py` would stop it.
        if type(error).__name__ == "PanicException":
            raise ValueError("the RLE data are damaged") from None
        raise
    runner.set_option("planar_configuration", 1)
    assert isinstance(frame, bytearray)
    return frame
