"""Every example of `docs/offline.md` runs, with a tiny model in the place of the embedded one."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import vlm_serve.serving.llm
from api.cli import main

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "offline.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(checkpoint: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the examples run: a radiograph, a folder with the adapter, and `demo` is the tiny model."""
    model, adapters = checkpoint
    shutil.copy(ROOT / "sample_data" / "chest_radiograph.dcm", tmp_path / "chest.dcm")
    shutil.copytree(adapters / "thorax", tmp_path / "adapters" / "radiology")
    monkeypatch.setattr(vlm_serve.serving.llm, "resolve_model", lambda name, told: {"demo": model}[name])
    monkeypatch.setattr("api.cli.settings.SHIPPED_ADAPTER", tmp_path / "adapters" / "radiology")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_the_examples_in_python_run_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    session: dict[str, object] = {}
    try:
        for block in blocks("python"):
            exec(block, session)
    finally:
        session["llm"].close()  # type: ignore[attr-defined]
    told = capsys.readouterr().out
    assert "The chest radiograph shows →" in told
    assert "application/dicom" in told
    assert len(blocks("python")) == 6


def test_the_batch_runs_as_it_is_written(folder: Path) -> None:
    (lines,), (command,) = blocks("json"), blocks("sh")
    (folder / "in.jsonl").write_text(lines, encoding="utf-8")
    program, *arguments = shlex.split(command)
    assert program == "vlm-serve"
    assert main([*arguments, "--kv-cache-memory", "4MiB"]) == 0
    found = [json.loads(line) for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(one["custom_id"] for one in found) == ["a", "b"]
    assert {one["response"]["status_code"] for one in found} == {200}
