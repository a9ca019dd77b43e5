"""Writes a simulated picture as a DICOM file that any viewer opens: CR, CT or MR Image Storage (PS3.3 A.2 to A.4)."""

import io
from dataclasses import dataclass

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)

_CLASSES = {"radiograph": ComputedRadiographyImageStorage, "CT": CTImageStorage, "MR": MRImageStorage}
_MODALITIES = {"radiograph": "CR", "CT": "CT", "MR": "MR"}
_ORIENTATIONS = {
    "axial": [1, 0, 0, 0, 1, 0],
    "coronal": [1, 0, 0, 0, 0, -1],
    "sagittal": [0, 1, 0, 0, 0, -1],
}
_EMPTY = """
PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime AccessionNumber ReferringPhysicianName StudyID
Manufacturer Laterality
""".split()
"""Type 2 of their modules: present and without a value; this is nobody."""


@dataclass(frozen=True, slots=True)
class SimulatedImage:
    """`pixels` `[rows, columns]` are int16 Hounsfield units for CT, uint16 from 0 to 4095 otherwise, shown white where
    they are high; `spacing` of rows and columns in mm; `window` is level and width; `modality` is radiograph, CT or MR,
    `plane` frontal, axial, coronal or sagittal.
    """

    pixels: np.ndarray
    spacing: tuple[float, float]
    window: tuple[float, float]
    modality: str
    region: str
    plane: str


def write_simulated(image: SimulatedImage, name: str, *, inverted: bool = False) -> bytes:
    """The file. UIDs follow from `name`, so that every run writes the same bytes; `inverted` stores MONOCHROME1,
    which looks the same.
    """
    data = Dataset()
    data.SOPClassUID = _CLASSES[image.modality]
    data.Modality = _MODALITIES[image.modality]
    for keyword in _EMPTY:
        setattr(data, keyword, "")
    for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        setattr(data, keyword, generate_uid(entropy_srcs=["vlm-serve simulated study", name, keyword]))
    data.PatientIdentityRemoved = "YES"
    data.DeidentificationMethod = "Simulated study, of no patient"
    data.DerivationDescription = "Simulated finding, for demonstration only"
    data.ImageType = ["DERIVED", "PRIMARY", *(["OTHER"] if image.modality == "MR" else [])]
    data.BodyPartExamined = image.region.upper()
    data.BurnedInAnnotation = "NO"
    data.SeriesNumber = data.InstanceNumber = 1
    if image.modality == "radiograph":
        data.ViewPosition = "AP"
        data.PatientOrientation = ["L", "F"]
        data.ImagerPixelSpacing = [round(mm, 4) for mm in image.spacing]
    else:
        _add_plane(data, image)
    _add_pixels(data, image, inverted)
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _add_plane(data: Dataset, image: SimulatedImage) -> None:
    data.PixelSpacing = [round(mm, 4) for mm in image.spacing]
    data.ImageOrientationPatient = _ORIENTATIONS[image.plane]
    data.ImagePositionPatient = [0, 0, 0]
    data.SliceThickness = ""
    data.PositionReferenceIndicator = ""
    if image.modality == "CT":
        data.ImageType = ["DERIVED", "PRIMARY", "AXIAL"] if image.plane == "axial" else data.ImageType
        data.KVP = data.AcquisitionNumber = ""
        data.RescaleIntercept, data.RescaleSlope, data.RescaleType = 0, 1, "HU"
    else:
        data.ScanningSequence, data.SequenceVariant, data.ScanOptions = "RM", "NONE", ""
        data.MRAcquisitionType = data.RepetitionTime = data.EchoTime = data.EchoTrainLength = ""


def _add_pixels(data: Dataset, image: SimulatedImage, inverted: bool) -> None:
    signed = image.pixels.dtype == np.int16
    stored = 4095 - image.pixels if inverted else image.pixels
    data.SamplesPerPixel = 1
    data.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    data.Rows, data.Columns = stored.shape
    data.BitsAllocated = 16
    data.BitsStored = 16 if signed else 12
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(signed)
    level, width = image.window
    data.WindowCenter, data.WindowWidth = level, width
    data.PixelData = np.ascontiguousarray(stored).astype(stored.dtype.newbyteorder("<")).tobytes()
