"""Puts the files of one DICOM series together as a volume in the patient's space, for whoever makes pictures of it."""

import io
from collections.abc import Iterable

import numpy as np
import pydicom
from pydicom.dataset import FileDataset

from vlm_serve.errors import UnsupportedImageError

AIR = -1024
"""HU of what lies outside a CT's field of view, and the least value that a volume of CT holds."""

ASSUMED_DISTANCE = 4.0
"""mm between the slices of a series that does not state their positions."""

Spacing = tuple[float, float, float]
"""mm between slices, rows and columns."""


def read_axial(files: Iterable[bytes]) -> tuple[np.ndarray, Spacing]:
    """An axial series, in the order of the slices' positions and not of their numbers.

    Voxels are int16 `[slices, rows, columns]`: slices from head to feet, rows from front to back, columns from the
    patient's right to the left; HU for CT, stored values otherwise. A slice of CT without the tissue that both its
    neighbours have (the Visible Human lacks one) is their mean.

    Raises:
        UnsupportedImageError: the slices are not axial ones with the patient's right on the left.
    """
    datasets = [pydicom.dcmread(io.BytesIO(data)) for data in files]
    across, down = (
        np.array(datasets[0].ImageOrientationPatient[part], dtype=float) for part in (slice(3), slice(3, 6))
    )
    normal = np.cross(across, down)
    if across[0] < 0.9 or down[1] < 0.9:
        raise UnsupportedImageError("The slices are not axial ones with the patient's right on the left.")

    def height(dataset: FileDataset) -> float:
        return float(normal @ np.array(dataset.ImagePositionPatient, dtype=float))

    datasets.sort(key=height, reverse=True)
    voxels = np.stack([_values(dataset) for dataset in datasets])
    if datasets[0].Modality == "CT":
        _fill_blank_slices(voxels)
    distance = (height(datasets[0]) - height(datasets[-1])) / (len(datasets) - 1)
    return voxels, _spacing(datasets[0], distance)


def read_stack(files: Iterable[bytes]) -> tuple[np.ndarray, Spacing]:
    """A series without positions, int16 `[slices, rows, columns]`, in the order in which the files are given."""
    datasets = [pydicom.dcmread(io.BytesIO(data)) for data in files]
    return np.stack([_values(dataset) for dataset in datasets]), _spacing(datasets[0], ASSUMED_DISTANCE)


def _fill_blank_slices(voxels: np.ndarray) -> None:
    tissue = [int(np.count_nonzero((section > -150) & (section < 300))) for section in voxels]
    for index in range(1, len(voxels) - 1):
        if 2 * tissue[index] < min(tissue[index - 1], tissue[index + 1]):
            voxels[index] = (voxels[index - 1].astype(np.int32) + voxels[index + 1]) // 2


def _spacing(dataset: FileDataset, distance: float) -> Spacing:
    row, column = (float(value) for value in dataset.PixelSpacing)
    return distance, row, column


def _values(dataset: FileDataset) -> np.ndarray:
    """Int16: HU for CT, what lies outside the field of view included; the stored values otherwise."""
    if dataset.Modality != "CT":
        return dataset.pixel_array.astype(np.int16)
    values = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    return np.clip(values, AIR, np.iinfo(np.int16).max).astype(np.int16)
