"""DICOM files made in memory, and the test files of pydicom and pydicom-data."""

import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import config
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from vlm_serve.clinical.decode import decode
from vlm_serve.clinical.image import ClinicalImage
from vlm_serve.config import DecodeLimits

LIMITS = DecodeLimits()


def sample(name: str) -> bytes:
    """A test file of the pydicom packages."""
    return _path(name).read_bytes()


def all_samples() -> list[Path]:
    """Every DICOM file of the two packages, those without an extension too."""
    folders = {_path("CT_small.dcm").parent, _path("RG1_UNCR.dcm").parent}
    return sorted(
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in ("", ".dcm") and path.name != "README"
    )


def _path(name: str) -> Path:
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str)
    return Path(path)


def decoded(data: bytes, media_type: str = "application/dicom") -> ClinicalImage:
    return decode(data, media_type, LIMITS)


def grey_file(
    stored: np.ndarray, syntax: str = ExplicitVRLittleEndian, encoded: bytes | None = None, **elements: Any
) -> bytes:
    """A single-frame greyscale image with `elements` set over sane defaults; `encoded` is its one codestream."""
    dataset = Dataset()
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = "1.2.3"
    dataset.Modality = "CT"
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape[-2:]
    dataset.BitsAllocated = 8 * stored.dtype.itemsize
    dataset.BitsStored = dataset.BitsAllocated
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    dataset.HighBit = elements.get("HighBit", dataset.BitsStored - 1)
    if encoded is not None:
        dataset.PixelData = encapsulate([encoded])
        dataset["PixelData"].is_undefined_length = True
        dataset["PixelData"].VR = "OB"
    else:
        order = ">" if syntax == ExplicitVRBigEndian else "<"
        dataset.PixelData = stored.astype(stored.dtype.newbyteorder(order)).tobytes()
        dataset["PixelData"].VR = "OB" if stored.dtype.itemsize == 1 else "OW"
    return file_of(dataset, syntax)


def file_of(dataset: Dataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.get("SOPClassUID", CTImageStorage)
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.file_meta.TransferSyntaxUID = syntax
    buffer = BytesIO()
    with config.disable_value_validation():
        dataset.save_as(
            buffer,
            enforce_file_format=True,
            implicit_vr=syntax == ImplicitVRLittleEndian,
            little_endian=syntax != ExplicitVRBigEndian,
        )
    return buffer.getvalue()


def deflate_bomb(megabytes: int) -> bytes:
    """A deflated file whose dataset is one element of zeros."""
    meta = file_of(Dataset(), DeflatedExplicitVRLittleEndian)
    meta = meta[: meta.index(DeflatedExplicitVRLittleEndian.encode()) + 22]
    compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    size = megabytes * 1024**2
    content = b"\x08\x00\x08\x00UN\0\0" + size.to_bytes(4, "little")
    body = [compressor.compress(content)]
    body += [compressor.compress(bytes(1024**2)) for _ in range(megabytes)]
    return meta + b"".join(body) + compressor.flush()


def siz(rows: int, columns: int, tile: int | None = None) -> bytes:
    """The start of a JPEG 2000 codestream, one unsigned 16-bit component."""
    fields = (columns, rows, 0, 0, tile or columns, tile or rows, 0, 0)
    body = b"\0\0" + b"".join(field.to_bytes(4, "big") for field in fields) + b"\0\x01\x0f\x01\x01"
    return b"\xff\x4f\xff\x51" + (len(body) + 2).to_bytes(2, "big") + body + bytes(500)


def sof(rows: int, columns: int, marker: int = 0xC0) -> bytes:
    """The start of a JPEG (SOF0) or JPEG-LS (SOF55) codestream, one 8-bit component."""
    body = b"\x08" + rows.to_bytes(2, "big") + columns.to_bytes(2, "big") + b"\x01\x01\x11\x00"
    return b"\xff\xd8\xff" + bytes([marker]) + (len(body) + 2).to_bytes(2, "big") + body + bytes(500)


def nested_sequences(depth: int) -> bytes:
    """Sequences of undefined length in each other, which pydicom parses by recursion."""
    prefix = grey_file(np.zeros((4, 4), np.uint16))
    start = prefix.index(b"\x08\x00\x16\x00UI")
    opening = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    closing = b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
    return prefix[:start] + opening * depth + closing * depth + prefix[start:]
