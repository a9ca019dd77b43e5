"""The process that decodes files, one at a time: torch-free, killable, limited in memory and CPU time.

Started by `decode_pool.py` as `python -m vlm_serve.serving.decode_worker FD`. Whatever a file does to it,
nothing else notices. It ends when the pool closes its end of the channel.
"""

import contextlib
import os

import msgspec

from vlm_serve.clinical.decode import decode as decode_file
from vlm_serve.clinical.image import ImageReceipt
from vlm_serve.clinical.pixels import load_decoders
from vlm_serve.config import DecodeLimits
from vlm_serve.errors import CorruptImageError, ImageError, ImageLimitError
from vlm_serve.serving.channel import Channel, ChannelClosedError, decode, encode, read_shared, write_shared
from vlm_serve.serving.worker_process import close_output, limited, open_channel


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
    channel = open_channel()
    load_decoders()
    close_output()
    with contextlib.suppress(ChannelClosedError):
        channel.send(encode(Ready()))
        while True:
            message, fds = channel.recv()
            _serve(channel, decode(message, Job), fds[0])


def _serve(channel: Channel, job: Job, fd: int) -> None:
    try:
        with limited(job.limits.memory_bytes, job.limits.cpu_seconds):
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


if __name__ == "__main__":
    main()
