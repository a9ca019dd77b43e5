"""Draws a head as an axial CT section shows it: scalp, skull, cortex and sulci, white matter, ventricles, falx.

No two seeds are alike; the two levels tell the parietal lobes from the temporal ones.
"""

import numpy as np
from scipy import ndimage

from vlm_serve.clinical.volume import AIR
from vlm_serve.training.studies.placement import Placement, smooth_noise

FLUID, WHITE, GREY, FALX, CALCIUM = 8.0, 28.0, 36.0, 46.0, 160.0
"""HU."""


def head_phantom(rng: np.random.Generator, placement: Placement, *, temporal_level: bool) -> np.ndarray:
    """Float32 HU as `placement` lays it. `temporal_level` shows the ventricles and the Sylvian fissures, the other
    level lies above them."""
    y, x = placement.millimetres
    half_length, half_width = rng.uniform(82, 97), rng.uniform(64, 76)
    # Narrower in front, as heads are.
    width = half_width * (1 + rng.uniform(0.04, 0.12) * np.clip(y / half_length, -1, 1))
    power = rng.uniform(2.0, 2.5)
    ratio = (np.abs(y / half_length) ** power + np.abs(x / width) ** power) ** (1 / power)
    inwards = np.where(ratio > 0.3, (1 - ratio) * np.hypot(y, x) / np.maximum(ratio, 0.3), half_width)  # mm, nearly
    inwards = inwards + 0.6 * smooth_noise(rng, 60)
    scalp, bone = rng.uniform(4, 7), rng.uniform(5.5, 9)
    bone = bone * (1 + 0.25 * np.abs(y) / half_length)
    pixels = np.full(y.shape, float(AIR), dtype=np.float32)
    pixels[inwards > 0] = rng.uniform(-70, 10)
    pixels[(inwards > 0) & (inwards < 1.8)] = 40
    within = (inwards - scalp) / bone
    pixels[within > 0] = 1100 + rng.uniform(-150, 250)
    pixels[(within > 0.35) & (within < 0.65)] = rng.uniform(450, 800)
    depth = inwards - scalp - bone
    brain = _brain(rng, y, x, depth, half_length, temporal_level=temporal_level)
    inside = depth > 0
    pixels[inside] = brain[inside]
    pixels[inside] += (6 * np.exp(-depth / 6))[inside]  # beam hardening beside the skull
    return np.asarray(ndimage.gaussian_filter(pixels, 0.5 / placement.spacing), dtype=np.float32)


def _brain(
    rng: np.random.Generator, y: np.ndarray, x: np.ndarray, depth: np.ndarray, half: float, *, temporal_level: bool
) -> np.ndarray:
    spacing_px = 1 / max(abs(float(y[1, 0] - y[0, 0])), 0.3)
    folds = smooth_noise(rng, 15 * spacing_px) + 0.4 * smooth_noise(rng, 8 * spacing_px)
    reach = rng.uniform(12, 20)
    fluid = (np.abs(folds) < rng.uniform(0.06, 0.14)) & (depth < reach) & (depth > 0)
    fluid |= (depth < rng.uniform(0.6, 1.6)) & (depth > 0)
    bowed = x - rng.uniform(-1.5, 1.5) * np.cos(y / 40)
    ends = half * (0.35 if temporal_level else 2.0)
    fissure = (np.abs(bowed) < rng.uniform(0.8, 1.5)) & (np.abs(y) > half - ends)
    fluid |= fissure
    if temporal_level:
        fluid |= _sylvian(rng, y, bowed, half)
    distance = np.asarray(ndimage.distance_transform_edt(~fluid), dtype=np.float32) / spacing_px
    cortex = np.clip(1.5 - distance / rng.uniform(2.5, 3.8), 0, 1)
    tissue = WHITE + (GREY - WHITE) * cortex + 1.5 * smooth_noise(rng, 30)
    if temporal_level:
        tissue = _deep_grey(rng, tissue, y, bowed)
        fluid |= _ventricles(rng, y, bowed)
    elif rng.random() < 0.6:  # the ventricles' bodies reach up here in some
        fluid |= _bodies(rng, y, bowed)
    soft_fluid = ndimage.gaussian_filter(fluid.astype(np.float32), rng.uniform(0.9, 1.4))
    tissue = ndimage.gaussian_filter(tissue, 1.2)
    tissue = tissue * (1 - soft_fluid) + FLUID * soft_fluid
    falx = (np.abs(bowed) < 0.8) & fissure & (depth > 1)
    tissue[falx] = FALX
    if temporal_level:
        for side in (-1, 1):
            if rng.random() < 0.5:
                tissue[np.hypot(y - 34, bowed - side * rng.uniform(16, 21)) < rng.uniform(1.2, 2.2)] = CALCIUM
    return np.asarray(tissue, dtype=np.float32)


def _ellipse(
    y: np.ndarray, x: np.ndarray, centre: tuple[float, float], radii: tuple[float, float], lean: float
) -> np.ndarray:
    v, u = y - centre[0], x - centre[1]
    along, across = np.cos(lean) * v + np.sin(lean) * u, np.cos(lean) * u - np.sin(lean) * v
    return np.asarray((along / radii[0]) ** 2 + (across / radii[1]) ** 2, dtype=np.float32)


def _ventricles(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Frontal horns, third ventricle, occipital horns."""
    size = rng.uniform(0.8, 1.35)
    fluid = (np.abs(x) < 1.3 * size) & (np.abs(y - 6) < 11)
    for side in (-1, 1):
        own = size * rng.uniform(0.9, 1.1)
        horn = _ellipse(y, x, (-22, side * 8.5), (14 * own, 3.6 * own), side * -0.35)
        nucleus = _ellipse(y, x, (-20, side * 14.5), (11, 5), side * -0.3)
        fluid |= (horn < 1) & (nucleus > 1)
        fluid |= _ellipse(y, x, (36, side * 20), (15 * own, 4.2 * own), side * 0.42) < 1
    return np.asarray(fluid, dtype=bool)


def _bodies(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The upper parts of the lateral ventricles, two slim arcs beside the midline."""
    size = rng.uniform(0.6, 1.1)
    fluid = np.zeros(y.shape, dtype=bool)
    for side in (-1, 1):
        bow = side * (9 + 0.006 * (y - 2) ** 2)
        fluid |= (np.abs(x - bow) < 2.8 * size) & (np.abs(y - 4) < 26 * size)
    return fluid


def _sylvian(rng: np.random.Generator, y: np.ndarray, x: np.ndarray, half: float) -> np.ndarray:
    """The fissure between frontal and temporal lobe on either side, with the insula at its bottom."""
    fluid = np.zeros(y.shape, dtype=bool)
    for side in (-1, 1):
        u = x * side
        width = rng.uniform(0.8, 1.6)
        insula = (np.abs(u - 36 - 0.004 * (y + 8) ** 2) < width) & (np.abs(y + 8) < 20)
        outlet = (np.abs(y + 24 + 0.35 * (u - 38)) < width * 1.2) & (u > 37)
        fluid |= insula | outlet
    return fluid


def _deep_grey(rng: np.random.Generator, tissue: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Caudate, lentiform nucleus and thalamus, with the internal capsule left white between them."""
    for side in (-1, 1):
        for centre, radii, lean in (
            ((-20.0, 14.5), (10.0, 4.5), -0.3),
            ((-4.0, 25.0), (15.0, 6.5), 0.12),
            ((12.0, 10.5), (12.0, 7.5), 0.3),
        ):
            field = _ellipse(y, x, (centre[0] + rng.uniform(-1, 1), side * centre[1]), radii, side * lean)
            share = np.clip((1.15 - field) / 0.3, 0, 1)
            tissue = tissue * (1 - share) + GREY * share
    return tissue
