"""Stored pixel values of one frame, decoded by the plug-ins that are allowed here. Serves `dicom.py`.

The plug-ins are named by transfer syntax, never left to what happens to be installed: none is under the
GPL, and the receipt can say which one it was.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from pydicom import uid
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import Decoder, get_decoder
from pydicom.uid import UID

from vlm_serve.clinical.codestream import CodestreamHeader, read_jpeg2000_header, read_jpeg_header
from vlm_serve.errors import ConfigurationError, CorruptImageError, UnsupportedImageError

_JPEG_LS = ("pyjpegls", "gdcm")
_JPEG_2000 = ("openjpeg", "gdcm")
_HTJ2K = ("openjpeg",)

PLUGINS: dict[str, tuple[str, ...]] = {
    uid.ImplicitVRLittleEndian: (),
    uid.ExplicitVRLittleEndian: (),
    uid.ExplicitVRBigEndian: (),
    uid.DeflatedExplicitVRLittleEndian: (),
    uid.RLELossless: ("rle", "pydicom"),
    uid.JPEGBaseline8Bit: ("pillow", "gdcm"),
    uid.JPEGExtended12Bit: ("imagecodecs",),
    uid.JPEGLossless: ("gdcm",),
    uid.JPEGLosslessSV1: ("gdcm",),
    uid.JPEGLSLossless: _JPEG_LS,
    uid.JPEGLSNearLossless: _JPEG_LS,
    uid.JPEG2000Lossless: _JPEG_2000,
    uid.JPEG2000: _JPEG_2000,
    uid.HTJ2KLossless: _HTJ2K,
    uid.HTJ2KLosslessRPCL: _HTJ2K,
    uid.HTJ2K: _HTJ2K,
}
"""pydicom's plug-ins by transfer syntax, the preferred one first; none for values that are stored as such."""

_JPEG_2000_FAMILY = {
    uid.JPEG2000Lossless,
    uid.JPEG2000,
    uid.HTJ2KLossless,
    uid.HTJ2KLosslessRPCL,
    uid.HTJ2K,
}

_OWN_PLUGINS = {"imagecodecs": "decode_jpeg_12_bit", "openjpeg": "decode_jpeg2000", "rle": "decode_rle"}
"""Functions of `plugins.py`."""

_PACKAGES = {"openjpeg": "pylibjpeg-openjpeg", "rle": "pylibjpeg-rle", "gdcm": "python-gdcm", "": "pydicom"}
"""Of the plug-ins that do not bear their package's name."""

_HEADER_READERS: dict[str, Callable[[bytes], CodestreamHeader]] = {
    syntax: read_jpeg2000_header if syntax in _JPEG_2000_FAMILY else read_jpeg_header
    for syntax, plugins in PLUGINS.items()
    if plugins and syntax != uid.RLELossless
}


@dataclass(frozen=True, slots=True)
class PixelLayout:
    """Group 0028 as far as decoding needs it: checked numbers, nothing else of the file."""

    transfer_syntax: str
    photometric_interpretation: str
    rows: int
    columns: int
    samples_per_pixel: int
    bits_allocated: int
    bits_stored: int
    pixel_representation: int
    planar_configuration: int
    frames: int
    keyword: str = "PixelData"
    vr: str = "OW"

    @property
    def is_signed(self) -> bool:
        return self.pixel_representation == 1


@dataclass(frozen=True, slots=True)
class StoredFrame:
    """`values` are `[rows, columns]` or `[rows, columns, 3]` as stored, RGB where there was a YBR."""

    values: np.ndarray
    photometric_interpretation: str
    decoder: str


def decode_frame(
    data: bytes, layout: PixelLayout, frame: int, extended_offsets: tuple[bytes, bytes] | None = None
) -> StoredFrame:
    """Decodes one frame of `data`, the value of the pixel data element.

    Raises:
        CorruptImageError: the data break off, contradict the header, or no plug-in can decode them.
        Exception: what a parser throws at a hostile file; `decode.py` translates it.
    """
    plugins = PLUGINS[layout.transfer_syntax]
    if plugins:
        # Without an offset table several fragments may be one frame: pydicom needs the count to tell.
        encoded = get_frame(data, frame, number_of_frames=layout.frames, extended_offsets=extended_offsets)
        _check_codestream(encoded, layout)
    decoder = _decoder(layout.transfer_syntax)
    for plugin in plugins or ("",):
        try:
            values, properties = decoder.as_array(
                data, index=frame, decoding_plugin=plugin, **_options(layout, extended_offsets)
            )
        except (RuntimeError, NotImplementedError) as error:  # how pydicom says that a plug-in failed
            if isinstance(error, RecursionError):
                raise
            continue
        return StoredFrame(values, str(properties["photometric_interpretation"]), _describe(plugin))
    raise CorruptImageError(
        "The compressed pixel data cannot be decoded within the limits. Check the file, or export it again."
    )


def check_supported(transfer_syntax: str) -> None:
    """
    Raises:
        UnsupportedImageError: the syntax is video, retired or private.
    """
    if transfer_syntax not in PLUGINS:
        known = UID(transfer_syntax).name
        name = known if known != transfer_syntax else "a private or unknown one"
        raise UnsupportedImageError(
            f"The transfer syntax ({name}) is not decoded here. "
            "Export the file uncompressed, or as JPEG 2000, JPEG-LS, RLE or JPEG."
        )


def _check_codestream(encoded: bytes, layout: PixelLayout) -> None:
    reader = _HEADER_READERS.get(layout.transfer_syntax)
    if reader is None:
        return
    header = reader(encoded)
    declared = (layout.rows, layout.columns, layout.samples_per_pixel)
    if (header.rows, header.columns, header.samples) != declared or header.precision > layout.bits_allocated:
        raise CorruptImageError(
            "The compressed image and the DICOM header disagree on rows, columns, samples or bits. "
            "Export the file again from its source."
        )


def _options(layout: PixelLayout, extended_offsets: tuple[bytes, bytes] | None) -> dict[str, Any]:
    options: dict[str, Any] = {
        "rows": layout.rows,
        "columns": layout.columns,
        "samples_per_pixel": layout.samples_per_pixel,
        "bits_allocated": layout.bits_allocated,
        "bits_stored": layout.bits_stored,
        "pixel_representation": layout.pixel_representation,
        "photometric_interpretation": layout.photometric_interpretation,
        "number_of_frames": layout.frames,
        "pixel_keyword": layout.keyword,
        "pixel_vr": layout.vr,
    }
    if layout.samples_per_pixel > 1:
        options["planar_configuration"] = layout.planar_configuration
    if extended_offsets is not None:
        options["extended_offsets"] = extended_offsets
    return options


def _describe(plugin: str) -> str:
    package = _PACKAGES.get(plugin, plugin)
    return f"{package} {package_version(package)}"


@functools.cache
def _decoder(transfer_syntax: str) -> Decoder:
    """pydicom's decoder, with our plug-ins added and every one that the table names in place."""
    decoder = get_decoder(transfer_syntax)
    for plugin in PLUGINS[transfer_syntax]:
        if plugin in _OWN_PLUGINS and plugin not in decoder.available_plugins:
            decoder.add_plugin(plugin, ("vlm_serve.clinical.plugins", _OWN_PLUGINS[plugin]))
        if plugin not in decoder.available_plugins:
            raise ConfigurationError(f"The package {_PACKAGES.get(plugin, plugin)} is missing. Install it again.")
    return decoder


def load_decoders() -> None:
    """Imports every decoder of the table, so that the first file does not wait for it.

    Raises:
        ConfigurationError: one is not installed.
    """
    for transfer_syntax in PLUGINS:
        _decoder(transfer_syntax)


@functools.cache
def package_version(package: str) -> str:
    return version(package)
