"""Puts a haemorrhage into an axial head CT: inside the brain, or outside it as a lens or a crescent.

Its lobe follows from where it lies: the front and the back of the brain, and beside the midline the parietal lobe
in high sections, the temporal lobe in low ones.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from vlm_serve.training.studies.lung_findings import greatest_extent
from vlm_serve.training.studies.placement import smooth_noise

FRONTAL_UNTIL, OCCIPITAL_FROM = 0.36, 0.74
"""Of the brain's length, from the front."""

BESIDE_BONE = (54.0, 64.0)
"""HU of blood that touches the skull: in the brain window it must not look like bone."""


@dataclass(frozen=True, slots=True)
class Bleeding:
    """A section with a haemorrhage: float32 HU, mask (bool), and where it is and how large (mm)."""

    pixels: np.ndarray
    mask: np.ndarray
    side: str
    zone: str
    size_mm: int


@dataclass(frozen=True, slots=True)
class _Brain:
    """The brain's mask, its distance from the edge (mm), and coordinates (mm) along and across its axis.

    `along` grows to the back and `across` to the right of the picture, the patient's left; both are 0 at the centre.
    """

    mask: np.ndarray
    from_edge: np.ndarray
    along: np.ndarray
    across: np.ndarray
    front: float
    length: float
    spacing: float

    def share(self, along: float) -> float:
        """0 at the brain's front, 1 at its back."""
        return (along - self.front) / self.length


def brain_mask(section: np.ndarray, spacing: float) -> np.ndarray:
    """What the skull encloses in an axial section (HU), bool: the orbits and the sinuses are not part of it."""
    bone = ndimage.binary_closing(section > 150, iterations=2)
    inside = ~bone & (section > -40) & (section < 120)
    rounds = max(round(3 / spacing), 1)
    opened = ndimage.binary_opening(inside, iterations=rounds)
    parts, count = ndimage.label(opened)
    if count == 0:
        return np.zeros(section.shape, dtype=bool)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.asarray(ndimage.binary_fill_holes(parts == sizes.argmax()), dtype=bool)


def bleed(
    section: np.ndarray, brain: np.ndarray, spacing: float, *, temporal_level: bool, rng: np.random.Generator
) -> Bleeding:
    """`section` (float32 HU, `spacing` mm a pixel) with one haemorrhage in or at `brain` (bool, same shape)."""
    head = _measure(brain, spacing)
    zone = str(rng.choice(["frontal", "occipital", "temporal" if temporal_level else "parietal"]))
    draw = (_within, _within, _lens, _crescent)[rng.integers(4)]
    on_left = bool(rng.random() < 0.5)
    pixels, mask = draw(section, head, zone, on_left, rng)
    centre = float(head.across[mask].mean())
    share = head.share(float(head.along[mask].mean()))
    between = "temporal" if temporal_level else "parietal"
    lobe = "frontal" if share < FRONTAL_UNTIL else "occipital" if share > OCCIPITAL_FROM else between
    return Bleeding(pixels, mask, "left" if centre > 0 else "right", lobe, greatest_extent(mask, spacing))


def _measure(brain: np.ndarray, spacing: float) -> _Brain:
    rows, columns = np.nonzero(brain)
    points = np.stack([rows, columns]).astype(np.float64)
    centre = points.mean(axis=1)
    values, vectors = np.linalg.eigh(np.cov(points))
    axis = vectors[:, values.argmax()] * np.sign(vectors[0, values.argmax()])
    if abs(axis[0]) < 0.85:  # a nearly round section has no long axis: its rows are one
        axis = np.array([1.0, 0.0])
    y, x = np.mgrid[0 : brain.shape[0], 0 : brain.shape[1]]
    y, x = (y - centre[0]) * spacing, (x - centre[1]) * spacing
    along, across = y * axis[0] + x * axis[1], x * axis[0] - y * axis[1]
    front, back = float(along[brain].min()), float(along[brain].max())
    across = across - (across[brain].min() + across[brain].max()) / 2
    from_edge = np.asarray(ndimage.distance_transform_edt(brain), dtype=np.float32) * spacing
    return _Brain(brain, from_edge, along, across, front, back - front, spacing)


def _zone_shares(zone: str) -> tuple[float, float]:
    """From where to where along the brain a haemorrhage's centre is put: well inside its lobe."""
    return {"frontal": (0.16, 0.27), "occipital": (0.8, 0.88)}.get(zone, (0.47, 0.63))


def _within(
    section: np.ndarray, head: _Brain, zone: str, on_left: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Inside the brain: irregular, with a thin rim of oedema."""
    low, high = _zone_shares(zone)
    share = (head.along - head.front) / head.length
    across = head.across if on_left else -head.across
    radius = rng.uniform(10, 21)
    allowed = head.mask & (share > low) & (share < high) & (across > radius * 0.9) & (head.from_edge > radius * 0.6)
    while not allowed.any():
        radius *= 0.85
        allowed = head.mask & (share > low) & (share < high) & (across > radius) & (head.from_edge > radius * 0.5)
    candidates = np.argwhere(allowed)
    row, column = candidates[rng.integers(len(candidates))]
    y, x = head.along - head.along[row, column], head.across - head.across[row, column]
    lean = rng.uniform(0, np.pi)
    longer = rng.uniform(1.0, 1.35)
    u, v = (np.cos(lean) * y + np.sin(lean) * x) / longer, (np.cos(lean) * x - np.sin(lean) * y) * longer
    field = np.hypot(u, v) / radius + 0.13 * smooth_noise(rng, 16) + 0.05 * smooth_noise(rng, 6)
    own_side = head.mask & (across > 1.5) & (head.from_edge > 1.5)
    blood = _part_at(own_side & (field < 1), row, column)
    rim_mm = rng.uniform(3, 6)
    outside = np.asarray(ndimage.distance_transform_edt(~blood), dtype=np.float32) * head.spacing
    oedema = np.clip(1.4 - outside / rim_mm, 0, 0.9) * head.mask
    pixels = section * (1 - oedema) + rng.uniform(14, 20) * oedema
    return _fill(pixels, blood, rng.uniform(62, 78), rng), blood


def _lens(
    section: np.ndarray, head: _Brain, zone: str, on_left: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Between skull and dura: a lens, its flat side towards the brain."""
    row, column = _at_the_skull(head, zone, on_left, rng)
    inwards = np.array([-head.along[row, column], -head.across[row, column]])
    inwards = inwards / np.hypot(*inwards)
    y, x = head.along - head.along[row, column], head.across - head.across[row, column]
    depth, aside = y * inwards[0] + x * inwards[1], x * inwards[0] - y * inwards[1]
    half, thick = rng.uniform(20, 29), rng.uniform(12, 19)
    # A circle's cap from the inside; the skull closes the other side.
    surface = thick * (1 - (aside / half) ** 2) + 0.8 * smooth_noise(rng, 40)
    own_side = head.mask & ((head.across if on_left else -head.across) > 1.5)
    blood = _part_at(own_side & (depth < surface) & (np.abs(aside) < half), row, column)
    return _fill(section, blood, rng.uniform(*BESIDE_BONE), rng), blood


def _crescent(
    section: np.ndarray, head: _Brain, zone: str, on_left: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Under the dura: a crescent along the inner skull."""
    row, column = _at_the_skull(head, zone, on_left, rng)
    reach = rng.uniform(24, 30)
    distance = np.hypot(head.along - head.along[row, column], head.across - head.across[row, column])
    thick = rng.uniform(9, 13) * np.sqrt(np.clip(1 - (distance / reach) ** 2, 0, 1))
    own_side = head.mask & ((head.across if on_left else -head.across) > 1.5)
    blood = _part_at(own_side & (head.from_edge < thick + 0.5 * smooth_noise(rng, 20)), row, column)
    return _fill(section, blood, rng.uniform(*BESIDE_BONE), rng), blood


def _at_the_skull(head: _Brain, zone: str, on_left: bool, rng: np.random.Generator) -> tuple[int, int]:
    """A point of the brain's edge in a lobe, off the midline."""
    low, high = _zone_shares(zone)
    share = (head.along - head.front) / head.length
    across = head.across if on_left else -head.across
    edge = head.mask & (head.from_edge < 2.5) & (across > 12) & (share > low - 0.06) & (share < high + 0.02)
    candidates = np.argwhere(edge)
    row, column = candidates[rng.integers(len(candidates))]
    return int(row), int(column)


def _part_at(mask: np.ndarray, row: int, column: int) -> np.ndarray:
    """The connected part that a point belongs to, or else the largest."""
    parts, _ = ndimage.label(mask)
    if parts[row, column] == 0:
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        return np.asarray(parts == sizes.argmax(), dtype=bool)
    return np.asarray(parts == parts[row, column], dtype=bool)


def _fill(section: np.ndarray, blood: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    """Fresh blood of about `level` HU."""
    share = ndimage.gaussian_filter(blood.astype(np.float32), 0.8)
    inside = level + 2.5 * smooth_noise(rng, 10)
    return np.asarray(section * (1 - share) + inside * share, dtype=np.float32)
