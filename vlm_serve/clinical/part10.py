"""From the bytes of a DICOM file (PS3.10) to a `Dataset` of the elements that rendering needs, under limits.

Serves `dicom.py`. The structure is walked once, without recursion and without keeping values, before
pydicom parses it: pydicom inflates without a bound and recurses with the nesting. Elements that are not
asked for (names, dates, ids, private ones) are never made into values.
"""

import zlib
from collections.abc import Collection
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from vlm_serve.config import MIB, DecodeLimits
from vlm_serve.errors import CorruptImageError, ImageLimitError

PREAMBLE_BYTES = 128
PREFIX = b"DICM"

_INFLATE_FREE_BYTES = 16 * MIB
"""Inflating to less than this harms nobody, whatever the ratio: an empty image deflates 1000:1."""

ByteOrder = Literal["little", "big"]

_BREAKS_OFF = "The DICOM file breaks off. Send the complete file."
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_PIXEL_DATA = 0x7FE00010
_LONG_VRS = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
"""With two reserved bytes and a 32-bit length (PS3.5 7.1.2)."""


@dataclass(frozen=True, slots=True)
class Part10File:
    transfer_syntax: str
    dataset: Dataset


def looks_like_dicom(data: bytes) -> bool:
    """True for `DICM` after the preamble; without one, for a first element that only DICOM begins with.

    That element is of group 0002 or 0008 with a number below 0100, with a VR of two capitals or, in
    implicit VR, an even length under 1 KiB.
    """
    if data[PREAMBLE_BYTES : PREAMBLE_BYTES + 4] == PREFIX:
        return True
    head = data[:8]
    if len(head) < 8:
        return False
    orders: tuple[ByteOrder, ...] = ("little", "big")
    for order in orders:
        group, element = int.from_bytes(head[:2], order), int.from_bytes(head[2:4], order)
        length = int.from_bytes(head[4:8], order)
        vr_or_length = _is_vr(head[4:6]) or (order == "little" and length % 2 == 0 and length < 1024)
        if group in (0x0002, 0x0008) and element < 0x0100 and vr_or_length:
            return True
    return False


def read_part10(data: bytes, limits: DecodeLimits, keywords: Collection[str]) -> Part10File:
    """Reads the elements named by `keywords`, of the top level and whole sequences.

    Raises:
        CorruptImageError: the file breaks off or its deflated part is damaged.
        ImageLimitError: it inflates or nests past a limit.
        Exception: what pydicom throws at a hostile file; `decode.py` translates it.
    """
    start = PREAMBLE_BYTES + 4 if data[PREAMBLE_BYTES : PREAMBLE_BYTES + 4] == PREFIX else 0
    syntax, start = _read_meta(data, start)
    content = _inflate(memoryview(data)[start:], limits) if syntax == DeflatedExplicitVRLittleEndian else data[start:]
    if syntax is None:
        syntax = _guess_syntax(content)
    implicit = syntax == ImplicitVRLittleEndian
    little = syntax != ExplicitVRBigEndian
    # Some files say one and hold the other; pydicom reads what is there, and so must the walk.
    implicit = not _is_vr(content[4:6]) if len(content) >= 6 else implicit
    _walk(content, implicit, little, limits.max_sequence_depth)
    tags: list[BaseTag | int] = [BaseTag(tag) for tag in map(_tag, keywords)]
    dataset = read_dataset(BytesIO(content), implicit, little, specific_tags=tags)
    return Part10File(str(syntax), dataset)


def _tag(keyword: str) -> int:
    tag = tag_for_keyword(keyword)
    assert tag is not None
    return tag


def _is_vr(data: bytes) -> bool:
    return len(data) == 2 and data.isalpha() and data.isupper()


def _read_meta(data: bytes, start: int) -> tuple[str | None, int]:
    """The transfer syntax of group 0002 (explicit VR little endian), and where the dataset begins."""
    syntax: str | None = None
    position = start
    while data[position : position + 2] == b"\x02\x00":
        vr = data[position + 4 : position + 6]
        if vr in _LONG_VRS:
            length, header = int.from_bytes(data[position + 8 : position + 12], "little"), 12
        elif _is_vr(vr):
            length, header = int.from_bytes(data[position + 6 : position + 8], "little"), 8
        else:  # written in implicit VR, against the standard
            length, header = int.from_bytes(data[position + 4 : position + 8], "little"), 8
        value = data[position + header : position + header + length]
        if len(value) < length:
            raise CorruptImageError(_BREAKS_OFF)
        if data[position + 2 : position + 4] == b"\x10\x00":
            syntax = str(UID(value.rstrip(b"\0 ").decode("ascii", "replace")))
        position += header + length
    return syntax, position


def _guess_syntax(content: bytes) -> str:
    """For a file that does not name its transfer syntax: an uncompressed one, by its first element."""
    if not _is_vr(content[4:6]):
        return ImplicitVRLittleEndian
    # Group 0008 read with the wrong order of bytes is 0800.
    return ExplicitVRBigEndian if int.from_bytes(content[:2], "little") >= 0x0400 else ExplicitVRLittleEndian


def _inflate(deflated: memoryview, limits: DecodeLimits) -> bytes:
    allowed = min(limits.max_inflated_bytes, max(_INFLATE_FREE_BYTES, limits.max_inflate_ratio * len(deflated)))
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = inflater.decompress(deflated, allowed + 1)
    except zlib.error:
        raise CorruptImageError("The deflated part of the DICOM file is damaged. Send the file again.") from None
    if len(content) > allowed:
        raise ImageLimitError(
            f"The deflated file grows past {allowed // MIB} MiB. Send it uncompressed, or with compressed pixel data."
        )
    if not inflater.eof:
        raise CorruptImageError(_BREAKS_OFF)
    return content


@dataclass(slots=True)
class _Level:
    """An open sequence or item of the walk; `end` is None where a delimiter ends it."""

    is_sequence: bool
    end: int | None


def _walk(content: bytes, implicit: bool, little: bool, max_depth: int) -> None:
    """Follows the elements to the end of the file, into sequences of undefined length.

    It stops without complaint where it cannot follow (a VR that no standard knows): pydicom then has
    the word, and Python's own limit of recursion is behind that.

    Raises:
        CorruptImageError: an element, a sequence or encapsulated pixel data goes on past the end of the file.
        ImageLimitError: sequences nest deeper than `max_depth`.
    """
    order: ByteOrder = "little" if little else "big"
    levels: list[_Level] = []
    position, size = 0, len(content)
    while position < size:
        while levels and levels[-1].end is not None and position >= levels[-1].end:
            levels.pop()
        header = content[position : position + 8]
        if len(header) < 8:
            if header.strip(b"\0"):
                raise CorruptImageError(_BREAKS_OFF)
            return  # padding
        tag = int.from_bytes(header[:2], order) << 16 | int.from_bytes(header[2:4], order)
        if tag >> 16 == 0xFFFE:
            length = int.from_bytes(header[4:], order)
            position += 8
            if tag == _ITEM and levels and levels[-1].is_sequence:
                levels.append(_Level(False, None if length == _UNDEFINED else position + length))
            elif tag in (_ITEM_END, _SEQUENCE_END) and levels:
                levels.pop()
            else:
                return
            continue
        length, header_size, vr = _element_header(content, position, implicit, order)
        if vr is None and not implicit:
            return
        position += header_size
        if length != _UNDEFINED:
            position += length
        elif tag == _PIXEL_DATA:
            position = _skip_fragments(content, position, order)
        elif vr not in (b"SQ", b"UN", None):
            return
        else:
            levels.append(_Level(True, None))
            if sum(level.is_sequence for level in levels) > max_depth:
                raise ImageLimitError(f"The file nests sequences deeper than {max_depth}; no image needs that.")
    if position > size or any(level.end is None for level in levels):
        raise CorruptImageError(_BREAKS_OFF)


def _element_header(content: bytes, position: int, implicit: bool, order: ByteOrder) -> tuple[int, int, bytes | None]:
    """Length of the value, length of the header, VR (None in implicit VR, or where there is none)."""
    vr = content[position + 4 : position + 6]
    if implicit or not _is_vr(vr):
        return int.from_bytes(content[position + 4 : position + 8], order), 8, None
    if vr in _LONG_VRS:
        return int.from_bytes(content[position + 8 : position + 12], order), 12, vr
    return int.from_bytes(content[position + 6 : position + 8], order), 8, vr


def _skip_fragments(content: bytes, position: int, order: ByteOrder) -> int:
    """Where encapsulated pixel data end (PS3.5 A.4)."""
    while position + 8 <= len(content):
        group, element = content[position : position + 2], content[position + 2 : position + 4]
        tag = int.from_bytes(group, order) << 16 | int.from_bytes(element, order)
        length = int.from_bytes(content[position + 4 : position + 8], order)
        position += 8
        if tag == _SEQUENCE_END:
            return position
        if tag != _ITEM or length == _UNDEFINED:
            raise CorruptImageError(
                "The compressed pixel data are not framed as DICOM requires. Export the file again."
            )
        position += length
    raise CorruptImageError(_BREAKS_OFF)
