"""The identity of a folder follows from what its files hold, and a large file is read for it once."""

import os
from pathlib import Path

import pytest

from vlm_serve import digests
from vlm_serve.digests import folder_digest
from vlm_serve.errors import ConfigurationError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM_SERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def folder(path: Path, **files: bytes) -> Path:
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        (path / f"{name}.json").write_bytes(content)
    return path


def test_equal_files_have_one_identity_wherever_they_lie(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "one", a=b"1", b=b"2"), folder(tmp_path / "two", a=b"1", b=b"2")
    assert folder_digest(one, ("*.json",)) == folder_digest(two, ("*.json",))


@pytest.mark.parametrize("changed", [{"a": b"1", "b": b"3"}, {"a": b"1", "c": b"2"}, {"a": b"12", "b": b""}])
def test_another_content_or_name_is_another_identity(tmp_path: Path, changed: dict[str, bytes]) -> None:
    one, two = folder(tmp_path / "one", a=b"1", b=b"2"), folder(tmp_path / "two", **changed)
    assert folder_digest(one, ("*.json",)) != folder_digest(two, ("*.json",))


def test_files_beside_the_pattern_do_not_count(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", a=b"1")
    before = folder_digest(one, ("*.json",))
    (one / "README.md").write_text("new")
    assert folder_digest(one, ("*.json", "a.*")) == before


def test_a_folder_without_such_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="none of the files"):
        folder_digest(folder(tmp_path / "one"), ("*.json",))


def test_a_large_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = folder(tmp_path / "one", a=b"1" * 100)
    monkeypatch.setattr(digests, "REMEMBERED_FROM", 10)
    read: list[Path] = []
    plain = digests.file_digest
    monkeypatch.setattr(digests, "file_digest", lambda path: (read.append(path), plain(path))[1])
    first = folder_digest(one, ("*.json",))
    assert folder_digest(one, ("*.json",)) == first
    assert len(read) == 1
    times = (one / "a.json").stat()
    (one / "a.json").write_bytes(b"2" * 100)
    os.utime(one / "a.json", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert folder_digest(one, ("*.json",)) != first, "a file of the same size and time, with other bytes"


def test_a_damaged_note_only_costs_a_second_reading(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = folder(tmp_path / "one", a=b"1" * 100)
    monkeypatch.setattr(digests, "REMEMBERED_FROM", 10)
    first = folder_digest(one, ("*.json",))
    (note,) = (own_cache / "digests").iterdir()
    note.write_text("{")
    assert folder_digest(one, ("*.json",)) == first
