"""Studies with their reports: the JSONL file that fine-tuning learns from and that evaluation scores against.

One JSON object a line, paths relative to the file's own folder:

    {"id": "0001", "images": ["0001.dcm"], "prompt": "…", "report": "FINDINGS: …", "patient": "p17"}
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_serve.errors import InvalidRequestError

DEFAULT_PROMPT = "Describe this image. Write Findings and Impression."


@dataclass(frozen=True, slots=True)
class Study:
    """One study. Its texts stay out of `repr`, so that no log or traceback shows them.

    `images` are DICOM, PNG or JPEG files, in the order in which the prompt shows them; `patient` is any pseudonym
    that keeps a patient's studies on one side of a split; `truth` the parameters of a simulated finding, None where
    nobody knows better than the report. `history` are questions and answers before `prompt`, of which the first
    question comes with the images; a file holds none.
    """

    id: str
    images: tuple[Path, ...]
    report: str = field(repr=False)
    prompt: str = field(default=DEFAULT_PROMPT, repr=False)
    truth: Mapping[str, Any] | None = field(default=None, repr=False)
    patient: str | None = field(default=None, repr=False)
    history: tuple[tuple[str, str], ...] = field(default=(), repr=False)


def read_studies(path: Path) -> list[Study]:
    """The studies of a JSONL file, in its order; empty lines are passed over.

    Raises:
        InvalidRequestError: the file cannot be read or holds no study, or a row is not as above; it names the
            row by its line, with the remedy, and repeats nothing of a report.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise InvalidRequestError(f"{path} is not UTF-8. Save it in that encoding.") from None
    folder = path.resolve().parent
    studies = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        study = _read_row(line, folder, place)
        if study.id in first_line:
            raise InvalidRequestError(
                f"{place}: its id stands in line {first_line[study.id]} too. Give every study an id of its own."
            )
        first_line[study.id] = number
        studies.append(study)
    if not studies:
        raise InvalidRequestError(f"{path} holds no study. Write one JSON object a line.")
    return studies


def _read_row(line: str, folder: Path, place: str) -> Study:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise InvalidRequestError(f"{place}: not a JSON object. Write each study on one line, as JSON.")
    names = row.get("images")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise InvalidRequestError(f'{place}: "images" must be a list of at least one file name.')
    truth = row.get("truth")
    if truth is not None and not isinstance(truth, dict):
        raise InvalidRequestError(f'{place}: "truth" must be a JSON object, or left out.')
    return Study(
        id=_text(row, "id", place),
        images=tuple(_image(name, folder, place) for name in names),
        report=_text(row, "report", place),
        prompt=_text(row, "prompt", place) if row.get("prompt") is not None else DEFAULT_PROMPT,
        truth=truth,
        patient=_text(row, "patient", place) if row.get("patient") is not None else None,
    )


def _text(row: Mapping[str, Any], name: str, place: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InvalidRequestError(f'{place}: "{name}" must be a text that is not empty.')
    return value.strip()


def _image(name: str, folder: Path, place: str) -> Path:
    try:
        path = (folder / name).resolve()
        inside, there = path.is_relative_to(folder), path.is_file()
    except (OSError, ValueError):  # a NUL in the name, a name too long, links in a circle
        inside, there = True, False
    if not inside:
        raise InvalidRequestError(
            f"{place}: an image lies outside the file's folder. Put the images beside the file or below it, and "
            "name them by relative paths."
        )
    if not there:
        raise InvalidRequestError(f"{place}: an image is not there. Correct its path or leave the study out.")
    return path
