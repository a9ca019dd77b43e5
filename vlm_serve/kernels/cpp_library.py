"""The C++ operators of the kernels: built once for this machine with its compiler, then loaded from the cache.

The sources use torch's stable ABI, which compiles in about a second a file and brings torch's own thread pool,
so that no second OpenMP runtime is linked.
"""

import functools
import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from filelock import FileLock

from vlm_serve.config import cache_dir

log = logging.getLogger(__name__)

NAME = "vlm_serve_kernels"
SOURCES = sorted(Path(__file__).parent.glob("*/cpu.cpp"))
HEADERS = sorted(Path(__file__).parent.rglob("*.h"))
FLAGS = ("-O3", "-march=native", "-Wall")


@functools.cache
def load() -> bool:
    """Makes `torch.ops.vlm_serve` available, building it if need be; False, said once in the log, if it cannot be.

    Any number of processes may call it at once: one builds, the others wait for it.
    """
    library = cache_dir() / "kernels" / _key() / f"{NAME}.so"
    try:
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(library.with_suffix(".lock")):
                if not library.exists():
                    _build(library)
        torch.ops.load_library(library)
    except (OSError, RuntimeError, ImportError) as error:
        log.warning(
            "The C++ kernels could not be built (%s); attention on the CPU takes the slower torch path. "
            "Install a C++20 compiler (g++ 11 or newer) and ninja, or name a compiler in CXX, and start again.",
            _cause(error),
        )
        log.debug("The failed build of the C++ kernels", exc_info=error)
        return False
    return True


def _cause(error: Exception) -> str:
    """The line that says what went wrong: the compiler's first error, if there is one."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if "error: " in line), lines[0])


def _build(library: Path) -> None:
    """Compiles into a folder of this process's own and moves the finished library into place."""
    # Imported late: it brings setuptools, which only a build needs.
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise OSError(f"there is no compiler {compiler}")
    log.info("Compiling the C++ kernels for this machine (some seconds, once)")
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        # One unit of all sources: torch's headers, most of the work, are read once.
        unit = Path(folder) / "kernels.cpp"
        unit.write_text("".join(f'#include "{source}"\n' for source in SOURCES), encoding="utf-8")
        cpp_extension.load(
            name=NAME,
            sources=[str(unit)],
            extra_cflags=list(FLAGS),
            extra_include_paths=[str(Path(__file__).parent)],
            build_directory=folder,
            is_python_module=False,
        )
        os.replace(Path(folder) / library.name, library)


def _key() -> str:
    """What a built library depends on: the sources, the flags, torch, Python, and the CPU's instruction set."""
    digest = hashlib.sha256()
    for source in (*SOURCES, *HEADERS):
        digest.update(source.read_bytes())
    parts = (*FLAGS, os.environ.get("CXX", ""), torch.__version__, sys.version, platform.machine(), _cpu_flags())
    digest.update("\0".join(parts).encode())
    return digest.hexdigest()[:16]


def _cpu_flags() -> str:
    """The instruction set as Linux lists it; `-march=native` code fails on a CPU with less."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
