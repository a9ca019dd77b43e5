"""The tower's training: it learns from the picture alone, goes on where it was, and leaves what is frozen."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vlm_serve.encoders.timm_tower import TimmTower
from vlm_serve.training.progress import Silent
from vlm_serve.training.studies.truth import MASK_SIZE, Truth
from vlm_serve.training.tower import LabelledPictures, TowerConfig, Vocabulary, augment, train_tower

SIZE = 64
CONFIG = TowerConfig(epochs=2, batch_size=16, frozen=("conv_stem", "bn1", "blocks.0"))


def tower() -> TimmTower:
    torch.manual_seed(0)
    return TimmTower("test_efficientnet", (2, 2))


def pictures(count: int, seed: int = 0) -> LabelledPictures:
    """A bright square at one side of a grey field, or none."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(60, 100, (count, SIZE, SIZE), dtype=np.uint8)
    masks = np.zeros((count, MASK_SIZE, MASK_SIZE), dtype=np.uint8)
    truths = []
    for number in range(count):
        side = (None, "right", "left")[number % 3]
        finding = "none" if side is None else "nodule"
        if side is not None:
            left = 8 if side == "right" else 40
            pixels[number, 20:40, left : left + 18] = 250
            masks[number, 10:20, left // 2 : left // 2 + 9] = 255
        truths.append(Truth("CT", "chest", "axial", finding, side, None, None, None, f"drawn/{number}"))
    return LabelledPictures(pixels, masks, tuple(truths))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_it_learns_what_only_the_picture_tells(tmp_path: Path) -> None:
    learner = tower()
    history = train_tower(
        learner, pictures(192), pictures(48, 1), replace(CONFIG, epochs=10, tower_share=1.0), tmp_path, Silent()
    )
    assert history[-1]["finding"] > 0.9
    assert history[-1]["side"] > 0.9


def test_frozen_layers_stay_as_they_are_their_statistics_included(tmp_path: Path) -> None:
    learner = tower()
    before = weights(learner.model)
    train_tower(learner, pictures(32), pictures(16), replace(CONFIG, epochs=1), tmp_path, Silent())
    changed = {name for name, tensor in learner.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert not any(name.startswith(("conv_stem.", "bn1.", "blocks.0.")) for name in changed)


class StopError(Exception):
    """Cuts a run off."""


class Cut(Silent):
    """Ends a run after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, steps: int = 1) -> None:
        self.left -= steps
        if self.left == 0:
            raise StopError


def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, again = tower(), tower()
    expected = train_tower(whole, pictures(48), pictures(16), CONFIG, tmp_path / "whole", Silent())
    with pytest.raises(StopError):
        train_tower(tower(), pictures(48), pictures(16), CONFIG, tmp_path / "cut", Cut(4))
    history = train_tower(again, pictures(48), pictures(16), CONFIG, tmp_path / "cut", Silent())
    assert history == expected
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(again).items())


class Counting(Silent):
    """Counts the steps that are taken."""

    steps = 0

    def advance(self, steps: int = 1) -> None:
        self.steps += steps


@pytest.mark.parametrize(("seed", "steps"), [(0, 0), (5, 4)], ids=["the same pictures", "others"])
def test_a_checkpoint_is_taken_up_for_the_same_pictures_alone(tmp_path: Path, seed: int, steps: int) -> None:
    train_tower(tower(), pictures(32), pictures(16), CONFIG, tmp_path, Silent())
    counting = Counting()
    train_tower(tower(), pictures(32, seed), pictures(16), CONFIG, tmp_path, counting)
    assert counting.steps == steps


def test_a_mirrored_picture_has_its_side_exchanged_and_its_mask_mirrored() -> None:
    shown = pictures(60)
    vocabulary = Vocabulary(shown.truths)
    labels = vocabulary.encode(shown.truths)
    rows = torch.tensor([number for number, truth in enumerate(shown.truths) if truth.side])
    batch = augment(shown, rows, labels, vocabulary, torch.Generator().manual_seed(0))
    exchanged = 0
    for number in range(len(rows)):
        bright = batch.pixels[number, 0] > 0.6
        mean = torch.nonzero(bright)[:, 1].float().mean() / SIZE
        marked = torch.nonzero(batch.masks[number] > 0.5)[:, 1].float().mean() / MASK_SIZE
        side = vocabulary.values["side"][batch.labels["side"][number]]
        assert (mean < 0.5) == (side == "right")
        assert abs(mean - marked) < 0.06
        exchanged += side != shown.truths[int(rows[number])].side
    assert 5 < exchanged < len(rows) - 5


def test_for_the_reports_no_picture_is_mirrored() -> None:
    shown = pictures(60)
    vocabulary = Vocabulary(shown.truths)
    labels = vocabulary.encode(shown.truths)
    rows = torch.arange(60)
    batch = augment(shown, rows, labels, vocabulary, torch.Generator().manual_seed(0), mirror=False)
    assert torch.equal(batch.labels["side"], labels["side"])


def test_a_value_that_training_never_saw_counts_in_no_loss() -> None:
    vocabulary = Vocabulary(pictures(6).truths)
    (odd,) = (replace(pictures(1).truths[0], region="abdomen"),)
    assert vocabulary.encode([odd])["region"].tolist() == [-100]
