"""The two files of a batch: requests a line, and answers a line, which a run that was cut off goes on with."""

import codecs
import fcntl
import os
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import mkstemp
from typing import Any, BinaryIO

import msgspec

from vlm_serve.errors import InvalidRequestError
from vlm_serve.types import JsonObject

ANSWER_ID = "batch_req_"
ANSWER_HEAD = f'{{"id":"{ANSWER_ID}'.encode()
"""How every line of ours begins."""

OK = 200
FIRST_OF_OURS = 500
"""Statuses from here on tell of our fault, not of the request's."""

ITS_OWNERS = 0o600
"""The mode of a new file of answers."""

SYNC_SECONDS = 1.0


class BatchLine(msgspec.Struct):
    """One line of the input, in OpenAI's form; `body` is the JSON text of the request itself."""

    custom_id: str
    method: Any = None
    url: Any = None
    body: msgspec.Raw = msgspec.Raw(b"null")


class _Response(msgspec.Struct):
    status_code: int


class _Answered(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    custom_id: str
    response: _Response
    error: msgspec.Raw


def read_ids(path: Path) -> list[str]:
    """The ids of all lines, in order.

    Raises:
        InvalidRequestError: the file cannot be read, a line of it is no request, or two have the same id.
    """
    seen: dict[str, int] = {}
    for number, line in _lines(path):
        try:
            custom_id = msgspec.json.decode(line, type=BatchLine).custom_id
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise InvalidRequestError(
                f"Line {number} of {path} is no request: a JSON object with custom_id, method, url and body."
            ) from None
        if custom_id in seen:
            raise InvalidRequestError(f"Lines {seen[custom_id]} and {number} of {path} have the same custom_id.")
        seen[custom_id] = number
    return list(seen)


def read_lines(path: Path) -> Iterator[BatchLine]:
    """The requests one by one, none of them kept; `read_ids` has read them before."""
    for _, line in _lines(path):
        yield msgspec.json.decode(line, type=BatchLine)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers. Editors on Windows put a byte-order mark before the first."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if text.strip():
                    yield number, text
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}.") from None


class AnswerFile:
    """The answers that are there, and those that are added. Each is handed to the system as it comes, and forced onto
    the disk with the next that comes `SYNC_SECONDS` after the last time, and at the end.
    """

    def __init__(self, file: BinaryIO, statuses: Mapping[str, int]) -> None:
        self._file = file
        self._synced = time.monotonic()
        self.answered = statuses.keys()
        """The ids of those that were there."""
        self.num_errors = sum(status != OK for status in statuses.values())
        """Lines of the file whose status is not 200, the added ones included."""

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator["AnswerFile"]:
        """What a kill or a power cut left of a line at the end is dropped, and so is a line whose fault was the
        engine's (5xx): its request is to be answered again. One run at a time may write to a file; a new one is for
        its owner's eyes only.

        Raises:
            InvalidRequestError: the file cannot be written, another run is writing to it, or it is no file of answers.
        """
        with ExitStack() as stack:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, ITS_OWNERS)
                file: BinaryIO = stack.enter_context(os.fdopen(descriptor, "r+b"))
                _lock(file, path)
                found = _read_answers(file, path)
                if found.failed:
                    file = stack.enter_context(_without_failed(file, path, found))
                else:
                    file.truncate(found.end)
                    file.seek(found.end)
                _sync(file)
                _sync_folder(path.resolve().parent)
            except OSError as error:
                raise InvalidRequestError(f"{path} cannot be written: {error.strerror}.") from None
            try:
                yield cls(file, found.statuses)
            finally:
                _sync(file)

    def add(self, custom_id: str, request_id: str, status: int, body: JsonObject) -> None:
        response = {"status_code": status, "request_id": request_id, "body": body}
        answer = {"id": f"{ANSWER_ID}{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": None}
        self._file.write(msgspec.json.encode(answer) + b"\n")
        self.num_errors += status != OK
        now = time.monotonic()
        if now < self._synced + SYNC_SECONDS:
            self._file.flush()
        else:
            _sync(self._file)
            self._synced = now


@dataclass(slots=True)
class _Found:
    """What a file of answers holds: the status by id, the numbers of the lines to be answered again, and of all whole
    lines how many there are and where they end, in bytes.
    """

    statuses: dict[str, int] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    num_lines: int = 0
    end: int = 0


def _read_answers(file: BinaryIO, path: Path) -> _Found:
    found, torn = _Found(), 0
    for number, line in enumerate(file, 1):
        try:
            answer = msgspec.json.decode(line, type=_Answered) if line.endswith(b"\n") else None
        except (msgspec.DecodeError, UnicodeDecodeError):
            answer = None
        if answer is None:
            # What was not yet on the disk when the power went reads as zeros.
            written, zeros, _ = line.partition(b"\0")
            is_cut = zeros or not line.endswith(b"\n")
            if not (is_cut and (written.startswith(ANSWER_HEAD) or ANSWER_HEAD.startswith(written))):
                raise _no_answers(path, number)
            torn = torn or number
            continue
        if torn:
            raise _no_answers(path, torn)  # in the middle, where no run was cut off
        found.num_lines, found.end = number, found.end + len(line)
        if answer.response.status_code >= FIRST_OF_OURS:
            found.failed.add(number)
        else:
            found.statuses[answer.custom_id] = answer.response.status_code
    return found


def _without_failed(file: BinaryIO, path: Path, found: _Found) -> BinaryIO:
    """The file anew; it takes the other's place, and lock, in one step."""
    path = path.resolve()  # what a link leads to, not the link
    descriptor, name = mkstemp(dir=path.parent, prefix=f".{path.name}.")
    fresh = os.fdopen(descriptor, "r+b")
    try:
        os.fchmod(descriptor, stat.S_IMODE(os.fstat(file.fileno()).st_mode))
        file.seek(0)
        for number, line in enumerate(islice(file, found.num_lines), 1):
            if number not in found.failed:
                fresh.write(line)
        _sync(fresh)
        fcntl.flock(fresh, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.replace(name, path)
    except BaseException:
        fresh.close()
        os.unlink(name)
        raise
    return fresh


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        is_ours = False
    else:
        # The run that had it may have put another in its place meanwhile.
        is_ours = os.path.samestat(os.fstat(file.fileno()), path.stat())
    if not is_ours:
        raise InvalidRequestError(f"Another run is writing to {path}. Wait for its end.")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """So that the name of a file in it is on the disk, too, where the file system does that."""
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def _no_answers(path: Path, number: int) -> InvalidRequestError:
    return InvalidRequestError(
        f"Line {number} of {path} is not an answer of a batch; it is left as it is. Choose another file."
    )
