"""The scripts' own decisions: when a training run counts as a reproduction, and that a wheel has what is shipped."""

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from scripts import train_demo
from vlm_serve.errors import ConfigurationError
from vlm_serve.training.scores import Accuracy, Scores, score

ROOT = Path(__file__).parent.parent
REPORT = "TECHNIQUE: Radiograph of the chest.\nFINDINGS: Small right pleural effusion.\nIMPRESSION: Effusion."


def scores(right: int = 95, *, majority: float = 0.4, **changed: int) -> Scores:
    """Of a hundred studies, `right` of each answer unless told otherwise."""
    made = score([REPORT], [REPORT])
    counts = {name: changed.get(name, right) for name in made.accuracies}
    return replace(made, accuracies={name: Accuracy(count, 100, majority=majority) for name, count in counts.items()})


@dataclass
class Found:
    scores: Scores


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_demo, "SHIPPED", tmp_path)
    (tmp_path / "scores.json").write_text(json.dumps({"test": scores(95).to_json()}))


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize(("right", "near"), [(95, True), (93, True), (97, True), (91, False), (99, False)])
@pytest.mark.parametrize("name", train_demo.COUNTED)
def test_a_run_reproduces_the_shipped_scores_within_three_points(name: str, right: int, near: bool) -> None:
    assert train_demo.compare(scores(**{name: right})) is near


@pytest.mark.usefixtures("shipped")
def test_what_is_not_counted_may_differ() -> None:
    assert train_demo.compare(scores(sections=10))


@pytest.mark.parametrize("name", train_demo.COUNTED)
def test_the_bar_is_85_percent_seen_and_the_commonest_answer_and_ten_points_blank(name: str) -> None:
    assert train_demo.meets_the_bar(scores(85), scores(50, majority=0.4))
    assert not train_demo.meets_the_bar(scores(**{name: 84}), scores(50, majority=0.4))
    assert not train_demo.meets_the_bar(scores(85), scores(50, majority=0.4, **{name: 51}))


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize(
    ("right", "flag", "status", "installed"),
    [(95, False, 0, False), (95, True, 0, True), (87, False, 1, False), (87, True, 0, True), (84, True, 1, False)],
    ids=["the same", "the same, to install", "others", "others, to install", "not good enough"],
)
def test_what_misses_the_bar_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: int, flag: bool, status: int, installed: bool
) -> None:
    """The run's decisions alone: what it decides on is made elsewhere and tested there."""
    made: list[str] = []
    family = object.__new__(train_demo.TimmVlmFamily)
    monkeypatch.setattr(train_demo, "prepare_demo", lambda: tmp_path)
    monkeypatch.setattr(train_demo, "load_family", lambda folder: family)
    monkeypatch.setattr(train_demo, "train_demo", lambda *_: None)
    monkeypatch.setattr(train_demo, "write_films", lambda *_: None)
    monkeypatch.setattr(train_demo, "install", lambda *_: made.append("installed"))
    found = {"test": scores(right), "blank": scores(40), "films": scores(10)}
    monkeypatch.setattr(train_demo, "evaluate", lambda work, data, name, *flags: Found(found[name]))
    assert train_demo.run(tmp_path / "run", flag) == status
    assert bool(made) is installed
    assert (tmp_path / "run" / "finished").is_file()


def test_only_the_scripts_own_folder_is_removed_before_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    for file in (tmp_path / "finished", tmp_path / "run" / "finished", tmp_path / "run" / "old"):
        file.touch()
    monkeypatch.setattr(sys, "argv", ["train_demo", "--work", str(tmp_path)])

    def stop() -> Path:
        raise ConfigurationError("far enough")

    monkeypatch.setattr(train_demo, "prepare_demo", stop)
    assert train_demo.main() == 1
    assert (tmp_path / "finished").is_file()
    assert not (tmp_path / "run" / "old").exists()


def test_the_adapters_script_is_the_command(tmp_path: Path) -> None:
    """From any folder, with nothing installed as a command."""
    data = tmp_path / "none.jsonl"
    command = [sys.executable, str(ROOT / "adapters" / "train.py"), "--data", str(data), "--out", str(tmp_path / "out")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert str(data) in run.stderr
    assert "Traceback" not in run.stderr


def test_a_wheel_has_the_weights_and_the_kernels_sources(tmp_path: Path) -> None:
    source = tmp_path / "source"  # the build leaves its folders beside what it builds
    for part in ("vlm_serve", "api", "adapters"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / file, source / file)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "vlm_serve/families/demo_vision.safetensors" in names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "vlm_serve").rglob("*.cpp")}
    assert sources
    assert sources <= names
