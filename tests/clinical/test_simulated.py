"""A simulated image's file: a DICOM object that is whole, of nobody, and decodes to the pixels that went in."""

import io
from dataclasses import replace

import numpy as np
import pydicom
import pytest

from vlm_serve.clinical.decode import decode
from vlm_serve.clinical.simulated import SimulatedImage, write_simulated
from vlm_serve.config import DecodeLimits

RAMP = np.linspace(0, 4095, 40 * 30).reshape(40, 30).astype(np.uint16)
FILM = SimulatedImage(RAMP, (1.4, 1.4), (2048, 4096), "radiograph", "chest", "frontal")
CT = SimulatedImage(RAMP.astype(np.int16) - 1024, (0.8, 0.8), (-600, 1500), "CT", "chest", "axial")
MR = SimulatedImage(RAMP, (1.0, 1.0), (2048, 4096), "MR", "head", "sagittal")


@pytest.mark.parametrize(("image", "modality"), [(FILM, "CR"), (CT, "CT"), (MR, "MR")])
def test_the_file_is_read_back_as_it_was_written(image: SimulatedImage, modality: str) -> None:
    data = pydicom.dcmread(io.BytesIO(write_simulated(image, "a")))
    assert data.Modality == modality
    assert np.array_equal(data.pixel_array, image.pixels)
    assert (data.WindowCenter, data.WindowWidth) == image.window


@pytest.mark.parametrize("image", [FILM, CT, MR])
def test_the_same_name_gives_the_same_bytes_and_another_name_other_uids(image: SimulatedImage) -> None:
    assert write_simulated(image, "a") == write_simulated(image, "a")
    first, second = (pydicom.dcmread(io.BytesIO(write_simulated(image, name))) for name in "ab")
    assert first.SOPInstanceUID != second.SOPInstanceUID
    assert first.StudyInstanceUID != second.StudyInstanceUID


def test_a_film_stored_inverted_looks_the_same() -> None:
    upright, inverted = (
        decode(write_simulated(FILM, "a", inverted=inverted), "application/dicom", DecodeLimits())
        for inverted in (False, True)
    )
    assert inverted.receipt.photometric_interpretation == "MONOCHROME1"
    assert np.abs(upright.pixels.astype(int) - inverted.pixels).max() <= 1


def test_a_ct_is_shown_in_its_window() -> None:
    pixels = decode(write_simulated(CT, "a"), "application/dicom", DecodeLimits()).pixels[..., 0]
    assert np.all(pixels[CT.pixels < -1350] == 0)
    assert np.all(pixels[CT.pixels > 151] == 255)


def test_it_names_nobody_and_says_that_it_is_simulated() -> None:
    data = pydicom.dcmread(io.BytesIO(write_simulated(replace(FILM, region="leg"), "a")))
    assert data.PatientName == data.PatientID == data.PatientBirthDate == ""
    assert data.PatientIdentityRemoved == "YES"
    assert "Simulated" in data.DerivationDescription
    assert data.BodyPartExamined == "LEG"
