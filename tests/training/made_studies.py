"""Studies whose reports follow from their pictures alone, and what a tower would give for them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.clinical.dicom_files import grey_file
from vlm_serve.training.dataset import Study

FINDINGS = ("effusion", "fracture", "mass", "normal lungs")
"""Short, and each begins with another token: who does not see can only guess the first."""


def made_studies(count: int) -> list[Study]:
    """Every study asks the same; its report is that of its number among `FINDINGS`."""
    return [Study(str(i), (Path("-"),), FINDINGS[i % len(FINDINGS)], "What does it show?") for i in range(count)]


def made_features(count: int, tokens: int, width: int, views: int = 1) -> np.ndarray:
    """float16 `[views, count, tokens, width]`: a direction for each finding, with noise on it."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((len(FINDINGS), width))
    kinds = directions[np.arange(count) % len(FINDINGS), None]
    return (kinds + 0.3 * rng.standard_normal((views, count, tokens, width))).astype(np.float16)


def write_studies(folder: Path, count: int, **row: Any) -> Path:
    """A JSONL file with its images beside it: DICOM, PNG and JPEG by turns, brighter from finding to finding."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        kind = number % len(FINDINGS)
        pixels = (rng.integers(0, 40, (40, 40)) + 70 * kind).astype(np.uint8)
        name = f"{number:03}" + (".dcm", ".png", ".jpg")[number % 3]
        if name.endswith(".dcm"):
            (folder / name).write_bytes(grey_file(pixels, WindowCenter=128, WindowWidth=256))
        else:
            Image.fromarray(pixels).save(folder / name)
        lines.append({"id": f"study-{number}", "images": [name], "report": FINDINGS[kind], **row})
    path = folder / "studies.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
