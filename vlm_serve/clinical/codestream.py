"""What a JPEG, JPEG-LS or JPEG 2000 codestream says about itself, read before any decoder sees it.

A decoder allocates by the codestream's own header, whatever the DICOM header says: 589 bytes that declare
12,000² pixels cost it 900 MB. So `dicom.py` compares the two first.
"""

from dataclasses import dataclass

from vlm_serve.errors import CorruptImageError

_BREAKS_OFF = "The compressed image breaks off in its header. Send the complete file."
_NOT_A_CODESTREAM = "The compressed image does not begin as its transfer syntax requires. Export the file again."

_SOI, _SOS = 0xD8, 0xDA
_STANDALONE = {0x01, *range(0xD0, 0xD9)}
_FRAME_HEADERS = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7}
"""SOF0 to SOF15 without DHT, JPG and DAC; SOF55 is JPEG-LS."""

_JP2_SIGNATURE = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
_J2K_START = b"\xff\x4f\xff\x51"
_MAX_TILES = 65_535


@dataclass(frozen=True, slots=True)
class CodestreamHeader:
    rows: int
    columns: int
    samples: int
    precision: int
    """Bits a sample."""


def read_jpeg_header(data: bytes) -> CodestreamHeader:
    """The frame header of a JPEG (ISO/IEC 10918-1) or JPEG-LS (ISO/IEC 14495-1) codestream.

    Raises:
        CorruptImageError: no frame header comes before the first scan.
    """
    if data[:2] != b"\xff\xd8":
        raise CorruptImageError(_NOT_A_CODESTREAM)
    position = 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            raise CorruptImageError(_NOT_A_CODESTREAM)
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker in _STANDALONE:
            position += 2
        elif marker in _FRAME_HEADERS:
            body = data[position + 4 : position + 10]
            if len(body) < 6:
                break
            return CodestreamHeader(
                rows=int.from_bytes(body[1:3], "big"),
                columns=int.from_bytes(body[3:5], "big"),
                samples=body[5],
                precision=body[0],
            )
        elif marker == _SOS:
            raise CorruptImageError(_NOT_A_CODESTREAM)
        else:
            position += 2 + max(2, int.from_bytes(data[position + 2 : position + 4], "big"))
    raise CorruptImageError(_BREAKS_OFF)


def read_jpeg2000_header(data: bytes) -> CodestreamHeader:
    """The SIZ segment (ISO/IEC 15444-1 A.5.1) of a JPEG 2000 or HTJ2K codestream, bare or in a JP2 file.

    Raises:
        CorruptImageError: no SIZ segment, or one that contradicts itself.
    """
    start = _find_codestream(data) if data.startswith(_JP2_SIGNATURE) else 0
    if data[start : start + 4] != _J2K_START:
        raise CorruptImageError(_NOT_A_CODESTREAM)
    siz = data[start + 4 : start + 4 + 2 + 36]  # Lsiz, Rsiz, eight 32-bit fields, Csiz
    components = int.from_bytes(siz[36:38], "big")
    specifications = data[start + 42 : start + 42 + 3 * components]
    if len(siz) < 38 or len(specifications) < 3 * components:
        raise CorruptImageError(_BREAKS_OFF)
    x1, y1, x0, y0, tile_width, tile_height, tile_x, tile_y = (
        int.from_bytes(siz[4 + 4 * i : 8 + 4 * i], "big") for i in range(8)
    )
    sampled_alike = all(specifications[3 * i + 1 : 3 * i + 3] == b"\x01\x01" for i in range(components))
    if not (components and sampled_alike and x0 < x1 and y0 < y1 and tile_width and tile_height):
        raise CorruptImageError("The JPEG 2000 header contradicts itself. Export the file again.")
    if -(-(x1 - tile_x) // tile_width) * -(-(y1 - tile_y) // tile_height) > _MAX_TILES:
        raise CorruptImageError("The JPEG 2000 header declares more tiles than the format allows.")
    precision = max((specifications[3 * i] & 0x7F) + 1 for i in range(components))
    return CodestreamHeader(rows=y1 - y0, columns=x1 - x0, samples=components, precision=precision)


def _find_codestream(data: bytes) -> int:
    """Where the `jp2c` box of a JP2 file begins its codestream."""
    position = 0
    while position + 8 <= len(data):
        length, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        header = 8
        if length == 1:
            length, header = int.from_bytes(data[position + 8 : position + 16], "big"), 16
        if kind == b"jp2c":
            return position + header
        if length < header:
            raise CorruptImageError(_NOT_A_CODESTREAM)
        position += length
    raise CorruptImageError(_BREAKS_OFF)
