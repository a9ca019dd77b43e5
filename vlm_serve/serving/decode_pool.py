"""`DecodePool`: files to `ClinicalImage`s in worker processes that may be killed. Serves ingest and the CLI.

A file that kills its worker, or takes too long, costs its own request an error.
"""

import os
import signal

import msgspec
import numpy as np

from vlm_serve import errors
from vlm_serve.clinical.image import ClinicalImage
from vlm_serve.config import MIB, DecodeLimits, IngestConfig
from vlm_serve.errors import ConfigurationError, CorruptImageError, ImageError, ImageLimitError
from vlm_serve.serving.channel import decode, encode, read_shared, write_shared
from vlm_serve.serving.decode_worker import Decoded, FromWorker, Job, Refused
from vlm_serve.serving.worker_pool import Worker, WorkerDiedError, WorkerPool
from vlm_serve.types import ImagePart


class DecodePool:
    """A fixed number of decode workers. `decode` may be called from any thread; callers are served in turn."""

    def __init__(self, config: IngestConfig) -> None:
        if config.workers < 1:
            raise ConfigurationError(f"The decode pool needs at least one worker, not {config.workers}.")
        self._limits = config.limits
        self._pool = WorkerPool(config.workers, _DecodeWorker)

    def start(self) -> None:
        """Starts the workers and returns at once; they import their decoders meanwhile. Else the first file does."""
        self._pool.start()

    def decode(self, part: ImagePart) -> ClinicalImage:
        """Decodes one file; blocks until a worker is free and has done it.

        The limit of wall time counts from when the worker gets the file.

        Raises:
            ImageError: the file cannot be used, or went past a limit of memory or time.
            ServiceError: the pool is closed, or no worker starts.
        """
        if len(part.data) > self._limits.max_file_bytes:
            raise ImageLimitError(f"The file is larger than {self._limits.max_file_bytes // MIB} MiB.")
        with self._pool.borrow() as worker:
            return worker.decode(part, self._limits)

    def close(self) -> None:
        """Ends the workers, jobs under way included. May be called more than once."""
        self._pool.close()

    def __enter__(self) -> "DecodePool":
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _DecodeWorker(Worker):
    def __init__(self) -> None:
        super().__init__("vlm_serve.serving.decode_worker")

    def decode(self, part: ImagePart, limits: DecodeLimits) -> ClinicalImage:
        """Hands the file over and waits for the answer. The worker is spoilt unless it has answered in time."""
        fd = write_shared(part.data)
        try:
            message, fds = self.ask(encode(Job(part.media_type, len(part.data), limits)), [fd], limits.wall_seconds)
        except TimeoutError:
            raise ImageLimitError(
                f"Decoding the file took longer than {limits.wall_seconds:g} s. Send a smaller or simpler one."
            ) from None
        except WorkerDiedError as death:
            raise _cause(death, limits) from None
        finally:
            os.close(fd)
        try:
            return self._image(message, fds, limits)
        finally:
            for fd in fds:
                os.close(fd)

    def _image(self, message: bytes, fds: list[int], limits: DecodeLimits) -> ClinicalImage:
        """The answer, believed as little as a process deserves that has read a hostile file."""
        try:
            answer = decode(message, FromWorker)
        except (msgspec.DecodeError, ValueError):
            raise _implausible() from None
        if isinstance(answer, Refused):
            self.is_spoilt = False
            raise _ERRORS.get(answer.error, CorruptImageError)(answer.message)
        if not isinstance(answer, Decoded) or len(fds) != 1:
            raise _implausible()
        rows, columns = answer.receipt.rows, answer.receipt.columns
        if not (0 < rows <= limits.max_dimension and 0 < columns <= limits.max_dimension):
            raise _implausible()
        pixels = np.empty((rows, columns, 3), np.uint8)
        try:
            read_shared(fds[0], pixels.reshape(-1).data)
        except EOFError:
            raise _implausible() from None
        pixels.flags.writeable = False
        self.is_spoilt = False
        return ClinicalImage(pixels, answer.receipt)


def _cause(death: WorkerDiedError, limits: DecodeLimits) -> ImageError:
    if death.code == -signal.SIGXCPU:
        return ImageLimitError(
            f"Decoding the file took more than {limits.cpu_seconds} s of CPU time. Send a smaller or simpler one."
        )
    if death.was_killed:
        return ImageLimitError("The process that decoded the file was killed: it may need too much memory.")
    return CorruptImageError("The file made its decoder fail. Check it, or export it again from its source.")


_ERRORS: dict[str, type[ImageError]] = {
    kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ImageError)
}


def _implausible() -> ImageError:
    return CorruptImageError("The file made its decoder answer nonsense. Check it, or export it again.")
