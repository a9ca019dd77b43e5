"""The files of `sample_data/` are what its README says, show what it says, and name nobody."""

import hashlib
import re
from pathlib import Path

import pydicom
import pytest

from tests.clinical.dicom_files import decoded

FOLDER = Path(__file__).parents[2] / "sample_data"
README = (FOLDER / "README.md").read_text()
DICOM_FILES = sorted(FOLDER.glob("*.dcm"))
IDENTIFYING = (
    *("PatientName", "PatientID", "PatientBirthDate", "StudyDate", "StudyTime", "AccessionNumber", "StudyID"),
    *("ReferringPhysicianName", "Manufacturer", "InstitutionName", "StationName"),
)


def test_every_file_is_listed_with_its_size_and_digest() -> None:
    files = [path for path in FOLDER.iterdir() if path.suffix in (".dcm", ".png", ".jpg")]
    for path in files:
        data = path.read_bytes()
        row = next(line for line in README.splitlines() if line.startswith(f"| `{path.name}`"))
        assert f"{len(data):,}" in row
        assert hashlib.sha256(data).hexdigest() in row
    assert len(files) == len(re.findall(r"^\| `", README, re.MULTILINE))
    assert sum(path.stat().st_size for path in files) < 5_000_000


@pytest.mark.parametrize("path", DICOM_FILES, ids=lambda path: path.stem)
def test_no_sample_identifies_anybody(path: Path) -> None:
    dataset = pydicom.dcmread(path)
    assert not [element for element in dataset.iterall() if element.tag.is_private]
    assert not [keyword for keyword in IDENTIFYING if dataset.get(keyword)]
    assert dataset.PatientIdentityRemoved == "YES"
    names = [element.keyword for element in dataset.iterall() if element.VR in ("PN", "LT", "ST", "UT", "DA", "DT")]
    assert all(not dataset.get(name) for name in names)


@pytest.mark.parametrize("path", DICOM_FILES, ids=lambda path: path.stem)
def test_no_sample_claims_what_its_source_does_not(path: Path) -> None:
    dataset = pydicom.dcmread(path)
    assert "BurnedInAnnotation" not in dataset
    assert all(spacing > 0 for spacing in dataset.get("PixelSpacing", ()))


def test_the_samples_are_a_chest_and_a_limb_film_a_ct_and_an_mr_slice() -> None:
    attributes = {path.stem: dict(decoded(path.read_bytes()).attributes) for path in DICOM_FILES}
    assert attributes == {
        "abdomen_ct": {"Modality": "CT", "BodyPartExamined": "PANCREAS"},
        "chest_radiograph": {"Modality": "CR", "BodyPartExamined": "CHEST", "ViewPosition": "PA", "PatientSex": "F"},
        "leg_radiograph": {
            "Modality": "CR",
            "BodyPartExamined": "EXTREMITY",
            "ViewPosition": "AP",
            "Laterality": "R",
            "PatientSex": "F",
        },
        "shoulder_mr": {"Modality": "MR", "PatientSex": "M"},
    }
