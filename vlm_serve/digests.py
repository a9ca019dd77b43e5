"""The identity of a model or an adapter: the sha256 of what its files hold, never their name.

Every cache and every answer is keyed by it. Large files are hashed once and remembered.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from vlm_serve.config import MIB, cache_dir
from vlm_serve.errors import ConfigurationError

REMEMBERED_FROM = 16 * MIB
"""Bytes. Smaller files are hashed anew: that takes milliseconds."""


def file_digest(path: Path) -> str:
    """The sha256 of a file's bytes, read as a stream."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path, patterns: Iterable[str]) -> str:
    """The sha256 over names, as seen from `folder`, and contents of the files in it that match a glob pattern.

    A large file's own digest is remembered in the cache folder under its path, size and times, so that the
    weights of a model are read for it once.

    Raises:
        ConfigurationError: no file matches.
    """
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    if not files:
        raise ConfigurationError(f"{folder} holds none of the files that make up a model or an adapter.")
    sha = hashlib.sha256()
    for path in files:
        sha.update(f"{path.relative_to(folder).as_posix()}\0{_remembered_digest(path)}\n".encode())
    return sha.hexdigest()


def _remembered_digest(path: Path) -> str:
    path = path.resolve()
    stat = path.stat()
    if stat.st_size < REMEMBERED_FROM:
        return file_digest(path)
    # The time of the inode's last change is with them: it moves when a copy keeps the file's own times.
    state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    note = cache_dir() / "digests" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        remembered = json.loads(note.read_text())
        if remembered["state"] == state:
            return str(remembered["sha256"])
    digest = file_digest(path)
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
        note.parent.mkdir(parents=True, exist_ok=True)
        draft = note.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(json.dumps({"state": state, "sha256": digest}))
        draft.replace(note)
    return digest
