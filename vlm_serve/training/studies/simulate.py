"""Whole sets of simulated studies: DICOM files, reports and parameters, split by source image.

    FOLDER/train.jsonl            a study a row: id, images, prompt, report, truth (see `training.dataset`)
    FOLDER/train/00000.dcm …      the pictures
    FOLDER/train/masks.npy        uint8 [N, 32, 32]: where the finding is, as the model's square picture lies

and the same for `validation` and `test`.
"""

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from vlm_serve.clinical.simulated import SimulatedImage, write_simulated
from vlm_serve.families.timm_vlm import letterbox
from vlm_serve.training.progress import Progress
from vlm_serve.training.studies.chest_findings import Placed, place
from vlm_serve.training.studies.chest_phantom import chest_phantom
from vlm_serve.training.studies.film import Anatomy, expose, pose
from vlm_serve.training.studies.leg_phantom import break_leg, leg_phantom
from vlm_serve.training.studies.projection import projected_chest
from vlm_serve.training.studies.reports import PROMPTS, write_report
from vlm_serve.training.studies.sections import chest_ct, head_ct, other_section
from vlm_serve.training.studies.truth import CHEST_FINDINGS, MASK_SIZE, SPLITS, Picture, Truth

VERSION = "1"
"""Raised when the studies of a seed change, so that those of an older version are made anew."""

Maker = Callable[[np.random.Generator, str], Picture]


@dataclass(frozen=True, slots=True)
class Counts:
    """Studies in each split."""

    train: int = 3600
    validation: int = 240
    test: int = 240


def chest_film(rng: np.random.Generator, split: str, finding: str) -> Picture:
    """A frontal chest film, of a phantom or projected from the split's CT, in equal parts."""
    if rng.random() >= 0.5:
        return phantom_chest_film(rng, split, finding)
    anatomy, source = projected_chest(rng, split)
    return _chest_film(anatomy, source, finding, rng)


def phantom_chest_film(rng: np.random.Generator, split: str, finding: str) -> Picture:
    """A frontal chest film of a phantom, which is another for each state of `rng`, whatever the split."""
    anatomy, source = _phantom(chest_phantom, "chest", rng)
    return _chest_film(anatomy, source, finding, rng)


def _chest_film(anatomy: Anatomy, source: str, finding: str, rng: np.random.Generator) -> Picture:
    anatomy = pose(anatomy, rng)
    placed = place(anatomy, finding, rng) if finding != "none" else Placed(anatomy)
    return _film("chest", finding, placed, source, rng)


def leg_film(rng: np.random.Generator, split: str, finding: str) -> Picture:
    """A frontal film of both lower legs, one of them broken or none."""
    anatomy, source = _phantom(leg_phantom, "legs", rng)
    placed = break_leg(anatomy, rng) if finding != "none" else Placed(anatomy)
    placed = replace(placed, anatomy=pose(placed.anatomy, rng))
    return _film("leg", finding, placed, source, rng)


def _phantom(
    maker: Callable[[np.random.Generator], Anatomy], name: str, rng: np.random.Generator
) -> tuple[Anatomy, str]:
    """A phantom of a seed that `rng` draws, and its name as a source."""
    seed = int(rng.integers(2**32))
    return maker(np.random.default_rng(seed)), f"phantom-{name}/{seed}"


def _film(region: str, finding: str, placed: Placed, source: str, rng: np.random.Generator) -> Picture:
    truth = Truth(
        "radiograph", region, "frontal", finding, placed.side, placed.zone, placed.size_mm, placed.extent, source
    )
    return Picture(expose(placed.anatomy, rng), placed.anatomy.mask, placed.anatomy.spacing, None, truth)


_CHEST = ("none", *CHEST_FINDINGS)

KINDS: tuple[tuple[float, Maker], ...] = (
    *((0.4 / len(_CHEST), partial(chest_film, finding=finding)) for finding in _CHEST),
    *((0.24 / len(_CHEST), partial(chest_ct, finding=finding)) for finding in _CHEST),
    *((0.06, partial(leg_film, finding=finding)) for finding in ("none", "fracture")),
    (0.08, partial(head_ct, finding="haemorrhage")),
    (0.05, partial(head_ct, finding="none")),
    (0.11, other_section),
)
"""What a set is made of: each kind's share, and its maker."""


GOLDEN = (5**0.5 - 1) / 2
"""Its multiples, modulo 1, lie evenly however many there are."""


def simulate(folder: Path, counts: Counts, seed: int, processes: int, progress: Progress) -> None:
    """Writes the splits of which `counts` wants any; those that are there already, of the same settings, stay.

    Raises:
        ConfigurationError, CheckpointError: the real volumes cannot be had; see `sources.read_volume`.
    """
    for split in SPLITS:
        count = getattr(counts, split)
        if count:
            _simulate_split(folder, split, count, seed, processes, progress)


def _simulate_split(folder: Path, split: str, count: int, seed: int, processes: int, progress: Progress) -> None:
    made_by = folder / split / "made_by.json"
    settings = {"version": VERSION, "count": count, "seed": seed}
    if made_by.is_file() and json.loads(made_by.read_text(encoding="utf-8")) == settings:
        return
    made_by.unlink(missing_ok=True)
    (folder / split).mkdir(parents=True, exist_ok=True)
    make = partial(_make, folder, split, seed)
    rows, masks = [], np.zeros((count, MASK_SIZE, MASK_SIZE), dtype=np.uint8)
    # A fresh interpreter each: forking a process that has torch's threads may hang.
    with (
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
        progress.task(f"making {split} studies", count) as task,
    ):
        for number, (row, mask) in enumerate(pool.map(make, range(count), chunksize=8)):
            rows.append(json.dumps(row))
            masks[number] = mask
            task.advance()
    np.save(folder / split / "masks.npy", masks)
    (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    made_by.write_text(json.dumps(settings), encoding="utf-8")


def _make(folder: Path, split: str, seed: int, number: int) -> tuple[dict[str, Any], np.ndarray]:
    """One study: its row and its mask. Any run of numbers has the kinds in about their shares' proportion."""
    rng = np.random.default_rng([seed, SPLITS.index(split), number])
    bounds = np.cumsum([share for share, _ in KINDS])
    picture = KINDS[int(np.searchsorted(bounds, number * GOLDEN % 1 * bounds[-1], side="right"))][1](rng, split)
    name = f"{split}/{number:05}"
    inverted = picture.truth.modality == "radiograph" and number % 5 == 0
    (folder / f"{name}.dcm").write_bytes(write_simulated(as_image(picture), f"{seed}/{name}", inverted=inverted))
    row = {
        "id": name,
        "images": [f"{name}.dcm"],
        "prompt": str(rng.choice(PROMPTS)),
        "report": write_report(picture.truth, rng),
        "truth": asdict(picture.truth),
    }
    return row, _mask_on_the_square(picture.mask)


def as_image(picture: Picture) -> SimulatedImage:
    """What of a picture goes into its file: all but the finding."""
    truth = picture.truth
    window = picture.window or (2048, 4096)
    return SimulatedImage(picture.pixels, picture.spacing, window, truth.modality, truth.region, truth.plane)


def _mask_on_the_square(mask: np.ndarray) -> np.ndarray:
    """uint8 `[MASK_SIZE, MASK_SIZE]`: how much of each cell the mask covers once the picture is in its square."""
    square = letterbox(np.repeat(mask[:, :, None].astype(np.uint8) * 255, 3, axis=2), MASK_SIZE * 8)[:, :, 0]
    cells = square.reshape(MASK_SIZE, 8, MASK_SIZE, 8).mean(axis=(1, 3))
    return np.asarray(cells, dtype=np.uint8)
