"""Short questions about a study: the answers say what its truth says."""

from dataclasses import replace

import numpy as np
import pytest

from vlm_serve.training.studies.reports import ask_and_answer
from vlm_serve.training.studies.truth import Truth

NODULE = Truth("CT", "chest", "axial", "nodule", "left", "upper", 20, None, "drawn")
NORMAL = replace(NODULE, finding="none", side=None, zone=None, size_mm=None)


def answers(truth: Truth) -> dict[str, str]:
    return dict(ask_and_answer(truth, np.random.default_rng(seed)) for seed in range(60))


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_side_and_the_finding_are_those_of_the_study(side: str) -> None:
    said = answers(replace(NODULE, side=side))
    assert said["What kind of image is this?"] == "Axial CT of the chest."
    assert said["Which side is abnormal?"] == f"The {side} side."
    assert said["Is anything abnormal?"] == f"Yes: nodule on the {side}."
    assert said["Is there a nodule?"] == f"Yes, on the {side}."
    assert said["Is there a fracture?"] == "No fracture is seen."


def test_of_a_normal_study_nothing_is_affirmed() -> None:
    said = answers(NORMAL)
    assert said["Which side is abnormal?"] == "Neither side is abnormal."
    assert not any(answer.startswith("Yes") for answer in said.values())
