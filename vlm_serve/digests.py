"""The identity of a model or an adapter: a digest of its files, never its name."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from vlm_serve.config import cache_dir


def folder_digest(folder: Path, patterns: Sequence[str]) -> str:
    """sha256 over names and contents of the files in `folder` that match one of the glob `patterns`.

    A file that was hashed before and has the same size and time of change is not read again.
    """
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    known = _Memory(cache_dir() / "digests.json")
    sha = hashlib.sha256()
    for file in files:
        sha.update(f"{file.name}\0{known.digest(file)}\n".encode())
    known.save()
    return sha.hexdigest()


class _Memory:
    """Digests of files by path, size and time of change, kept in the user's cache."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._changed = False
        try:
            self._digests: dict[str, str] = json.loads(file.read_text())
        except (OSError, ValueError):
            self._digests = {}

    def digest(self, file: Path) -> str:
        status = file.stat()
        key = f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}"
        if key not in self._digests:
            with file.open("rb") as stream:
                self._digests[key] = hashlib.file_digest(stream, "sha256").hexdigest()
            self._changed = True
        return self._digests[key]

    def save(self) -> None:
        if not self._changed:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._file.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(self._digests))
            temporary.replace(self._file)
        except OSError:
            pass  # a cache folder that cannot be written only costs the time to hash again
