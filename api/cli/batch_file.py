"""The two files of a batch: requests a line, and answers a line, which a run that was cut off goes on with."""

import fcntl
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from vlm_serve.errors import InvalidRequestError
from vlm_serve.types import JsonObject

ANSWER_ID = "batch_req_"
ANSWER_HEAD = f'{{"id":"{ANSWER_ID}'.encode()
"""How every line of ours begins."""


class BatchLine(msgspec.Struct):
    """One line of the input, in OpenAI's form; `body` is the JSON text of the request itself."""

    custom_id: str
    method: Any = None
    url: Any = None
    body: msgspec.Raw = msgspec.Raw(b"null")


class _Answered(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    custom_id: str
    response: msgspec.Raw
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
    """The lines that are not blank, with their numbers."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}.") from None


class AnswerFile:
    """The answers that are there, and those that are added. Each is handed to the system as it comes."""

    def __init__(self, file: BinaryIO, answered: frozenset[str]) -> None:
        self._file = file
        self.answered = answered
        """The ids of those that were there."""

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator["AnswerFile"]:
        """Of a run that was killed, the half line at the end is dropped. One run at a time may write to a file.

        Raises:
            InvalidRequestError: the file cannot be written, another run is writing to it, or it is no file of answers.
        """
        try:
            file = path.open("r+b" if path.exists() else "x+b")
        except OSError as error:
            raise InvalidRequestError(f"{path} cannot be written: {error.strerror}.") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InvalidRequestError(f"Another run is writing to {path}. Wait for its end.") from None
            answered, end = _read_answers(file, path)
            file.truncate(end)
            file.seek(end)
            yield cls(file, answered)

    def add(self, custom_id: str, request_id: str, status: int, body: JsonObject) -> None:
        response = {"status_code": status, "request_id": request_id, "body": body}
        answer = {"id": f"{ANSWER_ID}{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": None}
        self._file.write(msgspec.json.encode(answer) + b"\n")
        self._file.flush()


def _read_answers(file: BinaryIO, path: Path) -> tuple[frozenset[str], int]:
    """The ids answered, and where the last whole line ends."""
    answered, end = set(), 0
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            if line.startswith(ANSWER_HEAD) or ANSWER_HEAD.startswith(line):
                break  # its run was killed as it wrote
            raise _no_answers(path, number)
        try:
            answered.add(msgspec.json.decode(line, type=_Answered).custom_id)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise _no_answers(path, number) from None
        end += len(line)
    return frozenset(answered), end


def _no_answers(path: Path, number: int) -> InvalidRequestError:
    return InvalidRequestError(
        f"Line {number} of {path} is not an answer of a batch; it is left as it is. Choose another file."
    )
