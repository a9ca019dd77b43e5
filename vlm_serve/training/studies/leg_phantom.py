"""Frontal films of both lower legs from knee to ankle, and a fracture in one of them."""

from dataclasses import replace

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.special import expit

from vlm_serve.training.studies.chest_findings import Placed
from vlm_serve.training.studies.film import SIZE, Anatomy
from vlm_serve.training.studies.truth import SIDES

FIELD_MM = 430.0
SCALE = FIELD_MM / SIZE  # mm a pixel
BONE_ZONES = ("proximal", "middle", "distal")


def leg_phantom(rng: np.random.Generator) -> Anatomy:
    """Other legs for each state of `rng`; the patient's right one is on the left of the film."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) * np.float32(SCALE)
    x -= FIELD_MM / 2
    knee, ankle = rng.uniform(30, 55), rng.uniform(372, 405)
    apart, build = rng.uniform(82, 104), rng.uniform(0.88, 1.15)
    calf, bow = rng.uniform(44, 58), rng.uniform(-6, 10)
    soft, bone = np.zeros_like(x), np.zeros_like(x)
    down = np.clip((y - knee) / (ankle - knee), -0.3, 1.2)
    for side in (-1, 1):
        axis = side * (apart - bow * np.sin(np.pi * np.clip(down, 0, 1)) + rng.normal(0, 2))
        out = (x - axis) * side  # outwards from the middle of the limb
        half = build * (calf * np.exp(-(((down - 0.25) / 0.42) ** 2)) * 0.62 + 33 - 4 * down)
        soft += 2.1 * half / 10 * np.sqrt(np.clip(1 - (out / half) ** 2, 0, 1))
        tibia = _shaft(out + 5, down, build * rng.uniform(11.5, 14), build * 37, build * 23)
        fibula = _shaft(out - 25 * build + 6 * down, down - 0.05, build * 5.5, build * 8.5, build * 10)
        femur = _ends(out, down, build, above=True)
        foot = _ends(out, down, build, above=False)
        bone += tibia + 0.75 * fibula + femur + foot
    trabeculae = gaussian_filter(rng.normal(0, 1, bone.shape), (2.2, 0.8))
    bone = bone * (1 + 0.06 * trabeculae / trabeculae.std())
    nothing = np.zeros_like(soft)
    return Anatomy(
        soft.astype(np.float32), bone.astype(np.float32), nothing, (nothing, nothing), nothing, (SCALE, SCALE)
    )


def break_leg(anatomy: Anatomy, rng: np.random.Generator) -> Placed:
    """An oblique line across the shafts of one leg, the lower parts a little displaced. Called before `pose`."""
    side, zone = int(rng.integers(2)), int(rng.integers(3))
    rows, columns = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    middle = SIZE / 2 + (-1, 1)[side] * 93 / SCALE
    level = SIZE * (0.12 + 0.8 * (rng.uniform(0.08, 0.24) + zone * 0.32))
    slope = np.tan(np.deg2rad(rng.uniform(12, 42))) * rng.choice((-1, 1))
    beyond = rows - level - slope * (columns - middle)  # pixels below the line
    limb = (columns < SIZE / 2) if side == 0 else (columns >= SIZE / 2)
    shift = rng.uniform(4, 9) / SCALE * rng.choice((-1, 1))
    tilt = rng.uniform(-0.06, 0.06)
    moved = expit(beyond / 0.5) * limb * (shift + tilt * np.maximum(beyond, 0))
    bone = map_coordinates(anatomy.bone, [rows, columns - moved], order=1, mode="nearest")
    gap = np.exp(-((beyond / rng.uniform(1.5, 2.5)) ** 2)) * limb
    mask = (np.abs(beyond) < 7) & limb & (anatomy.bone > 0.4)
    broken = replace(anatomy, bone=(bone * (1 - 0.95 * gap)).astype(np.float32), finding=mask.astype(np.float32))
    return Placed(broken, SIDES[side], BONE_ZONES[zone])


def _shaft(across: np.ndarray, down: np.ndarray, shaft: float, top: float, bottom: float) -> np.ndarray:
    """A long bone from its upper end (`down` 0) to its lower (1), in cm: dense walls around a lighter canal."""
    half = shaft + (top - shaft) * np.exp(-np.maximum(down, 0) / 0.075)
    half = half + (bottom - shaft) * np.exp(-np.maximum(1 - down, 0) / 0.06)
    ends = expit(down / 0.012) * expit((1 - down) / 0.012)
    solid = np.sqrt(np.clip(1 - (across / half) ** 2, 0, 1)) * half / 10
    inner = np.sqrt(np.clip(1 - (across / (half * 0.62)) ** 2, 0, 1)) * half * 0.62 / 10
    return np.asarray((1.3 * solid - 0.85 * inner) * ends)


def _ends(out: np.ndarray, down: np.ndarray, build: float, *, above: bool) -> np.ndarray:
    """The condyles of the femur above the knee's gap, or the talus below the ankle's."""
    reach = (-0.022 - down) if above else (down - 1.02)
    half = build * ((40 - 150 * np.clip(reach, 0, 0.14)) if above else 25 + 30 * np.clip(reach, 0, 0.2))
    return np.asarray(np.sqrt(np.clip(1 - (out / half) ** 2, 0, 1)) * 1.9 * expit(reach / 0.008))
