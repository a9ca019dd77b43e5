"""The tensors of a request's images, on their way to the engine process in shared memory and not in the message."""

import math
import os
from dataclasses import replace

import msgspec
import numpy as np

from vlm_serve.serving.channel import read_shared, write_shared
from vlm_serve.types import ImageSpan, Request

_ALIGNMENT = 64


class PlacedTensor(msgspec.Struct, frozen=True):
    """One tensor of the image of this number. They lie in this order, each aligned as any dtype wants it."""

    image: int
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def room(self) -> int:
        """Bytes up to the next."""
        return _padded(math.prod(self.shape) * np.dtype(self.dtype).itemsize)


def share_tensors(request: Request) -> tuple[Request, tuple[PlacedTensor, ...], int]:
    """The request without its tensors, what they are, and a file descriptor of memory without a name that holds them.

    The caller closes it.
    """
    named = [
        (number, name, np.ascontiguousarray(array))
        for number, span in enumerate(request.images)
        for name, array in span.inputs.tensors.items()
    ]
    fd = write_shared(*(piece for _, _, array in named for piece in _bytes_of(array)))
    places = tuple(PlacedTensor(number, name, array.dtype.str, array.shape) for number, name, array in named)
    return _with_tensors(request, [{} for _ in request.images]), places, fd


def restore_tensors(request: Request, places: tuple[PlacedTensor, ...], fd: int) -> Request:
    """The request as `share_tensors` was given it; closes `fd`.

    Raises:
        EOFError: the memory holds less.
    """
    tensors: list[dict[str, np.ndarray]] = [{} for _ in request.images]
    data = bytearray(sum(place.room for place in places))
    try:
        read_shared(fd, data)
    finally:
        os.close(fd)
    offset = 0
    for place in places:
        count = math.prod(place.shape)
        array = np.frombuffer(data, np.dtype(place.dtype), count, offset).reshape(place.shape)
        tensors[place.image][place.name] = array
        offset += place.room
    return _with_tensors(request, tensors)


def _bytes_of(array: np.ndarray) -> tuple[memoryview | bytes, bytes]:
    """The array's own, and what fills it up to the next."""
    own = array.reshape(-1).view(np.uint8).data if array.size else b""
    return own, bytes(_padded(array.nbytes) - array.nbytes)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _with_tensors(request: Request, tensors: list[dict[str, np.ndarray]]) -> Request:
    spans = zip(request.images, tensors, strict=True)
    images = tuple(ImageSpan(span.offset, replace(span.inputs, tensors=own)) for span, own in spans)
    return replace(request, images=images)
