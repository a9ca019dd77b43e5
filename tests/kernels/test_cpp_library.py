import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from tests.kernels.cases import CASES
from vlm_serve.kernels import cpp_library, dispatch
from vlm_serve.kernels.attention import torch_batched

LOAD = """
import logging
logging.basicConfig(level=logging.INFO)
from vlm_serve.kernels import cpp_library
print("loaded" if cpp_library.load() else "not loaded")
"""


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine on which nothing was built yet; afterwards this process finds its own library again."""
    monkeypatch.setenv("VLM_SERVE_CACHE", str(tmp_path))
    cpp_library.load.cache_clear()
    yield tmp_path
    cpp_library.load.cache_clear()


def test_without_a_compiler_one_warning_is_given_and_torch_computes(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    batch = CASES[0].build(torch.float32)
    for _ in range(2):
        out = dispatch.paged_attention(*batch.tensors, **batch.options, max_query_len=133)
        assert torch.equal(out, torch_batched.paged_attention(*batch.tensors, **batch.options))
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "compiler" in warning.getMessage()
    assert not list(empty_cache.rglob("*.so"))


def test_two_processes_at_once_build_once_and_a_later_one_only_loads(empty_cache: Path) -> None:
    if shutil.which(cpp_extension.get_cxx_compiler()) is None:
        pytest.skip("no C++ compiler")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", LOAD], env=environment, stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    ended = [process.communicate(timeout=120) for process in processes]
    assert [out for out, _ in ended] == ["loaded\n"] * 2
    assert sum("Compiling" in errors for _, errors in ended) == 1
    (library,) = empty_cache.rglob("*.so")
    assert {path.name for path in library.parent.iterdir()} <= {library.name, f"{cpp_library.NAME}.lock"}
    built = library.stat().st_mtime_ns
    third = subprocess.run([sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, check=True)
    assert third.stdout == "loaded\n"
    assert "Compiling" not in third.stderr
    assert library.stat().st_mtime_ns == built


@pytest.mark.parametrize("change", ["source", "compiler", "cpu"])
def test_a_change_of_source_compiler_or_cpu_asks_for_another_build(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cpp_library._key()
    if change == "source":
        edited = tmp_path / "cpu.cpp"
        edited.write_bytes(cpp_library.SOURCES[0].read_bytes() + b"\n")
        monkeypatch.setattr(cpp_library, "SOURCES", [edited, *cpp_library.SOURCES[1:]])
    elif change == "compiler":
        monkeypatch.setenv("CXX", "another")
    else:
        monkeypatch.setattr(cpp_library, "_cpu_flags", lambda: "flags : sse2")
    assert cpp_library._key() != before
