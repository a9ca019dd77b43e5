"""The four findings of the chest put into a film's anatomy, each where and as large as its parameters say."""

from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter
from scipy.special import expit

from vlm_serve.training.studies.film import Anatomy
from vlm_serve.training.studies.truth import CHEST_ZONES, EXTENTS, SIDES


@dataclass(frozen=True, slots=True)
class Placed:
    """An anatomy with its finding, if it has one, and the parameters that the truth names."""

    anatomy: Anatomy
    side: str | None = None
    zone: str | None = None
    size_mm: int | None = None
    extent: str | None = None


def place(anatomy: Anatomy, finding: str, rng: np.random.Generator) -> Placed:
    """One finding of `CHEST_FINDINGS`, on a side, in a zone and of an extent drawn at random."""
    side = int(rng.integers(2))
    lung = anatomy.lungs[side] > 0.3
    rows, columns = np.nonzero(lung)
    field = _Field(anatomy, side, lung, int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max()))
    maker = {
        "nodule": _nodule,
        "effusion": _effusion,
        "pneumothorax": _pneumothorax,
        "consolidation": _consolidation,
    }[finding]
    return maker(field, rng)


@dataclass(frozen=True, slots=True)
class _Field:
    """One lung and its bounds in pixels, ends included."""

    anatomy: Anatomy
    side: int
    lung: np.ndarray
    top: int
    bottom: int
    first: int
    last: int

    def zone_rows(self, zone: int) -> tuple[float, float]:
        third = (self.bottom - self.top) / 3
        return self.top + zone * third, self.top + (zone + 1) * third

    def outwards(self) -> np.ndarray:
        """0 at the lung's inner border, 1 at its outer one, along the columns."""
        columns = np.arange(self.lung.shape[1], dtype=np.float32)
        share = (columns - self.first) / max(self.last - self.first, 1)
        return 1 - share if self.side == 0 else share

    def zone_of(self, finding: np.ndarray) -> str:
        """The third of the lung's height that the middle of the finding lies in."""
        middle = np.nonzero(finding & self.lung)[0].mean()
        return CHEST_ZONES[min(2, int(3 * (middle - self.top) / (self.bottom - self.top)))]

    def changed(self, lung_tissue: np.ndarray, finding: np.ndarray) -> Anatomy:
        """The anatomy with other tissue in its lungs, and the finding where it lies within this one."""
        mask = (finding & self.lung).astype(np.float32)
        return replace(self.anatomy, lung_tissue=lung_tissue.astype(np.float32), finding=mask)


def _nodule(field: _Field, rng: np.random.Generator) -> Placed:
    zone = int(rng.integers(3))
    low, high = field.zone_rows(zone)
    inside = binary_erosion(field.lung, iterations=7)
    inside[: int(np.ceil(low + 3))] = False
    inside[int(high - 3) :] = False
    if not inside.any():
        inside = field.lung
    where = np.argwhere(inside)
    row, column = where[rng.integers(len(where))]
    diameter = rng.uniform(18, 36)  # mm
    dy, dx = _offsets(field, row, column)
    wobble = 1 + 0.08 * np.sin(3 * np.arctan2(dy, dx) + rng.uniform(0, 6)) * rng.uniform(0, 1)
    distance = np.hypot(dy, dx * rng.uniform(0.9, 1.1)) * wobble / (diameter / 2)
    chord = np.sqrt(np.clip(1 - distance**2, 0, 1)) * diameter / 10  # cm of tissue along the ray
    tissue = field.anatomy.lung_tissue + gaussian_filter(chord, 0.8) * rng.uniform(1.6, 2.2)
    nodule = distance < 1
    return Placed(field.changed(tissue, nodule), SIDES[field.side], field.zone_of(nodule), size_mm=round(diameter))


def _effusion(field: _Field, rng: np.random.Generator) -> Placed:
    """Fluid at the base with a meniscus that rises along the chest wall."""
    grade = int(rng.integers(3))
    share = rng.uniform(*((0.14, 0.22), (0.3, 0.42), (0.52, 0.72))[grade])
    height = field.bottom - field.top
    level = field.bottom - share * height
    rise = rng.uniform(0.1, 0.18) * height * field.outwards() ** 3
    rows = np.arange(field.lung.shape[0], dtype=np.float32)[:, None]
    fluid = expit((rows - (level - rise + 0.04 * height)[None]) / 2.0)
    depth = field.anatomy.lungs[field.side]
    tissue = field.anatomy.lung_tissue + fluid * depth * rng.uniform(8, 11)
    return Placed(field.changed(tissue, fluid > 0.5), SIDES[field.side], "lower", extent=EXTENTS[grade])


def _pneumothorax(field: _Field, rng: np.random.Generator) -> Placed:
    """Air between the chest wall and a thin pleural line, without vessels; widest at the apex."""
    grade = int(rng.integers(3))
    share = rng.uniform(*((0.16, 0.24), (0.3, 0.42), (0.5, 0.65))[grade])
    rows = np.arange(field.lung.shape[0], dtype=np.float32)[:, None]
    down = np.clip((rows - field.top) / max(field.bottom - field.top, 1), 0, 1)
    edge = distance_transform_edt(_to_the_midline(field)) / max(field.last - field.first, 1)
    width = share * (1.1 - 0.6 * down)
    gap = expit((width - edge) / 0.012)
    gap = gap * (field.anatomy.lungs[field.side] > 0.12)
    tissue = field.anatomy.lung_tissue * (1 - gap)
    collapsed = (1 - gap) * field.anatomy.lungs[field.side] * (0.5 + 3.0 * share)
    line = np.exp(-(((edge - width - 0.02) / 0.016) ** 2)) * field.lung * rng.uniform(1.1, 1.7)
    air = field.anatomy.soft - gap * field.anatomy.lungs[field.side] * rng.uniform(1.0, 2.0)
    anatomy = replace(field.changed(tissue + collapsed + line, gap > 0.5), soft=np.maximum(air, 0).astype(np.float32))
    return Placed(anatomy, SIDES[field.side], "upper", extent=EXTENTS[grade])


def _to_the_midline(field: _Field) -> np.ndarray:
    """The lung with all that lies inwards of it and below: its border is the chest wall and the apex alone."""
    filled = np.maximum.accumulate(field.lung, axis=0)
    if field.side == 0:
        return np.maximum.accumulate(filled, axis=1)
    return np.maximum.accumulate(filled[:, ::-1], axis=1)[:, ::-1]


def _consolidation(field: _Field, rng: np.random.Generator) -> Placed:
    """A patch with soft, uneven edges in one zone."""
    zone, grade = int(rng.integers(3)), int(rng.integers(3))
    low, high = field.zone_rows(zone)
    radius = (0.17, 0.23, 0.3)[grade] * (field.bottom - field.top) * rng.uniform(0.92, 1.08)
    inside = field.lung.copy()
    inside[: int(low)] = False
    inside[int(np.ceil(high)) :] = False
    if not inside.any():
        inside = field.lung
    where = np.argwhere(inside)
    row, column = where.mean(axis=0) + rng.normal(0, 0.12 * radius, 2)
    rows, columns = np.mgrid[0 : inside.shape[0], 0 : inside.shape[1]].astype(np.float32)
    cloud = gaussian_filter(rng.normal(0, 1, inside.shape), 5)
    cloud /= cloud.std()
    distance = np.hypot((rows - row) / rng.uniform(0.8, 1.1), columns - column) / radius + 0.16 * cloud
    patch = expit((0.95 - distance) / 0.09)
    mottled = gaussian_filter(rng.normal(0, 1, inside.shape), 3)
    mottled = 1 + 0.12 * mottled / mottled.std()
    tissue = field.anatomy.lung_tissue + patch * mottled * field.anatomy.lungs[field.side] * rng.uniform(4.4, 6.4)
    return Placed(
        field.changed(tissue, patch > 0.5), SIDES[field.side], field.zone_of(patch > 0.5), extent=EXTENTS[grade]
    )


def _offsets(field: _Field, row: float, column: float) -> tuple[np.ndarray, np.ndarray]:
    """Millimetres from a place."""
    rows, columns = np.mgrid[0 : field.lung.shape[0], 0 : field.lung.shape[1]].astype(np.float32)
    return (rows - row) * field.anatomy.spacing[0], (columns - column) * field.anatomy.spacing[1]
