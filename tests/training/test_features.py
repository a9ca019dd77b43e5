"""Features on disk are what the server's own path gives for the files, made once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.checkpoints import make_llava, make_timm_vlm
from tests.clinical.dicom_files import LIMITS
from tests.families.pictures import whole
from tests.training.made_studies import write_studies
from vlm_serve.clinical.decode import decode
from vlm_serve.errors import CorruptImageError, UnsupportedImageError
from vlm_serve.families import load_family
from vlm_serve.families.base import ModelFamily
from vlm_serve.training.dataset import Study, read_studies
from vlm_serve.training.features import BATCH_IMAGES, encode_studies, load_vision
from vlm_serve.training.progress import Silent

CPU = torch.device("cpu")


class Blind(nn.Linear):
    """A tower that must not be asked."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        raise AssertionError("encoded again")


@pytest.fixture(scope="module", params=["timm", "llava"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFamily:
    folder = tmp_path_factory.mktemp("checkpoint")
    {"timm": make_timm_vlm, "llava": make_llava}[request.param](folder)
    return load_family(folder)


@pytest.fixture
def studies(tmp_path: Path) -> list[Study]:
    return read_studies(write_studies(tmp_path / "data", BATCH_IMAGES + 3))


def encode(family: ModelFamily, studies: Sequence[Study], folder: Path, vision: nn.Module | None = None) -> Any:
    vision = vision or load_vision(family, torch.float32, CPU)[0]
    return encode_studies(family, vision, studies, LIMITS, folder, Silent())


@torch.inference_mode()
def test_features_and_projector_are_those_of_the_served_model(
    family: ModelFamily, studies: list[Study], tmp_path: Path
) -> None:
    pair = Study("pair", studies[0].images + studies[1].images, "-")
    features = encode(family, [*studies, pair], tmp_path / "work")
    assert (features.shape[:2], features.dtype) == ((1, len(studies) + 2), np.float16)
    model = family.build(torch.float32, CPU)
    inputs = [
        whole(family, decode(path.read_bytes(), "", LIMITS)) for study in (*studies, pair) for path in study.images
    ]
    _, projector = load_vision(family, torch.float32, CPU)
    found = projector(torch.from_numpy(features[0].astype(np.float32)))
    torch.testing.assert_close(found, torch.stack(model.encode_images(inputs)), rtol=1e-2, atol=1e-2)


def test_features_are_made_once_and_read_from_disk(family: ModelFamily, studies: list[Study], tmp_path: Path) -> None:
    first = encode(family, studies, tmp_path / "work")
    again = encode(family, studies, tmp_path / "work", Blind(1, 1))
    assert isinstance(again, np.memmap)
    assert np.array_equal(first, again)
    assert (tmp_path / "work").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("change", ["file", "order", "model", "dtype"])
def test_what_has_changed_is_made_anew(family: ModelFamily, studies: list[Study], tmp_path: Path, change: str) -> None:
    encode(family, studies, tmp_path / "work")
    blind: nn.Module = Blind(1, 1)
    if change == "file":
        studies[0].images[0].write_bytes(studies[3].images[0].read_bytes())
    elif change == "order":
        studies.reverse()
    elif change == "model":
        family.__dict__["model_digest"] = "another"
    else:
        blind = blind.half()
    try:
        with pytest.raises(AssertionError, match="encoded again"):
            encode(family, studies, tmp_path / "work", blind)
    finally:
        family.__dict__.pop("model_digest", None)


@pytest.mark.parametrize(
    ("content", "error"), [(b"\x89PNG\r\n\x1a\nJohn Doe", CorruptImageError), (b"John Doe", UnsupportedImageError)]
)
def test_a_file_that_cannot_be_used_is_named_by_its_study(
    family: ModelFamily, studies: list[Study], tmp_path: Path, content: bytes, error: type[Exception]
) -> None:
    studies[17].images[0].write_bytes(content)
    with pytest.raises(error, match="Study 'study-17', image 1: ") as caught:
        encode(family, studies, tmp_path / "work")
    assert "John" not in str(caught.value)
    assert not list((tmp_path / "work").iterdir()), "half of the features are left behind"
