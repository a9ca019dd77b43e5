"""Simulated radiographs: an anatomy as thicknesses along each ray, a finding put into it, and the exposure.

The parts are kept apart until the exposure, so that a finding changes what it would change in a patient: air
replaces the lung's vessels and leaves the ribs.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

SIZE = 288
"""Rows and columns of a film."""

BONE_WEIGHT = 2.0
"""Bone's attenuation against that of soft tissue, at the energies of a chest film."""


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Float32 maps `[SIZE, SIZE]`: centimetres of soft tissue, of bone, and of tissue within the lungs.

    `lungs` is how much of each ray's depth is lung, 0 to 1, the patient's right first; `finding` is where one was
    put, 0 to 1; `spacing` in mm.
    """

    soft: np.ndarray
    bone: np.ndarray
    lung_tissue: np.ndarray
    lungs: tuple[np.ndarray, np.ndarray]
    finding: np.ndarray
    spacing: tuple[float, float]

    @property
    def mask(self) -> np.ndarray:
        """bool, where the finding is."""
        return np.asarray(self.finding > 0.5)


def pose(anatomy: Anatomy, rng: np.random.Generator) -> Anatomy:
    """The same person placed anew: turned, shifted, nearer or farther, and breathing a little differently."""
    angle = np.deg2rad(rng.uniform(-5, 5))
    zoom = rng.uniform(0.9, 1.12, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.diag(1 / zoom)
    centre = np.array([SIZE / 2, SIZE / 2])
    offset = centre - matrix @ centre + rng.uniform(-12, 12, 2)
    rows, columns = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    warp = [gaussian_filter(rng.normal(0, 1, (SIZE, SIZE)), 26) * 26 * rng.uniform(0, 4) for _ in range(2)]
    where = np.tensordot(matrix, np.stack([rows, columns]), axes=1) + offset[:, None, None] + np.stack(warp)

    def move(part: np.ndarray) -> np.ndarray:
        return np.asarray(map_coordinates(part, where, order=1, mode="nearest"), dtype=np.float32)

    spacing = (anatomy.spacing[0] / float(zoom[0]), anatomy.spacing[1] / float(zoom[1]))
    right, left = anatomy.lungs
    return Anatomy(
        soft=move(anatomy.soft),
        bone=move(anatomy.bone),
        lung_tissue=move(anatomy.lung_tissue),
        lungs=(move(right), move(left)),
        finding=move(anatomy.finding),
        spacing=spacing,
    )


def expose(anatomy: Anatomy, rng: np.random.Generator) -> np.ndarray:
    """The film as a detector gives it, uint16 from 0 to 4095, dense tissue bright."""
    attenuation = anatomy.soft + BONE_WEIGHT * anatomy.bone + anatomy.lung_tissue
    scatter = gaussian_filter(attenuation, 14)
    grey = attenuation + rng.uniform(-0.15, 0.2) * scatter
    low, high = np.percentile(grey, (rng.uniform(1, 4), rng.uniform(97.5, 99.7)))
    grey = np.clip((grey - low) / max(high - low, 1e-3), 0, 1) ** rng.uniform(0.75, 1.25)
    grain = rng.normal(0, rng.uniform(0.004, 0.016), grey.shape)
    grey = gaussian_filter(grey, rng.uniform(0.3, 0.7)) + gaussian_filter(grain, 0.5)
    return np.asarray(np.clip(grey, 0, 1) * 4095, dtype=np.uint16)
