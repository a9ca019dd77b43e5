"""Studies are held out for good: by their ids, never with an image or a patient that was trained on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.training.made_studies import made_studies
from vlm_serve.errors import InvalidRequestError
from vlm_serve.training.adapter import Split, checked_split, split_by_share
from vlm_serve.training.dataset import Study


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that all differ: what is in them does not matter to a split."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(1000):
        (folder / f"{number}").write_text(str(number))
    return folder


@pytest.fixture
def studies(images: Path) -> Callable[[int], list[Study]]:
    return lambda count: [replace(s, images=(images / str(i),)) for i, s in enumerate(made_studies(count))]


Make = Callable[[int], list[Study]]


def ids(some: list[Study]) -> set[str]:
    return {study.id for study in some}


def test_about_the_share_is_held_out_and_every_study_is_on_one_side(studies: Make) -> None:
    split = split_by_share(studies(1000), 0.2, seed=0)
    assert 150 < len(split.held_out) < 250
    assert ids(split.train) | ids(split.held_out) == ids(studies(1000))
    assert ids(split.train).isdisjoint(ids(split.held_out))


def test_the_order_of_the_file_and_later_studies_move_none(studies: Make) -> None:
    before = split_by_share(studies(200), 0.2, seed=0)
    after = split_by_share(studies(300)[::-1], 0.2, seed=0)
    assert ids(before.held_out) == ids(after.held_out) & ids(studies(200))
    assert ids(split_by_share(studies(200), 0.2, seed=1).held_out) != ids(before.held_out)


def test_studies_that_share_an_image_stay_together(studies: Make, images: Path) -> None:
    chained = [
        replace(s, images=(images / str(i // 4), images / str((i + 1) // 4))) for i, s in enumerate(studies(400))
    ]
    shared = images / "a"
    shared.write_text("one for nine")
    apart = [replace(s, images=(*s.images, shared)) if i < 9 else s for i, s in enumerate(studies(99))]
    split = split_by_share(apart, 0.4, seed=0)
    assert len({study.id in ids(split.held_out) for study in apart[:9]}) == 1
    with pytest.raises(InvalidRequestError, match="studies to train on and"):
        split_by_share(chained, 0.4, seed=0)  # each shares one with the next


def test_a_copy_of_an_image_under_another_name_is_the_same_image(studies: Make, images: Path) -> None:
    train, other = studies(20), studies(21)[-1]
    copy = images / "copy"
    copy.write_bytes(train[3].images[0].read_bytes())
    with pytest.raises(InvalidRequestError, match="one of its images"):
        checked_split(Split(train, [replace(other, images=(copy,))]))


def test_a_patients_studies_stay_on_one_side(studies: Make) -> None:
    of_one = [replace(study, patient="p") if i % 3 == 0 else study for i, study in enumerate(studies(120))]
    split = split_by_share(of_one, 0.4, seed=0)
    assert len({study.id in ids(split.held_out) for study in of_one[::3]}) == 1
    with pytest.raises(InvalidRequestError, match="its patient"):
        checked_split(Split(of_one[:60], of_one[60:]))


@pytest.mark.parametrize(("count", "share"), [(7, 0.1), (8, 0.4), (20, 1e-9)])
def test_too_few_studies_are_refused(studies: Make, count: int, share: float) -> None:
    with pytest.raises(InvalidRequestError, match="at least 8 and 1 are needed"):
        split_by_share(studies(count), share, seed=0)


@pytest.mark.parametrize("shared", ["id", "image"])
def test_a_held_out_study_that_is_trained_on_is_refused(studies: Make, shared: str) -> None:
    train, other = studies(20), replace(studies(21)[-1], id="other")
    other = replace(other, id=train[3].id) if shared == "id" else replace(other, images=train[3].images)
    with pytest.raises(InvalidRequestError, match=f"held-out study '{other.id}', its patient or one of its images"):
        checked_split(Split(train, [other]))
