"""A tiny checkpoint with two adapters, shared by the tests of serving."""

from typing import NamedTuple

import pytest

from tests.checkpoints import make_llava
from tests.engine.adapters import make_adapter


class Served(NamedTuple):
    folder: object
    model: object
    adapters: object


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Served:
    folder, adapters = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapters")
    model = make_llava(folder, "siglip")
    for seed, name in enumerate(("chest", "neuro")):
        make_adapter(model, adapters / name, rank=4 + seed, seed=seed, targets=r".*language_model.*_proj")
    return Served(folder, model, adapters)
