"""Checked readings of DICOM elements: numbers, code strings, look-up tables, functional groups.

Serves `dicom.py`. A file may hold anything under any keyword; what comes out of here has its type, or is a
`CorruptImageError` that names the keyword and never the value.
"""

import math

import numpy as np
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from vlm_serve.clinical.greyscale import LookupTable
from vlm_serve.errors import CorruptImageError

_MAX_LUT_ENTRIES = 65_536


def whole_number(dataset: Dataset, keyword: str, default: int | None = None) -> int:
    """A single whole number; `default` where the element is absent or empty."""
    value = dataset.get(keyword)
    if value is None or value == "":
        if default is None:
            raise CorruptImageError(f"{keyword} is missing from the file's header.")
        return default
    if isinstance(value, bytes) and len(value) == 2:  # US or SS that pydicom left undecided
        return int.from_bytes(value, "little")
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise CorruptImageError(f"{keyword} of the file's header is not a whole number.") from None


def numbers(dataset: Dataset, keyword: str) -> list[float]:
    """The values of a DS, FD or FL element, however many; empty where it is absent."""
    value = dataset.get(keyword)
    if value is None or value == "":
        return []
    values = value if isinstance(value, (MultiValue, list, tuple)) else [value]
    try:
        return [float(item) if item not in (None, "") else math.nan for item in values]
    except (TypeError, ValueError, OverflowError):
        raise CorruptImageError(f"{keyword} of the file's header is not a number.") from None


def code_string(dataset: Dataset, keyword: str) -> str:
    """A single code string in capitals, empty where it is absent."""
    value = dataset.get(keyword)
    return value.strip().upper() if isinstance(value, str) else ""


def items(dataset: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence; none where it is absent."""
    value = dataset.get(keyword)
    return [item for item in value if isinstance(item, Dataset)] if value is not None else []


def functional_group(dataset: Dataset, frame: int, keyword: str) -> Dataset | None:
    """The item of a functional group macro (PS3.3 C.7.6.16) for a frame: its own, else the shared one."""
    per_frame = items(dataset, "PerFrameFunctionalGroupsSequence")
    own = per_frame[frame : frame + 1] if len(per_frame) > frame else []
    for group in (*own, *items(dataset, "SharedFunctionalGroupsSequence")[:1]):
        if found := items(group, keyword):
            return found[0]
    return None


def lookup_table(descriptor: object, data: object, *, is_signed: bool, little_endian: bool) -> LookupTable:
    """A LUT from its descriptor (entries, first value mapped, bits) and its data.

    `is_signed` says that the values it maps may be negative: then 0x8000 and above stand for those.

    Raises:
        CorruptImageError: the two do not fit together.
    """
    broken = CorruptImageError("A look-up table of the file does not fit its descriptor. Export the file again.")
    if not isinstance(descriptor, (MultiValue, list, tuple)) or len(descriptor) != 3:
        raise broken
    try:
        count, first, bits = (int(value) for value in descriptor)
    except (TypeError, ValueError):
        raise broken from None
    count = count & 0xFFFF or _MAX_LUT_ENTRIES
    if is_signed and first > 0x7FFF:
        first -= 0x10000
    entries = _lut_entries(data, count, little_endian)
    if entries is None or not 1 <= bits <= 16:
        raise broken
    # Some writers say 8 bits and store more; the table then spans what its greatest entry needs.
    return LookupTable(first, entries, max(bits, int(entries.max()).bit_length()))


def _lut_entries(data: object, count: int, little_endian: bool) -> np.ndarray | None:
    if isinstance(data, bytes):
        if len(data) in (count, count + count % 2) and len(data) < 2 * count:
            return np.frombuffer(data, np.uint8, count)
        if len(data) < 2 * count:
            return None
        return np.frombuffer(data, "<u2" if little_endian else ">u2", count)
    if isinstance(data, int):
        data = [data]
    if not isinstance(data, (MultiValue, list, tuple)) or len(data) < count:
        return None
    return np.asarray([int(value) & 0xFFFF for value in data[:count]], np.uint16)
