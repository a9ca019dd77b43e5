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
SIMULATED = [path for path in DICOM_FILES if path.stem.startswith("simulated_")]
REAL = [path for path in DICOM_FILES if path not in SIMULATED]
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
    said = {str(dataset.get(name)) for name in names if dataset.get(name)}
    assert said == ({"Simulated finding, for demonstration only"} if path in SIMULATED else set())


@pytest.mark.parametrize("path", SIMULATED, ids=lambda path: path.stem)
def test_a_simulated_sample_says_that_it_is_one(path: Path) -> None:
    dataset = pydicom.dcmread(path)
    assert dataset.ImageType[0] == "DERIVED"
    assert dataset.DeidentificationMethod == "Simulated study, of no patient"
    assert dataset.BurnedInAnnotation == "NO"


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_no_real_sample_claims_what_its_source_does_not(path: Path) -> None:
    dataset = pydicom.dcmread(path)
    assert "BurnedInAnnotation" not in dataset
    assert all(spacing > 0 for spacing in dataset.get("PixelSpacing", ()))


def test_the_real_samples_are_a_chest_and_a_limb_film_a_ct_and_an_mr_slice() -> None:
    attributes = {path.stem: dict(decoded(path.read_bytes()).attributes) for path in REAL}
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


def test_the_simulated_samples_are_a_chest_a_head_and_two_legs() -> None:
    attributes = {path.stem: dict(decoded(path.read_bytes()).attributes) for path in SIMULATED}
    assert attributes == {
        "simulated_chest": {"Modality": "CR", "BodyPartExamined": "CHEST", "ViewPosition": "AP"},
        "simulated_head_ct": {"Modality": "CT", "BodyPartExamined": "HEAD"},
        "simulated_legs": {"Modality": "CR", "BodyPartExamined": "LEG", "ViewPosition": "AP"},
    }
