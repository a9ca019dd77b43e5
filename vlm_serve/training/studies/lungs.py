"""Finds the lungs in an axial chest CT, right and left, without the airways: simulated findings go into them."""

import numpy as np
from scipy import ndimage

from vlm_serve.training.studies.sources import Volume

RIGHT, LEFT = 1, 2
"""Labels of the patient's lungs; 0 is the rest."""

AERATED = -400
"""HU. Below it is air or lung."""


def lung_masks(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """The right and the left lung of an axial chest CT, bool `[slices, rows, columns]`.

    Of each side the largest thing is kept, so that gas in the bowel below is none of it.
    """
    labels = np.stack([lung_labels(section, volume.spacing[1:]) for section in volume.voxels])
    return _largest(labels == RIGHT), _largest(labels == LEFT)


def _largest(mask: np.ndarray) -> np.ndarray:
    parts, count = ndimage.label(mask)
    if count < 2:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.asarray(parts == sizes.argmax(), dtype=bool)


def lung_labels(section: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """The lungs of an axial section in HU `[rows, columns]`, the patient's right on the left: uint8 labels.

    Vessels count as lung. The trachea and gas outside the chest do not; a slice without lungs gives zeros.
    """
    body = _body(section, spacing)
    labels = np.zeros(section.shape, dtype=np.uint8)
    if not body.any():
        return labels
    columns = np.flatnonzero(body.any(axis=0))
    middle = (columns[0] + columns[-1]) / 2
    area = spacing[0] * spacing[1]
    air = ndimage.binary_opening(body & (section < AERATED), np.ones((3, 3), dtype=bool))
    parts, _ = ndimage.label(air)
    for index, window in enumerate(ndimage.find_objects(parts), start=1):
        part = parts[window] == index
        size = part.sum() * area
        offset = (np.nonzero(part)[1].mean() + window[1].start - middle) * spacing[1]
        airway = abs(offset) < 30 and size < 1200
        if size < 150 or airway:
            continue
        for side, columns_of_part in _by_side(part, window[1].start, middle, spacing[1]):
            view = labels[window]
            view[columns_of_part & part] = side
    return _filled(labels, spacing)


def _body(section: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """The largest solid thing and all that it encloses, without the table."""
    rounds = max(round(4 / min(spacing)), 1)
    solid = ndimage.binary_erosion(ndimage.binary_fill_holes(section > -300), iterations=rounds)
    parts, count = ndimage.label(solid)
    if count == 0:
        return np.zeros(section.shape, dtype=bool)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.asarray(ndimage.binary_dilation(parts == sizes.argmax(), iterations=rounds), dtype=bool)


def _by_side(part: np.ndarray, start: int, middle: float, spacing: float) -> list[tuple[int, np.ndarray]]:
    """The side or sides that a region of air belongs to; lungs that touch are parted where they touch least."""
    columns = np.arange(part.shape[1]) + start
    of_right = part[:, columns < middle].sum() / part.sum()
    everywhere = np.ones(part.shape, dtype=bool)
    if of_right > 0.8:
        return [(RIGHT, everywhere)]
    if of_right < 0.2:
        return [(LEFT, everywhere)]
    near = np.flatnonzero(np.abs(columns - middle) * spacing < 35)
    if near.size == 0:
        return [(RIGHT if of_right > 0.5 else LEFT, everywhere)]
    cut = near[np.argmin(part[:, near].sum(axis=0) + 0.01 * np.abs(columns[near] - middle))]
    before = np.broadcast_to(np.arange(part.shape[1]) < cut, part.shape)
    return [(RIGHT, before), (LEFT, ~before)]


def _filled(labels: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """Vessels and small gaps of each lung closed; a side of less than 400 mm² is none."""
    filled = np.zeros_like(labels)
    rounds = max(round(4 / min(spacing)), 1)
    for side in (RIGHT, LEFT):
        lung = labels == side
        if lung.sum() * spacing[0] * spacing[1] < 400:
            continue
        closed = ndimage.binary_closing(np.pad(lung, rounds), iterations=rounds)[rounds:-rounds, rounds:-rounds]
        filled[ndimage.binary_fill_holes(closed) & (filled == 0)] = side
    return filled
