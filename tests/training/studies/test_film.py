"""Simulated films: a finding is where its truth says, changes what it should, and leaves the rest of the film alone."""

from collections.abc import Callable

import numpy as np
import pytest

from vlm_serve.training.studies.chest_findings import place
from vlm_serve.training.studies.chest_phantom import chest_phantom
from vlm_serve.training.studies.film import SIZE, Anatomy, expose, pose
from vlm_serve.training.studies.leg_phantom import break_leg, leg_phantom
from vlm_serve.training.studies.truth import CHEST_FINDINGS, CHEST_ZONES, EXTENTS

SEEDS = range(6)


def chest(seed: int) -> tuple[Anatomy, np.random.Generator]:
    rng = np.random.default_rng(seed)
    return pose(chest_phantom(rng), rng), rng


def attenuation(anatomy: Anatomy) -> np.ndarray:
    return np.asarray(anatomy.soft + anatomy.bone + anatomy.lung_tissue)


@pytest.mark.parametrize("phantom", [chest_phantom, leg_phantom])
def test_the_same_seed_gives_the_same_film_and_another_seed_another_person(
    phantom: Callable[[np.random.Generator], Anatomy],
) -> None:
    films = []
    for seed in (1, 1, 2):
        rng = np.random.default_rng(seed)
        films.append(expose(pose(phantom(rng), rng), rng))
    assert films[0].dtype == np.uint16
    assert films[0].shape == (SIZE, SIZE)
    assert films[0].max() <= 4095
    assert np.array_equal(films[0], films[1])
    assert np.mean(np.abs(films[0].astype(int) - films[2])) > 100


@pytest.mark.parametrize("finding", CHEST_FINDINGS)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_finding_lies_in_the_lung_of_its_side_and_nowhere_else(finding: str, seed: int) -> None:
    anatomy, rng = chest(seed)
    placed = place(anatomy, finding, rng)
    mask = placed.anatomy.mask
    own, other = anatomy.lungs if placed.side == "right" else anatomy.lungs[::-1]
    assert mask.sum() > 60
    assert np.all(own[mask] > 0.3)
    columns = np.nonzero(mask)[1]
    assert (columns.mean() < SIZE / 2) == (placed.side == "right")  # the patient's right is on the film's left
    untouched = (other > 0.3) & (own < 0.01)
    assert np.abs(attenuation(placed.anatomy) - attenuation(anatomy))[untouched].mean() < 0.05


@pytest.mark.parametrize("finding", CHEST_FINDINGS)
def test_air_is_darker_and_all_else_is_brighter_than_the_lung_before(finding: str) -> None:
    for seed in SEEDS:
        anatomy, rng = chest(seed)
        placed = place(anatomy, finding, rng)
        change = (attenuation(placed.anatomy) - attenuation(anatomy))[placed.anatomy.mask].mean()
        assert change < -0.5 if finding == "pneumothorax" else change > 0.8


def test_a_pneumothorax_takes_the_vessels_and_leaves_the_ribs() -> None:
    anatomy, rng = chest(3)
    placed = place(anatomy, "pneumothorax", rng)
    mask = placed.anatomy.mask
    assert placed.anatomy.lung_tissue[mask].mean() < 0.3 * anatomy.lung_tissue[mask].mean()
    assert np.array_equal(placed.anatomy.bone, anatomy.bone)


@pytest.mark.parametrize("finding", ["nodule", "consolidation"])
def test_the_zone_is_the_third_of_the_lung_that_the_finding_lies_in(finding: str) -> None:
    for seed in range(12):
        anatomy, rng = chest(seed)
        placed = place(anatomy, finding, rng)
        lung = anatomy.lungs[0 if placed.side == "right" else 1] > 0.3
        rows = np.nonzero(lung)[0]
        where = (np.nonzero(placed.anatomy.mask)[0].mean() - rows.min()) / (rows.max() - rows.min())
        zone = CHEST_ZONES.index(str(placed.zone))
        assert zone / 3 - 0.12 < where < (zone + 1) / 3 + 0.12


@pytest.mark.parametrize("finding", ["effusion", "pneumothorax", "consolidation"])
def test_a_larger_extent_covers_more_of_the_lung(finding: str) -> None:
    shares: dict[str, list[float]] = {extent: [] for extent in EXTENTS}
    for seed in range(24):
        anatomy, rng = chest(seed)
        placed = place(anatomy, finding, rng)
        lung = anatomy.lungs[0 if placed.side == "right" else 1] > 0.3
        shares[str(placed.extent)].append(placed.anatomy.mask.sum() / lung.sum())
    small, moderate, large = (np.mean(shares[extent]) for extent in EXTENTS)
    assert small < moderate < large


def test_a_nodule_is_as_large_as_its_truth_says() -> None:
    for seed in SEEDS:
        anatomy, rng = chest(seed)
        placed = place(anatomy, "nodule", rng)
        rows, columns = np.nonzero(placed.anatomy.mask)
        tall = (np.ptp(rows) + 1) * anatomy.spacing[0]
        wide = (np.ptp(columns) + 1) * anatomy.spacing[1]
        assert max(tall, wide) == pytest.approx(placed.size_mm, abs=6)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_fracture_breaks_one_leg_where_its_truth_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    anatomy = leg_phantom(rng)
    placed = break_leg(anatomy, rng)
    mask = placed.anatomy.mask
    half = slice(0, SIZE // 2) if placed.side == "right" else slice(SIZE // 2, SIZE)
    other = slice(SIZE // 2, SIZE) if placed.side == "right" else slice(0, SIZE // 2)
    assert mask[:, half].sum() > 60
    assert not mask[:, other].any()
    assert np.array_equal(placed.anatomy.bone[:, other], anatomy.bone[:, other])
    assert np.abs(placed.anatomy.bone - anatomy.bone)[mask].mean() > 0.1
    level = np.nonzero(mask)[0].mean() / SIZE
    assert {"proximal": level < 0.45, "middle": 0.4 < level < 0.72, "distal": level > 0.65}[str(placed.zone)]


def test_a_pose_moves_the_finding_with_the_anatomy() -> None:
    rng = np.random.default_rng(5)
    placed = break_leg(leg_phantom(rng), rng)
    moved = pose(placed.anatomy, rng)
    rows, columns = np.nonzero(moved.mask)
    assert moved.bone[rows, columns].mean() > 3 * moved.bone.mean()
