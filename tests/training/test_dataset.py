"""A file of studies is read as it is meant, or refused with the line and the remedy."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.made_studies import write_studies
from vlm_serve.errors import InvalidRequestError
from vlm_serve.training.dataset import DEFAULT_PROMPT, read_studies

ROW: dict[str, Any] = {"id": "a", "images": ["000.dcm"], "report": "Clear lungs."}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_studies(tmp_path / "data", 2)
    (tmp_path / "outside.png").write_bytes(b"-")
    return tmp_path / "data"


def write(folder: Path, *rows: object) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_a_study_is_its_row(folder: Path) -> None:
    full = ROW | {"id": "b", "images": ["001.png", "000.dcm"], "prompt": "Compare.", "truth": {"side": "left"}}
    first, second = read_studies(write(folder, ROW, "", full))
    assert (first.id, first.report, first.prompt, first.truth) == ("a", "Clear lungs.", DEFAULT_PROMPT, None)
    assert first.images == (folder / "000.dcm",)
    assert second.images == (folder / "001.png", folder / "000.dcm")
    assert (second.prompt, second.truth) == ("Compare.", {"side": "left"})


def test_studies_keep_the_order_of_the_file(folder: Path) -> None:
    rows = [ROW | {"id": name} for name in "cab"]
    assert [study.id for study in read_studies(write(folder, *rows))] == ["c", "a", "b"]


def test_texts_of_a_study_are_not_in_its_repr(folder: Path) -> None:
    (study,) = read_studies(write(folder, ROW | {"prompt": "Secret?", "truth": {"finding": "nodule"}}))
    assert not any(word in repr(study) for word in ("Clear", "Secret", "nodule"))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "line 2: not a JSON object"),
        ("[1]", "line 2: not a JSON object"),
        (ROW | {"id": "b", "images": []}, '"images" must be a list of at least one'),
        (ROW | {"id": "b", "images": "000.dcm"}, '"images" must be a list'),
        (ROW | {"id": "b", "images": ["gone.dcm"]}, "an image is not there. Correct its path"),
        (ROW | {"id": "b", "images": ["a\0b"]}, "an image is not there"),
        (ROW | {"id": "b", "images": ["../outside.png"]}, "lies outside the file's folder. Put the images beside"),
        (ROW | {"id": "b", "images": ["/etc/hostname"]}, "lies outside"),
        (ROW | {"id": "b", "report": " \n"}, '"report" must be a text that is not empty'),
        ({"id": "b", "images": ["000.dcm"]}, '"report" must be a text'),
        (ROW | {"id": 3}, '"id" must be a text'),
        (ROW | {"id": "b", "prompt": 1}, '"prompt" must be a text'),
        (ROW | {"id": "b", "truth": "nodule"}, '"truth" must be a JSON object, or left out'),
        (ROW, "line 2: its id stands in line 1 too"),
    ],
)
def test_a_row_that_is_wrong_is_named_by_its_line(folder: Path, row: object, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"rows\.jsonl, line 2: ") as caught:
        read_studies(write(folder, ROW, row))
    assert says in str(caught.value)
    assert "Clear" not in str(caught.value)


def test_a_link_cannot_lead_out_of_the_folder(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    with pytest.raises(InvalidRequestError, match="lies outside"):
        read_studies(write(folder, ROW | {"images": ["link.png"]}))


def test_a_file_that_is_not_there_is_empty_or_no_text_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be read: No such file"):
        read_studies(folder / "gone.jsonl")
    with pytest.raises(InvalidRequestError, match="holds no study"):
        read_studies(write(folder, "", " "))
    (folder / "latin.jsonl").write_bytes('{"id": "é"}'.encode("latin-1"))
    with pytest.raises(InvalidRequestError, match="not UTF-8"):
        read_studies(folder / "latin.jsonl")
