"""Fine-tuning learns what pictures tell and nothing else changes; a run that was cut off ends where it would have."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints import make_llava, make_timm_vlm
from tests.training.made_studies import FINDINGS, made_features, made_studies
from vlm_serve.encoders.projector import MlpProjector
from vlm_serve.errors import ConfigurationError
from vlm_serve.families import load_family
from vlm_serve.training.batches import epoch_batches
from vlm_serve.training.decoder import load_decoder
from vlm_serve.training.examples import Example, make_examples
from vlm_serve.training.features import load_vision
from vlm_serve.training.finetune import FinetuneConfig, FinetuneResult, TrainingState, finetune, learning_rate_share

TOKENS, WIDTH = 4, 8
CONFIG = FinetuneConfig(
    rank=8, alpha=16, lora_learning_rate=5e-3, projector_learning_rate=1e-2, epochs=2, train_projector=True
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products on several threads are slower, many times so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_timm_vlm(folder, grid=(2, 2))
    return folder


@pytest.fixture(scope="module")
def examples(folder: Path) -> list[Example]:
    return make_examples(load_family(folder), made_studies(96), TOKENS)


def projector(folder: Path) -> MlpProjector:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return MlpProjector(WIDTH, load_family(folder).decoder_config.hidden_size)


def train(
    folder: Path, examples: Sequence[Example], features: np.ndarray | None = None, *, count: int = 64, **changes: Any
) -> FinetuneResult:
    """On the first `count` studies, the rest held out; `changes` are of the settings or of `finetune`'s own."""
    own = {name: changes.pop(name) for name in ("work", "on_step", "checkpoint_seconds") if name in changes}
    features = made_features(len(examples), TOKENS, WIDTH) if features is None else features
    decoder = load_decoder(load_family(folder))
    config = replace(CONFIG, **changes)
    eyes = projector(folder)
    return finetune(decoder, eyes, examples[:count], features, config, held_out=examples[count:], **own)


def weights(result: FinetuneResult) -> dict[str, torch.Tensor]:
    return {**result.model.state_dict(), **result.projector.state_dict()}


def assert_equal(one: FinetuneResult, other: FinetuneResult) -> None:
    assert (one.losses, one.held_out) == (other.losses, other.held_out)
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


def stop_at(step: int) -> Callable[[TrainingState], None]:
    def stop(state: TrainingState) -> None:
        if state.step == step:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("train_projector", [True, False])
def test_the_answer_is_learnt_where_the_picture_alone_tells_it(
    folder: Path, examples: list[Example], train_projector: bool
) -> None:
    tokens = np.mean([example.answer_tokens for example in examples[:4]])
    chance = math.log(len(FINDINGS)) / tokens  # of the first token; the others follow from it
    seeing = train(folder, examples, epochs=8, train_projector=train_projector)
    blank = train(folder, examples, np.zeros((1, 96, TOKENS, WIDTH), np.float16), epochs=8)
    assert seeing.held_out[-1] < 0.75 * chance
    assert blank.held_out[-1] > chance


@pytest.mark.parametrize("train_projector", [True, False])
def test_only_what_is_trained_changes(folder: Path, examples: list[Example], train_projector: bool) -> None:
    result = train(folder, examples, max_steps=2, train_projector=train_projector)
    base = load_decoder(load_family(folder)).state_dict()
    seen = 0
    for name, tensor in result.model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, base[name.replace(".base_layer", "")])
            seen += 1
    assert seen == len(base)
    fresh = projector(folder).state_dict()
    assert all(torch.equal(t, fresh[name]) != train_projector for name, t in result.projector.state_dict().items())
    assert all(bool(t.any()) for name, t in result.model.state_dict().items() if "lora_B" in name)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_the_loss_is_transformers_of_the_answers_tokens_alone(tmp_path: Path, vision: str) -> None:
    model = make_llava(tmp_path, vision)
    family = load_family(tmp_path)
    studies = made_studies(5)
    studies[2] = replace(studies[2], images=(Path("-"), Path("-")))
    examples = make_examples(family, studies, 16)
    pixels = torch.randn(6, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    tower, eyes = load_vision(family, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        features = tower(pixels)[None].numpy()
        total = 0.0
        for example in examples:
            labels = (-100,) * example.answer_start + example.token_ids[example.answer_start :]
            output = model(
                input_ids=torch.tensor([example.token_ids]),
                pixel_values=pixels[list(example.image_rows)],
                labels=torch.tensor([labels]),
            )
            total += float(output.loss) * example.answer_tokens
    expected = total / sum(example.answer_tokens for example in examples)
    config = FinetuneConfig(batch_size=3, max_steps=1)
    result = finetune(load_decoder(family), eyes, examples, features, config, held_out=examples)
    assert result.held_out[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("step", [1, 6, 8, 13])
def test_a_run_that_was_cut_off_ends_at_the_same_bits(
    folder: Path, examples: list[Example], tmp_path: Path, step: int
) -> None:
    features = made_features(96, TOKENS, WIDTH, views=3)
    whole = train(folder, examples, features, dropout=0.1)
    with pytest.raises(KeyboardInterrupt):
        train(folder, examples, features, dropout=0.1, work=tmp_path, checkpoint_seconds=0, on_step=stop_at(step))
    states: list[TrainingState] = []
    torch.manual_seed(step)  # whatever else has drawn numbers since
    resumed = train(folder, examples, features, dropout=0.1, work=tmp_path, on_step=states.append)
    assert (states[0].resumed, states[0].step, whole.steps) == (step, step + 1, 16)
    assert_equal(resumed, whole)


def test_a_run_that_has_ended_is_not_run_again(folder: Path, examples: list[Example], tmp_path: Path) -> None:
    whole = train(folder, examples, work=tmp_path, max_steps=3)
    again = train(folder, examples, work=tmp_path, max_steps=3, on_step=stop_at(1))
    assert_equal(again, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("change", ["seed", "data", "features", "damaged", "empty"])
def test_a_checkpoint_of_another_run_is_not_taken_up(
    folder: Path, examples: list[Example], tmp_path: Path, change: str
) -> None:
    count, seed = (63 if change == "data" else 64), int(change == "seed")
    train(folder, examples, work=tmp_path, max_steps=1, count=count, seed=seed)
    features = made_features(96, TOKENS, WIDTH)
    file = tmp_path / "checkpoint.pt"
    if change == "features":
        features[0, 0] += 1
    elif change in ("damaged", "empty"):
        file.write_bytes(file.read_bytes()[: 1000 if change == "damaged" else 0])
    states: list[TrainingState] = []
    train(folder, examples, features, work=tmp_path, max_steps=1, on_step=states.append)
    assert [(state.step, state.resumed) for state in states] == [(1, 0)]


def test_the_same_seed_gives_the_same_adapter_and_another_another(folder: Path, examples: list[Example]) -> None:
    one = train(folder, examples, max_steps=2)
    assert_equal(train(folder, examples, max_steps=2), one)
    other = train(folder, examples, max_steps=2, seed=1)
    assert other.losses != one.losses


def test_an_epoch_shows_every_study_once_in_batches_of_like_lengths() -> None:
    rng = np.random.default_rng(0)
    examples = [Example(tuple(range(n)), 1, (), ()) for n in rng.integers(20, 200, 1001)]
    plans = [list(epoch_batches(examples, 4, 8, seed=5, epoch=epoch)) for epoch in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    for plan in plans:
        assert sorted(index for indices, _ in plan for index in indices) == list(range(1001))
        assert len(plan) == math.ceil(1001 / 8)
        assert {view for _, views in plan for view in views} == {0, 1, 2, 3}
        lengths = [[len(examples[index].token_ids) for index in indices] for indices, _ in plan]
        assert sum(max(batch) * len(batch) for batch in lengths) < 1.1 * sum(map(sum, lengths))
        assert max(lengths[0]) < max(map(max, lengths)), "batches are not in the order of their lengths"


def test_the_learning_rate_rises_in_a_line_and_falls_to_zero() -> None:
    shares = [learning_rate_share(step, 100, 0.1) for step in range(101)]
    assert shares[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert shares[10] == 1.0
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[55] == pytest.approx(0.5)
    assert shares[100] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank", 0), ("dropout", 1.0), ("epochs", 0), ("batch_size", 0), ("warmup_share", 0.6), ("max_steps", 0)],
)
def test_a_setting_out_of_its_range_is_named(field: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"{field} must be"):
        FinetuneConfig(**{field: value})  # type: ignore[arg-type]


def test_no_studies_are_refused(folder: Path, examples: list[Example]) -> None:
    with pytest.raises(ConfigurationError, match="no studies"):
        train(folder, examples, count=0)
