"""Puts a nodule, an effusion, a pneumothorax or a consolidation into one lung of an axial chest CT.

Each is drawn in Hounsfield units as it lies in a supine patient: fluid sinks to the back, free air rises to the front.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from vlm_serve.training.studies.placement import smooth_noise

SMALL_BELOW, LARGE_FROM = 0.2, 0.33
"""Shares of a lung's area in the section: `small`, `moderate`, `large`."""

LEAST_AREA = 1600.0
"""mm². A lung's section that is smaller shows no finding well."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A section with its finding: float32 HU, the mask (bool), and the parameters that the finding has."""

    pixels: np.ndarray
    mask: np.ndarray
    size_mm: int | None = None
    extent: str | None = None


def add_finding(
    section: np.ndarray, lung: np.ndarray, spacing: float, finding: str, *, on_left: bool, rng: np.random.Generator
) -> Drawn:
    """`section` (float32 HU `[rows, columns]`, `spacing` mm a pixel) with `finding` in `lung` (bool, same shape).

    `on_left` tells the patient's left lung, whose heart side is on the left of the picture.
    """
    return _DRAW[finding](_Lung(section, lung, spacing, on_left), rng)


def extent_name(share: float) -> str:
    """The word for a share of the lung's area, 0 to 1."""
    return "small" if share < SMALL_BELOW else "large" if share >= LARGE_FROM else "moderate"


def _share(rng: np.random.Generator) -> float:
    """A share of the lung's area: each of the three words as often, and not at their borders."""
    return float(rng.uniform(*((0.13, 0.18), (0.22, 0.31), (0.36, 0.47))[rng.integers(3)]))


class _Lung:
    """One lung of a section and the coordinates that findings are drawn in.

    `depth` is 0 at the lung's front and 1 at its back, `outwards` 0 at its inner and 1 at its outer edge.
    """

    def __init__(self, section: np.ndarray, mask: np.ndarray, spacing: float, on_left: bool) -> None:
        self.section = section
        self.mask = mask
        self.spacing = spacing
        self.area = int(mask.sum())
        rows, columns = np.nonzero(mask)
        self.top, self.bottom = int(rows.min()), int(rows.max())
        self.first, self.last = int(columns.min()), int(columns.max())
        self.rows, self.columns = np.mgrid[0 : mask.shape[0], 0 : mask.shape[1]].astype(np.float32)
        self.depth = (self.rows - self.top) / max(self.bottom - self.top, 1)
        across = (self.columns - self.first) / max(self.last - self.first, 1)
        self.outwards = across if on_left else 1 - across
        self.from_edge = np.asarray(ndimage.distance_transform_edt(mask), dtype=np.float32) * spacing

    def top_share(self, field: np.ndarray, share: float) -> np.ndarray:
        """The pixels of the lung where `field` is greatest, `share` of its area."""
        level = np.quantile(field[self.mask], 1 - share)
        return np.asarray(self.mask & (field >= level), dtype=bool)

    def column_of(self, outwards: float) -> float:
        inner, outer = (
            (self.first, self.last) if self.outwards[0, -1] > self.outwards[0, 0] else (self.last, self.first)
        )
        return inner + outwards * (outer - inner)


def _soft(mask: np.ndarray, sigma: float) -> np.ndarray:
    return np.asarray(ndimage.gaussian_filter(mask.astype(np.float32), sigma), dtype=np.float32)


def _blend(under: np.ndarray, over: np.ndarray | float, share: np.ndarray) -> np.ndarray:
    return np.asarray(under * (1 - share) + over * share, dtype=np.float32)


def _nodule(lung: _Lung, rng: np.random.Generator) -> Drawn:
    """A solid nodule of 12 to 35 mm with a slightly lobed edge."""
    widest = min(17.5, 0.9 * float(lung.from_edge.max()))
    radius = rng.uniform(min(6.5, widest), widest)
    inside = lung.mask & (lung.from_edge >= 0.9 * radius)
    apart = inside & (lung.outwards > 0.35)  # beside the root a nodule is taken for a vessel
    candidates = np.flatnonzero(apart if apart.any() else inside)
    row, column = np.unravel_index(candidates[rng.integers(len(candidates))], lung.mask.shape)
    y, x = (lung.rows - row) * lung.spacing, (lung.columns - column) * lung.spacing
    angle = np.arctan2(y, x)
    edge = np.ones_like(angle)
    for waves, most in ((2, 0.1), (3, 0.06), (4, 0.04), (7, 0.025)):
        edge = edge + rng.uniform(0, most) * np.cos(waves * angle + rng.uniform(0, 2 * np.pi))
    shape = (np.hypot(y, x) < radius * edge) & lung.mask
    solid = rng.uniform(10, 60) + 8 * smooth_noise(rng, 8)
    return Drawn(_blend(lung.section, solid, _soft(shape, 0.8)), shape, size_mm=greatest_extent(shape, lung.spacing))


def _effusion(lung: _Lung, rng: np.random.Generator) -> Drawn:
    """Fluid along the back of the lung, its surface a meniscus, over a rim of lung that it presses together."""
    share = _share(rng)
    climb = np.clip(1 - lung.from_edge / rng.uniform(18, 30), 0, 1) * rng.uniform(0.16, 0.3)
    field = lung.depth + climb * np.clip(lung.depth * 2 - 0.5, 0, 1) + 0.01 * smooth_noise(rng, 40)
    fluid = ndimage.binary_opening(lung.top_share(field, share), iterations=2)
    fluid = _largest_part(fluid)
    rim = ndimage.binary_dilation(fluid, iterations=max(round(rng.uniform(2, 5) / lung.spacing), 1)) & lung.mask
    pixels = _blend(lung.section, rng.uniform(-250, -60), 0.85 * _soft(rim, 1.5) * lung.mask)
    pixels = _blend(pixels, rng.uniform(0, 20) + 4 * smooth_noise(rng, 12), _soft(fluid, 0.7))
    return Drawn(pixels, fluid, extent=extent_name(fluid.sum() / lung.area))


def _pneumothorax(lung: _Lung, rng: np.random.Generator) -> Drawn:
    """Free air in front of and beside a lung that has shrunk towards its root and the back, its pleura a fine line."""
    share = _share(rng)
    anchor_row = lung.top + rng.uniform(0.8, 0.95) * (lung.bottom - lung.top)
    anchor_column = lung.column_of(rng.uniform(0.1, 0.3))
    forwards = (1 - share) ** rng.uniform(0.5, 0.7)
    sideways = (1 - share) / forwards
    sources = np.stack(
        [anchor_row + (lung.rows - anchor_row) / forwards, anchor_column + (lung.columns - anchor_column) / sideways]
    )
    collapsed = ndimage.map_coordinates(lung.mask.astype(np.uint8), sources, order=0).astype(bool) & lung.mask
    collapsed = _largest_part(ndimage.binary_opening(collapsed, iterations=2))
    air = _largest_part(lung.mask & ~collapsed)
    collapsed = lung.mask & ~air
    content = ndimage.map_coordinates(lung.section, sources, order=1, mode="nearest")
    denser = (content + 1000) / (1 - air.sum() / lung.area) ** 0.8 - 1000 + rng.uniform(20, 80)
    pixels = _blend(lung.section, np.minimum(denser, 60), _soft(collapsed, 0.5) * lung.mask)
    pixels = _blend(pixels, -1000.0, np.where(air, 1.0, 0.0))
    width = rng.uniform(0.6, 1.0)
    pleura = ndimage.binary_dilation(collapsed) & air
    line = np.clip(2.2 * _soft(pleura, width), 0, 1) * lung.mask
    pixels = _blend(pixels, rng.uniform(-350, -100), line)
    return Drawn(pixels, air, extent=extent_name(air.sum() / lung.area))


def _consolidation(lung: _Lung, rng: np.random.Generator) -> Drawn:
    """Patchy airspace filling with a fuzzy edge, and bronchi that still hold air in it."""
    share = _share(rng)
    row = lung.top + rng.uniform(0.25, 0.65) * (lung.bottom - lung.top)
    column = lung.column_of(rng.uniform(0.35, 0.75))
    reach = np.sqrt(lung.area * share / np.pi)
    distance = np.hypot(lung.rows - row, lung.columns - column) / reach
    field = -distance + 0.34 * smooth_noise(rng, 28) + 0.16 * smooth_noise(rng, 9)
    filled = _largest_part(ndimage.binary_opening(lung.top_share(field, share), iterations=1))
    solid = np.clip(_soft(filled, 3 / lung.spacing) * 1.35, 0, 1) * lung.mask
    solid = solid * np.clip(0.92 + 0.09 * smooth_noise(rng, 9), 0.6, 1)
    halo = np.clip(_soft(filled, 9 / lung.spacing) * 0.5, 0, 0.35) * lung.mask
    pixels = _blend(lung.section, -350.0, halo)
    pixels = _blend(pixels, rng.uniform(0, 45), solid)
    pixels = _blend(pixels, -800.0, _bronchi(lung, filled, rng))
    return Drawn(pixels, filled, extent=extent_name(filled.sum() / lung.area))


def _bronchi(lung: _Lung, filled: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Branching air from the lung's root through what is filled: how much of each pixel is air, 0 to 1."""
    root = np.array([lung.top + 0.55 * (lung.bottom - lung.top), lung.column_of(0.05)])
    inside = np.argwhere(ndimage.binary_erosion(filled, iterations=max(round(5 / lung.spacing), 1)))
    air = np.zeros_like(lung.section)
    if len(inside) == 0:
        return air
    steps = np.linspace(0.15, 1, 160)[:, None]
    for _ in range(rng.integers(3, 6)):
        end = inside[rng.integers(len(inside))]
        bow = rng.normal(0, 0.1, 2) * np.abs(end - root).max()
        path = root + (end - root) * steps + bow * np.sin(np.pi * steps)
        rows, columns = np.clip(np.rint(path).astype(int), 0, np.array(filled.shape) - 1).T
        air[rows, columns] = 1
    width = rng.uniform(0.9, 1.3) / lung.spacing
    within = ndimage.binary_erosion(filled, iterations=2)
    return np.asarray(np.clip(_soft(air > 0, width) * 2.4 * width, 0, 0.95) * within, dtype=np.float32)


def _largest_part(mask: np.ndarray) -> np.ndarray:
    parts, count = ndimage.label(mask)
    if count < 2:
        return np.asarray(mask, dtype=bool)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.asarray(parts == sizes.argmax(), dtype=bool)


def greatest_extent(mask: np.ndarray, spacing: float) -> int:
    """The greatest distance across `mask` in any direction, mm, rounded."""
    points = np.argwhere(mask & ~ndimage.binary_erosion(mask)).astype(np.float32)
    angles = np.linspace(0, np.pi, 36, endpoint=False)
    reach = points @ np.stack([np.sin(angles), np.cos(angles)])
    return round(float(np.max(reach.max(axis=0) - reach.min(axis=0)) + 1) * spacing)


_DRAW: dict[str, Callable[[_Lung, np.random.Generator], Drawn]] = {
    "nodule": _nodule,
    "effusion": _effusion,
    "pneumothorax": _pneumothorax,
    "consolidation": _consolidation,
}
