"""The process that decodes files, one at a time: torch-free, killable, limited in memory and CPU time.

Started by `decode_pool.py` as `python -m vlm_serve.serving.decode_worker FD`. Whatever a file does to it,
nothing else notices. It ends when the pool closes its end of the channel.
"""

import contextlib
import math
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from vlm_serve.clinical.decode import decode as decode_file
from vlm_serve.clinical.image import ImageReceipt
from vlm_serve.clinical.pixels import load_decoders
from vlm_serve.config import DecodeLimits
from vlm_serve.errors import CorruptImageError, ImageError, ImageLimitError
from vlm_serve.serving.channel import Channel, ChannelClosedError, decode, encode, read_shared, write_shared


class Job(msgspec.Struct, frozen=True):
    """Decode the `size` bytes of the file descriptor that comes with this."""

    media_type: str
    size: int
    limits: DecodeLimits


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The worker has imported its decoders; the first message."""


class Decoded(msgspec.Struct, frozen=True, tag=True):
    """The pixels are in the file descriptor that comes with this: uint8 `[rows, columns, 3]` of the receipt."""

    receipt: ImageReceipt


class Refused(msgspec.Struct, frozen=True, tag=True):
    """`error` names a class of `errors.py` below `ImageError`."""

    error: str
    message: str


FromWorker = Ready | Decoded | Refused

UNEXPECTED = "The file cannot be decoded: it is damaged or breaks off. Send it again, or export it anew."


def main() -> None:
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    # A Ctrl-C or a service manager's stop reaches the whole group; it is for the server, which then closes
    # the channel.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump is a copy of a patient's image
    load_decoders()
    _close_output()
    with contextlib.suppress(ChannelClosedError):
        channel.send(encode(Ready()))
        while True:
            message, fds = channel.recv()
            _serve(channel, decode(message, Job), fds[0])


def _close_output() -> None:
    """From here on, what C libraries print about a file goes nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.dup2(null, sys.stderr.fileno())
    os.close(null)


def _serve(channel: Channel, job: Job, fd: int) -> None:
    try:
        with _limits(job.limits):
            try:
                data = bytearray(job.size)
                read_shared(fd, data)
            finally:
                os.close(fd)
            image = decode_file(memoryview(data), job.media_type, job.limits)
            pixels = write_shared(image.pixels.reshape(-1).data)
    except ImageError as error:
        answer = Refused(type(error).__name__, str(error))
    except MemoryError:
        answer = Refused(ImageLimitError.__name__, "Decoding the file needs more memory than one file may use.")
    except Exception:  # noqa: BLE001 - a foreign text may repeat the file; the pool gets a fixed one
        answer = Refused(CorruptImageError.__name__, UNEXPECTED)
    else:
        try:
            channel.send(encode(Decoded(image.receipt)), [pixels])
        finally:
            os.close(pixels)
        return
    channel.send(encode(answer))


@contextlib.contextmanager
def _limits(limits: DecodeLimits) -> Iterator[None]:
    """The kernel's limits for one file, over what the process has used until now.

    Past the memory, allocations fail; past the CPU time, the process is killed by SIGXCPU.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu_seconds = math.ceil(used.ru_utime + used.ru_stime) + limits.cpu_seconds
    _set_soft(resource.RLIMIT_CPU, cpu_seconds)
    _set_soft(resource.RLIMIT_AS, _address_space() + limits.memory_bytes)
    try:
        yield
    finally:
        _set_soft(resource.RLIMIT_AS, resource.RLIM_INFINITY)
        _set_soft(resource.RLIMIT_CPU, resource.RLIM_INFINITY)


def _set_soft(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    soft = value if hard == resource.RLIM_INFINITY else hard if value == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (soft, hard))


def _address_space() -> int:
    """Bytes of address space in use; 0 where the system does not say (the limit is then the whole process's)."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0


if __name__ == "__main__":
    main()
