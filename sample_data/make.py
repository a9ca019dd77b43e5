"""Makes the sample files: real images from the test files of the packages `pydicom` and `pydicom-data`, and three
simulated studies, drawn from seeds.

    python sample_data/make.py

Pixel data are copied bit by bit. Of the header, only the elements named below are kept: no name, id, date,
institution, device, comment or private element. UIDs are new, made from the file's name, so that every run
writes the same bytes.
"""

import hashlib
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import generate_uid

from vlm_serve.clinical.decode import decode
from vlm_serve.clinical.simulated import write_simulated
from vlm_serve.config import DecodeLimits
from vlm_serve.training.studies.sections import head_ct
from vlm_serve.training.studies.simulate import as_image, chest_film, leg_film

HERE = Path(__file__).parent

SOURCES = {
    "chest_radiograph": "RG1_J2KI.dcm",
    "leg_radiograph": "RG3_J2KR.dcm",
    "abdomen_ct": "explicit_VR-UN.dcm",
    "shoulder_mr": "MR2_J2KR.dcm",
}

KEPT = """
SpecificCharacterSet ImageType SOPClassUID Modality PatientSex
BodyPartExamined KVP SliceThickness SpacingBetweenSlices ViewPosition Laterality
ScanningSequence SequenceVariant ScanOptions MRAcquisitionType RepetitionTime EchoTime MagneticFieldStrength
EchoTrainLength FlipAngle PatientPosition PatientOrientation ImagePositionPatient ImageOrientationPatient
InstanceNumber SeriesNumber SamplesPerPixel PhotometricInterpretation Rows Columns PixelSpacing BitsAllocated
BitsStored HighBit PixelRepresentation WindowCenter WindowWidth RescaleIntercept RescaleSlope RescaleType
LossyImageCompression LossyImageCompressionRatio LossyImageCompressionMethod PixelData
""".split()

EMPTIED = """
PatientName PatientID PatientBirthDate StudyDate StudyTime AccessionNumber ReferringPhysicianName StudyID Manufacturer
""".split()
"""Type 2 of their modules: present and without a value."""


def make_dicom(name: str, source: str) -> bytes:
    original = pydicom.dcmread(get_testdata_file(source, download=False))
    made = Dataset()
    for keyword in KEPT:
        if keyword in original:
            made[keyword] = original[keyword]
    if not all(spacing > 0 for spacing in made.get("PixelSpacing", ())):
        del made.PixelSpacing  # the chest film's is zero, which the standard does not allow
    for keyword in EMPTIED:
        setattr(made, keyword, "")
    made.PatientIdentityRemoved = "YES"
    made.DeidentificationMethod = "Allow-list of elements, vlm-serve sample_data/make.py"
    for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        setattr(made, keyword, generate_uid(entropy_srcs=["vlm-serve sample", name, keyword]))
    made.file_meta = FileMetaDataset()
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    made.file_meta.TransferSyntaxUID = original.file_meta.TransferSyntaxUID
    made["PixelData"].is_undefined_length = original["PixelData"].is_undefined_length
    buffer = BytesIO()
    made.save_as(buffer, enforce_file_format=True, implicit_vr=False, little_endian=True)
    return buffer.getvalue()


def make_pictures(name: str, dicom: bytes) -> None:
    """The same image as PNG and JPEG, 512 pixels a side at most, as vlm-serve renders it."""
    pixels = decode(dicom, "application/dicom", DecodeLimits()).pixels
    picture = Image.fromarray(pixels).convert("L")
    picture.thumbnail((512, 512), Image.Resampling.LANCZOS)
    picture.save(HERE / f"{name}.png", optimize=True)
    picture.save(HERE / f"{name}.jpg", quality=90)


SIMULATED = {
    "simulated_chest": (chest_film, "pneumothorax", 107),
    "simulated_head_ct": (head_ct, "haemorrhage", 108),
    "simulated_legs": (leg_film, "fracture", 103),
}
"""By these seeds all three are phantoms: nobody's body is in them."""


def make_simulated(name: str) -> bytes:
    maker, finding, seed = SIMULATED[name]
    picture = maker(np.random.default_rng(seed), "test", finding=finding)
    assert picture.truth.source.startswith("phantom")
    print(f"{name}: {picture.truth}")
    return write_simulated(as_image(picture), name)


def main() -> None:
    warnings.simplefilter("ignore")
    for name in SIMULATED:
        (HERE / f"{name}.dcm").write_bytes(make_simulated(name))
    for name, source in SOURCES.items():
        data = make_dicom(name, source)
        (HERE / f"{name}.dcm").write_bytes(data)
        if name == "chest_radiograph":
            make_pictures(name, data)
    for path in sorted(HERE.glob("*.[dpj][cpn]*")):
        data = path.read_bytes()
        print(f"{path.name}  {len(data)} bytes  sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
