"""`vlm-serve train-adapter` from studies to an adapter that is served, and what it refuses before it starts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import api.cli.train_adapter
from api.cli import INTERRUPTED, main
from tests.checkpoints import make_llava, make_timm_vlm
from tests.training.made_studies import FINDINGS, write_studies
from vlm_serve import LLM, SamplingParams
from vlm_serve.training.dataset import DEFAULT_PROMPT, read_studies

TRAIN = ["--learning-rate", "1e-2", "--epochs", "2", "--held-out", "0.2", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["timm", "llava"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    {"timm": make_timm_vlm, "llava": make_llava}[request.param](folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_studies(tmp_path_factory.mktemp("data"), 40)


def run(data: Path, out: Path, model: Path | str = "demo", *flags: str) -> int:
    return main(["train-adapter", "--data", str(data), "--out", str(out), "--model", str(model), *TRAIN, *flags])


def test_an_adapter_is_trained_scored_described_and_served(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapters" / "ward"
    assert run(data, out, model, "--score", "4", "--epochs", "8") == 0
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "held_out.json"]
    assert sorted(path.name for path in out.iterdir()) == files
    assert [path.name for path in out.parent.iterdir()] == ["ward"], "the work folder is left behind"
    held_out = json.loads((out / "held_out.json").read_text())
    assert held_out["adapter"]["loss"] < 0.5 * held_out["base"]["loss"]
    assert held_out["drafts"]["studies"] == 4
    assert held_out["drafts"]["rouge_l"] > 0.1, "a random base model finds none of the words"
    card = (out / "README.md").read_text()
    trained_on = 40 - held_out["studies"]
    assert f"studies trained on | {trained_on} with {trained_on} images" in card
    assert f"| with the adapter | {held_out['adapter']['loss']:.3f} |" in card
    assert "not for diagnostic use unless validated" in card
    study = read_studies(data)[0]
    parts = [{"type": "image", "image": study.images[0]}, {"type": "text", "text": DEFAULT_PROMPT}]
    with LLM(model, adapters=out.parent, dtype="float32", kv_cache_memory=2**22) as llm:
        answers = [
            llm.chat([{"role": "user", "content": parts}], SamplingParams(temperature=0), adapter=name, use_tqdm=False)
            for name in ("ward", None)
        ]
    with_adapter, without = (answer[0].outputs[0].text for answer in answers)
    assert any(with_adapter.startswith(finding[:3]) for finding in FINDINGS)
    assert with_adapter != without


def test_no_name_and_no_text_of_a_study_is_in_what_is_written(
    model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    secret = data.with_name(f"secret-{model.parent.name}.jsonl")
    marked = [row | {"id": f"DOE{n}", "prompt": "Jane?", "report": "Jane is ill."} for n, row in enumerate(rows)]
    secret.write_text("".join(json.dumps(row) + "\n" for row in marked))
    out = tmp_path / "ward"
    assert run(secret, out, model, "--score", "2", "--max-steps", "2") == 0
    printed = "".join(capfd.readouterr())
    written = b"".join(path.read_bytes() for path in out.iterdir()).decode(errors="replace")
    for word in ("DOE", "Jane", str(tmp_path), str(model), str(data.parent)):
        assert word not in written
    assert "DOE" not in printed
    assert "Jane" not in printed


def test_a_run_that_was_stopped_goes_on_to_the_same_adapter(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, tmp_path / "whole" / "ward", model, "--score", "0") == 0

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(api.cli.train_adapter, "_write_drafts", stop)
        assert run(data, tmp_path / "cut" / "ward", model, "--score", "0") == INTERRUPTED
    assert "The same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "cut" / "ward").exists()
    assert (tmp_path / "cut" / ".ward.work" / "checkpoint.pt").is_file()
    assert run(data, tmp_path / "cut" / "ward", model, "--score", "0") == 0
    for name in ("adapter_model.safetensors", "adapter_config.json", "held_out.json"):
        assert (tmp_path / "cut" / "ward" / name).read_bytes() == (tmp_path / "whole" / "ward" / name).read_bytes()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--held-out", "0.7"], "--held-out must be a share above 0 and at most 0.5"),
        (["--held-out", "gone.jsonl"], "gone.jsonl cannot be read"),
        (["--rank", "0"], "rank must be between 1 and 1024"),
        (["--learning-rate", "nan"], "lora_learning_rate must be"),
        (["--model", "/no/such/model"], "There is no model folder"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    data: Path, tmp_path: Path, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, tmp_path / "ward", "demo", *flags) == 1
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "ward").exists()


def test_an_adapter_that_is_there_is_never_overwritten(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ward").mkdir()
    (tmp_path / "ward" / "adapter_config.json").write_text("{}")
    assert run(data, tmp_path / "ward") == 1
    assert "is there already. Choose another --out, or remove it." in capsys.readouterr().err
    assert (tmp_path / "ward" / "adapter_config.json").read_text() == "{}"


def test_a_held_out_file_must_not_share_studies_with_the_training(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, tmp_path / "ward", "demo", "--held-out", str(data)) == 1
    assert "its score would mean nothing" in capsys.readouterr().err
