"""How our processes talk: length-prefixed messages and file descriptors over a Unix stream socket.

Serves the engine client, the engine process, the decode pool and its workers. Messages are msgpack; a
pickle never crosses, so bytes from another process cannot run code in this one.
"""

import array
import contextlib
import functools
import os
import select
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import msgspec
import numpy as np

from vlm_serve.errors import ServiceError

T = TypeVar("T")

_HEADER = struct.Struct("<Q")
_MAX_FDS = 16
_MAX_MESSAGE = 2**31
_NUMERIC_KINDS = "biufc"


class ChannelClosedError(ServiceError):
    """The other process has closed its end, or has died."""


class Channel:
    """One end of a socket pair that carries whole messages, each with up to 16 file descriptors.

    Any thread may send; one thread receives. `max_message` is in bytes: a longer one ends the channel,
    so that a process that handles hostile input cannot make this one allocate at will.
    """

    def __init__(self, sock: socket.socket, *, max_message: int = _MAX_MESSAGE) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._max_message = max_message
        self._send_lock = threading.Lock()

    def send(self, payload: bytes, fds: Sequence[int] = ()) -> None:
        """Sends one message. The other process gets its own copies of `fds`; the caller keeps these.

        Raises:
            ChannelClosedError: nobody is left to read it.
        """
        header = _HEADER.pack(len(payload))
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            with self._send_lock:
                sent = self._sock.sendmsg([header, payload], ancillary)
                if sent < len(header):
                    self._sock.sendall(header[sent:])
                    sent = len(header)
                if sent < len(header) + len(payload):
                    self._sock.sendall(memoryview(payload)[sent - len(header) :])
        except OSError:
            raise ChannelClosedError("The process at the other end is gone.") from None

    def recv(self, timeout: float | None = None) -> tuple[bytes, list[int]]:
        """Waits for one message; returns it with its file descriptors, which the caller has to close.

        Args:
            timeout: seconds until the whole message must be here; None waits for ever.

        Raises:
            ChannelClosedError: the other end is closed, or sent more than a message may have.
            TimeoutError: the message is not here in time; the channel is of no use after that.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        fds: list[int] = []
        try:
            (length,) = _HEADER.unpack(self._recv_exactly(_HEADER.size, deadline, fds))
            if length > self._max_message:
                raise ChannelClosedError("The process at the other end sent an oversized message.")
            return bytes(self._recv_exactly(length, deadline, fds)), fds
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    def close(self) -> None:
        """Closes this end and wakes a thread that waits in `recv`. May be called more than once."""
        with contextlib.suppress(OSError):  # the other end may have been faster
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _recv_exactly(self, size: int, deadline: float | None, fds: list[int]) -> bytearray:
        buffer = bytearray(size)
        view, done = memoryview(buffer), 0
        ancillary_size = socket.CMSG_SPACE(_MAX_FDS * struct.calcsize("i"))
        while done < size:
            self._wait_readable(deadline)
            try:
                count, ancillary, _, _ = self._sock.recvmsg_into([view[done:]], ancillary_size, _CLOSE_ON_EXEC)
            except OSError:
                count, ancillary = 0, []
            for level, kind, data in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    whole = len(data) - len(data) % struct.calcsize("i")
                    fds.extend(array.array("i", data[:whole]))
            if count == 0:
                raise ChannelClosedError("The process at the other end is gone.")
            done += count
        return buffer

    def _wait_readable(self, deadline: float | None) -> None:
        if deadline is None:
            return
        poll = select.poll()
        try:
            poll.register(self._sock, select.POLLIN)
        except ValueError:  # closed on this side meanwhile
            raise ChannelClosedError("The channel is closed.") from None
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError


_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


def encode(obj: object) -> bytes:
    """A message of msgspec structs, dataclasses, plain data, paths and numpy arrays.

    An array travels as dtype, shape and bytes.

    Raises:
        TypeError: something else is in it, an array of Python objects among them.
    """
    return _ENCODER.encode(obj)


@overload
def decode(data: bytes, type: type[T]) -> T: ...
@overload
def decode(data: bytes, type: Any) -> Any: ...
def decode(data: bytes, type: Any) -> Any:
    """The object of `type` that `encode` made `data` from. Arrays come out writeable and on their own memory.

    Raises:
        msgspec.ValidationError: the message is not of that type.
    """
    return _decoder(type).decode(data)


def _to_plain(value: object) -> object:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in _NUMERIC_KINDS:
            raise TypeError(f"An array of dtype {value.dtype} cannot cross to another process; send numbers.")
        return value.dtype.str, value.shape, np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"A {type(value).__name__} cannot cross to another process.")


def _from_plain(expected: type, value: Any) -> object:
    if expected is np.ndarray:
        dtype_name, shape, data = value
        dtype = np.dtype(dtype_name)
        if dtype.kind not in _NUMERIC_KINDS:
            raise ValueError("only arrays of numbers are accepted")
        return np.frombuffer(bytearray(data), dtype).reshape(shape)
    if expected is Path:
        return Path(value)
    raise NotImplementedError(f"no rule to decode {expected}")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_to_plain)


@functools.cache
def _decoder(type: Any) -> "msgspec.msgpack.Decoder[Any]":
    return msgspec.msgpack.Decoder(type, dec_hook=_from_plain)


def spawn(module: str, sock: socket.socket, *, env: Mapping[str, str] | None = None) -> "subprocess.Popen[bytes]":
    """Starts `python -m module FD`, FD being the child's number for `sock`; the caller closes its own copy.

    By `subprocess`, never `multiprocessing`: a user's script needs no `if __name__ == "__main__"`, and no
    pickle is involved. The child imports what this process would import, but never from the current
    folder (`-P`): a file that lies there must not become a module. It learns from the closed socket that
    its parent is gone; `PR_SET_PDEATHSIG` would kill it with the *thread* that started it.

    Args:
        env: set in the child's environment over this process's.
    """
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *(path for path in sys.path if path and path != root)]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, str(sock.fileno())],
        pass_fds=[sock.fileno()],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(env or {})},
    )


def write_shared(*pieces: bytes | memoryview) -> int:
    """Memory without a name that holds `pieces` end to end, as a file descriptor for `Channel.send`.

    Nothing of it outlives the processes that hold it, however they end. The caller closes it.
    """
    if sys.platform == "linux":
        fd = os.memfd_create("vlm-serve", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    try:
        start = 0
        for piece in pieces:
            view, done = memoryview(piece).cast("B"), 0
            while done < len(view):
                done += os.pwrite(fd, view[done:], start + done)
            start += done
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_shared(fd: int, out: bytearray | memoryview) -> None:
    """Fills `out` from the start of `fd`. It copies: memory that another process can still shrink is not mapped.

    Raises:
        EOFError: `fd` holds less.
    """
    view, done = memoryview(out).cast("B"), 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], done)
        if count == 0:
            raise EOFError("the shared memory is shorter than announced")
        done += count
