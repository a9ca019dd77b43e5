"""What a newcomer runs: the demo, behind a proxy and against a server that fails, and the scripts around make."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from tests.api.conftest import Scripted
from tests.api.scripted import BASE, Script, delta
from vlm_serve.errors import EngineDeadError, RequestFailedError

ROOT = Path(__file__).parent.parent.parent

HELLO = [{"role": "user", "content": "Hello?"}]


@pytest.fixture
def demo(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module; the scripted server has a model of the name that it asks for."""
    monkeypatch.setattr(scripted.llm, "models", (replace(BASE, id="demo"),))
    spec = importlib.util.spec_from_file_location("demo_script", ROOT / "scripts" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def process() -> Iterator["subprocess.Popen[bytes]"]:
    """Stands for the server's process: it runs until the test ends."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as waiting:
        yield waiting


def test_the_demo_does_not_ask_a_proxy_for_its_own_server(
    scripted: Scripted,
    demo: ModuleType,
    process: "subprocess.Popen[bytes]",
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert demo.wait_until_healthy(process, scripted.url, 5) is None
    demo.ask(scripted.url, "demo", HELLO)
    assert "Hello\n[7 tokens in, 3 of them from the cache, 2 out" in capsys.readouterr().out


def test_the_demo_gives_up_on_a_server_that_never_gets_well_and_does_not_hurry_it(
    scripted: Scripted,
    demo: ModuleType,
    process: "subprocess.Popen[bytes]",
    caplog: pytest.LogCaptureFixture,
) -> None:
    scripted.llm.health = EngineDeadError("It has ended.")
    with caplog.at_level("INFO", logger="vlm_serve.api"):
        failure = demo.wait_until_healthy(process, scripted.url, 0.5)
    assert "not up after" in failure
    assert 1 <= sum("/health" in record.getMessage() for record in caplog.records) <= 4


def test_the_demo_says_when_the_server_ended(demo: ModuleType) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
        assert demo.wait_until_healthy(ended, "http://127.0.0.1:9", 5) == "The server did not start."


def test_the_demo_shows_the_servers_message_when_an_answer_breaks_off(scripted: Scripted, demo: ModuleType) -> None:
    scripted.llm.script = Script([delta("Hel", 1), RequestFailedError("It failed.")])
    with pytest.raises(SystemExit, match=r"It failed\."):
        demo.ask(scripted.url, "demo", HELLO)


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(("before", "skipped"), [("0", True), ("100000", False)])
def test_continuous_integration_says_that_the_exhaustive_tier_was_skipped(
    bin_folder: Path, before: str, skipped: bool
) -> None:
    script(bin_folder / "make", 'echo "1 passed in 0.10s"')
    environment = os.environ | {"CI_TEST_ALL_BEFORE": before}
    command = [str(ROOT / ".ci" / "run")]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert ("test-all skipped after" in out) == skipped
    assert ("test-all: 1 passed" in out) != skipped


@pytest.mark.parametrize("version", ["69.5.1", "77.0.3"])
def test_setting_up_over_a_cuda_torch_brings_the_linters_and_a_setuptools_that_can_build(
    tmp_path: Path, version: str
) -> None:
    """`python` stands for an interpreter whose torch sees a GPU: it notes what it is asked to do."""
    log = tmp_path / "log"
    python = script(
        tmp_path / "python",
        f"""
case "$*" in
  *purelib*) echo "{tmp_path}";;
  *"import setuptools"*) exit $(( {version.partition(".")[0]} < 77 ));;
  *"-m venv"*) mkdir -p "${{@: -1}}/bin"; cp "$0" "${{@: -1}}/bin/python";;
  *"-m pip"*) echo "$*" >> "{log}";;
esac""",
    )
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    subprocess.run(["make", "setup", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, check=True)
    *before, last = log.read_text().splitlines()
    assert "--no-build-isolation" in last
    assert last.endswith("-e .[test,dev]")
    assert [line.endswith("setuptools>=77") for line in before] == ([True] if version < "77" else [])
