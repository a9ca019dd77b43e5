"""Puts a slice of a volume into a square picture the way a scanner's operator would: never twice quite alike.

Each picture is a little turned, shifted, scaled, bent and blurred, so that few slices make many pictures.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

SIZE = 320
"""Rows and columns of a picture."""

MAX_TURN = 6.0
"""Degrees."""

COARSE = 7
"""Nodes a side of the grid that bends a picture."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the pixels of a picture lie: millimetres `[2, SIZE, SIZE]` from the subject's centre, float32.

    `spacing` is the picture's, mm a pixel, alike in rows and columns.
    """

    millimetres: np.ndarray
    spacing: float


def place(rng: np.random.Generator, extent: float, *, mirror: bool = False) -> Placement:
    """A placement of a subject that is `extent` mm across at its widest."""
    spacing = extent * rng.uniform(1.06, 1.24) / SIZE
    angle = np.deg2rad(rng.uniform(-MAX_TURN, MAX_TURN))
    stretch = rng.uniform(0.95, 1.05)
    axis = (np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2) * spacing
    rows, columns = axis[:, None], axis[None, :] * np.float32(-1 if mirror else 1)
    turned = np.stack(
        [
            (np.cos(angle) * rows - np.sin(angle) * columns) * stretch,
            (np.sin(angle) * rows + np.cos(angle) * columns) / stretch,
        ]
    )
    shift = rng.uniform(-0.03, 0.03, (2, 1, 1)) * extent
    return Placement((turned + shift + _bend(rng, 0.012 * extent)).astype(np.float32), spacing)


def _bend(rng: np.random.Generator, amount: float) -> np.ndarray:
    """Smooth displacements `[2, SIZE, SIZE]` in mm, of standard deviation about `amount` at the nodes."""
    basis = _spline(COARSE, SIZE)
    return np.asarray(basis @ rng.normal(0, amount, (2, COARSE, COARSE)).astype(np.float32) @ basis.T)


def sample(
    image: np.ndarray, spacing: tuple[float, float], centre: tuple[float, float], placement: Placement, outside: float
) -> np.ndarray:
    """`image` `[rows, columns]` as it lies in the picture, float32 `[SIZE, SIZE]`.

    `centre` is the subject's, in pixels of `image`; `outside` is the value of what the image does not reach.
    """
    blur = [0.4 * max(placement.spacing / step - 1, 0) for step in spacing]
    smooth = ndimage.gaussian_filter(image.astype(np.float32), blur) if max(blur) > 0 else image.astype(np.float32)
    where = _pixels(placement, spacing, centre)
    return np.asarray(ndimage.map_coordinates(smooth, where, order=1, cval=outside), dtype=np.float32)


def sample_labels(
    labels: np.ndarray, spacing: tuple[float, float], centre: tuple[float, float], placement: Placement
) -> np.ndarray:
    """As `sample`, for labels (uint8): nothing is blended, and outside is 0."""
    where = _pixels(placement, spacing, centre)
    return np.asarray(ndimage.map_coordinates(labels, where, order=0, cval=0), dtype=np.uint8)


def _pixels(placement: Placement, spacing: tuple[float, float], centre: tuple[float, float]) -> np.ndarray:
    scale = np.array(spacing, dtype=np.float32)[:, None, None]
    return placement.millimetres / scale + np.array(centre, dtype=np.float32)[:, None, None]


@cache
def _spline(nodes: int, size: int) -> np.ndarray:
    """Cubic B-spline weights `[size, nodes]`, float32: a smooth curve of `size` points over evenly spaced nodes."""
    where = np.linspace(1, nodes - 2, size)[:, None]
    distance = np.abs(where - np.arange(nodes))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)


def smooth_noise(rng: np.random.Generator, scale: float, size: int = SIZE) -> np.ndarray:
    """Float32 noise `[size, size]` of unit variance whose features are about `scale` pixels wide."""
    basis = _spline(round(size / scale) + 4, size)
    field = basis @ rng.standard_normal((basis.shape[1],) * 2, dtype=np.float32) @ basis.T
    return np.asarray((field - field.mean()) / (field.std() + 1e-6), dtype=np.float32)


def extent_of(image: np.ndarray, spacing: tuple[float, float], threshold: float) -> tuple[tuple[float, float], float]:
    """The centre (pixels) and greatest side (mm) of the subject: the largest thing above `threshold`.

    A table or a blanket beside it is thinner than 12 mm and is not counted.
    """
    step = max(min(image.shape) // 128, 1)
    coarse = ndimage.binary_fill_holes(image[::step, ::step] > threshold)
    size = [max(round(12 / (side * step)), 1) for side in spacing]
    opened = ndimage.binary_opening(coarse, np.ones(size, dtype=bool))
    labels, count = ndimage.label(opened if opened.any() else coarse)
    if count == 0:
        return ((image.shape[0] - 1) / 2, (image.shape[1] - 1) / 2), max(
            side * length for side, length in zip(spacing, image.shape, strict=True)
        )
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    # Both legs are the subject, so what is at least a third of the largest thing counts with it.
    kept = np.flatnonzero(sizes >= sizes.max() / 3)
    rows, columns = (np.flatnonzero(np.isin(labels, kept).any(axis=axis)) for axis in (1, 0))
    centre = ((rows[0] + rows[-1]) / 2 * step, (columns[0] + columns[-1]) / 2 * step)
    extent = max((rows[-1] - rows[0] + 1) * step * spacing[0], (columns[-1] - columns[0] + 1) * step * spacing[1])
    return (float(centre[0]), float(centre[1])), float(extent)
