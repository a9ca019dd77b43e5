"""The nouns that cross processes: what a client asks, what the engine is given, what it gives back.

Plain frozen dataclasses of plain data and numpy arrays: they import no torch, so that the decode worker
stays small, and they travel as msgpack messages (`serving/channel.py`), never as pickles.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from vlm_serve.errors import InvalidRequestError

Role = str
"""`system`, `user` or `assistant`; the model's chat template has the last word."""


class FinishReason(StrEnum):
    """Why a request ended, in OpenAI's words; `abort` and `error` never reach a client as a finish reason."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when to stop. Names and defaults are vLLM's.

    `temperature` 0 is greedy. `top_k` 0 or -1 keeps every token. `stop` takes a string or several and
    keeps them as a tuple. A `seed` makes a request repeatable whatever else is in the batch.
    `max_tokens=None` means: as many as the context holds.

    Raises:
        InvalidRequestError: a value is out of its range; `param` names the field.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    ignore_eos: bool = False

    MAX_STOP_STRINGS = 16
    MAX_STOP_LENGTH = 256

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        if self.max_tokens is not None and not 1 <= self.max_tokens < 2**31:
            raise InvalidRequestError("max_tokens must be at least 1 and below 2**31.", param="max_tokens")
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 2):
            raise InvalidRequestError("temperature must be between 0 and 2.", param="temperature")
        if not 0 < self.top_p <= 1:
            raise InvalidRequestError("top_p must be above 0 and at most 1.", param="top_p")
        if not -1 <= self.top_k < 2**31:
            raise InvalidRequestError(
                "top_k must be at least 1 and below 2**31, or 0 or -1 for every token.", param="top_k"
            )
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise InvalidRequestError("seed must fit in 64 bits.", param="seed")
        if len(stop) > self.MAX_STOP_STRINGS:
            raise InvalidRequestError(f"At most {self.MAX_STOP_STRINGS} stop strings are allowed.", param="stop")
        if any(not 0 < len(text) <= self.MAX_STOP_LENGTH for text in stop):
            raise InvalidRequestError(
                f"A stop string must have between 1 and {self.MAX_STOP_LENGTH} characters.", param="stop"
            )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        assert isinstance(self.stop, tuple)
        return self.stop


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """One file as it was sent. `media_type` is a claim, checked against the bytes when they are decoded."""

    data: bytes
    media_type: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: Role
    content: tuple[TextPart | ImagePart, ...]


@dataclass(frozen=True, slots=True)
class ChatInput:
    """A conversation, free of any wire format."""

    messages: tuple[ChatMessage, ...]

    @property
    def images(self) -> list[tuple[str, ImagePart]]:
        """The image parts in the order in which the prompt shows them, each with its place in the request,
        such as `messages[0].content[1]`.
        """
        return [
            (f"messages[{row}].content[{column}]", part)
            for row, message in enumerate(self.messages)
            for column, part in enumerate(message.content)
            if isinstance(part, ImagePart)
        ]


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """One image as the vision encoder takes it: made by a family's processor, keyed by its content.

    `tensors` are unbatched (`pixel_values` is float32 `[3, H, W]`); `grid` is the encoder's token grid,
    rows first; `num_tokens` is the count of placeholders the image takes in the prompt.
    `digest` is the sha256 over names, dtypes, shapes and bytes of the tensors and over the grid: one CT in
    two windows is two images. Every cache of the engine is keyed by it.
    """

    tensors: Mapping[str, np.ndarray]
    grid: tuple[int, ...]
    num_tokens: int
    digest: str

    @classmethod
    def create(cls, tensors: Mapping[str, np.ndarray], grid: tuple[int, ...], num_tokens: int) -> "ImageInputs":
        sha = hashlib.sha256(repr((grid, num_tokens)).encode())
        contiguous = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
        for name, array in contiguous.items():
            sha.update(repr((name, array.dtype.str, array.shape)).encode())
            sha.update(array.data)
        return cls(contiguous, tuple(grid), num_tokens, sha.hexdigest())


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """The placeholders of one image in a prompt: `[offset, offset + inputs.num_tokens)`."""

    offset: int
    inputs: ImageInputs

    @property
    def end(self) -> int:
        return self.offset + self.inputs.num_tokens


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt on its way through the engine.

    `adapter` is the digest of the adapter's files, None for the base model. `cache_salt` is the server's
    word for the tenant: it goes into every cache key, so no tenant can hit another's entries.
    `eos_token_ids` end the answer unless `sampling.ignore_eos`.
    """

    request_id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    images: tuple[ImageSpan, ...] = ()
    adapter: str | None = None
    cache_salt: str = ""
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What one step of the engine adds to one request.

    `cached_tokens` counts the prompt's tokens found in the prefix cache;
    `error` is a message for the caller when `finish_reason` is `error`.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges and running totals of the engine since its start; `/metrics` exports them."""

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    mm_cache_queries: int = 0
    mm_cache_hits: int = 0
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step gives back: outputs by request, and the engine's figures after it."""

    outputs: tuple[TokenOutput, ...]
    stats: EngineStats = field(default_factory=EngineStats)


JsonObject = dict[str, Any]
