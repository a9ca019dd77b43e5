"""The nouns that cross processes: what a client asks, what the engine is given, what it gives back.

Plain frozen dataclasses of plain data and numpy arrays: they import no torch, so that the decode worker
stays small, and they travel as msgpack messages (`serving/channel.py`), never as pickles.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from vlm_serve.errors import InvalidRequestError

Role = str
"""`system`, `user`, `assistant` or `tool`; the model's chat template has the last word."""


class FinishReason(StrEnum):
    """Why a request ended, in OpenAI's words; `abort` and `error` never reach a client as a finish reason."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class StructuredOutputs:
    """What an answer must match: exactly one of the fields. Names are vLLM's.

    `json` is a JSON schema, as text or as an object; `json_object` any JSON object; `regex` a regular expression that
    the whole answer matches; `choice` the texts it is one of; `grammar` a grammar in Lark's syntax.

    Raises:
        InvalidRequestError: none or several of them are given.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        if len(given) + self.json_object != 1:
            raise InvalidRequestError(
                "Give exactly one of json, json_object, regex, choice and grammar.", param="structured_outputs"
            )
        if self.choice is not None:
            object.__setattr__(self, "choice", tuple(self.choice))


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when to stop. Names and defaults are vLLM's.

    `temperature` 0 is greedy. `top_k` 0 or -1 keeps every token; `min_p` keeps those with at least this share of the
    most likely one's probability. `repetition_penalty` (CTRL, arXiv 1909.05858) sees prompt and answer,
    `presence_penalty` and `frequency_penalty` (OpenAI's) the answer alone. `logit_bias` is added to the logits of the
    tokens it names; `allowed_token_ids` leaves no others. A text of `bad_words` is not generated in the tokens that the
    tokenizer has for it at the start of a text or after a space; in others it still may be.
    `stop` takes a string or several, `stop_token_ids` end an answer as the end-of-sequence token does, which
    `ignore_eos` switches off; neither ends it before `min_tokens`. `max_tokens=None` means: as many as the context
    holds. `n` answers are made of one prompt. A `seed` makes a request repeatable whatever else is in the batch.
    `logprobs` and `prompt_logprobs` ask for log-probabilities of the tokens and of that many likeliest beside them;
    `truncate_prompt_tokens` keeps that many of the prompt's last tokens.

    Raises:
        InvalidRequestError: a value is out of its range; `param` names the field.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = ()
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    structured_outputs: StructuredOutputs | None = None

    MAX_N = 64
    MAX_STOP_STRINGS = 16
    MAX_STOP_LENGTH = 256
    MAX_TOKEN_IDS = 1024
    MAX_BAD_WORDS = 128
    MAX_LOGPROBS = 20

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        for name in ("stop_token_ids", "bad_words"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        for name, is_good, rule in _sampling_rules(self):
            if not is_good:
                raise InvalidRequestError(f"{name} must be {rule}.", param=name)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        assert isinstance(self.stop, tuple)
        return self.stop


def _sampling_rules(params: SamplingParams) -> Iterator[tuple[str, bool, str]]:
    """The name of each field, whether its value is good, and what it must be."""

    def within(value: float, low: float, high: float) -> bool:
        return math.isfinite(value) and low <= value <= high

    most = params.MAX_TOKEN_IDS
    bias, allowed = params.logit_bias or {}, params.allowed_token_ids
    yield "n", 1 <= params.n <= params.MAX_N, f"between 1 and {params.MAX_N}"
    yield "max_tokens", params.max_tokens is None or 1 <= params.max_tokens < 2**31, "at least 1 and below 2**31"
    yield (
        "min_tokens",
        0 <= params.min_tokens < 2**31 and (params.max_tokens is None or params.min_tokens <= params.max_tokens),
        "at least 0 and at most max_tokens",
    )
    yield "temperature", within(params.temperature, 0, 2), "between 0 and 2"
    yield "top_p", 0 < params.top_p <= 1, "above 0 and at most 1"
    yield "top_k", -1 <= params.top_k < 2**31, "at least 1 and below 2**31, or 0 or -1 for every token"
    yield "min_p", within(params.min_p, 0, 1), "between 0 and 1"
    penalty = params.repetition_penalty
    yield "repetition_penalty", within(penalty, 0, 2) and penalty > 0, "above 0 and at most 2"
    yield "presence_penalty", within(params.presence_penalty, -2, 2), "between -2 and 2"
    yield "frequency_penalty", within(params.frequency_penalty, -2, 2), "between -2 and 2"
    yield (
        "logit_bias",
        len(bias) <= most and all(token >= 0 and within(value, -100, 100) for token, value in bias.items()),
        f"at most {most} token ids with values between -100 and 100",
    )
    yield (
        "allowed_token_ids",
        allowed is None or (0 < len(allowed) <= most and min(allowed) >= 0),
        f"between 1 and {most} token ids",
    )
    words = params.bad_words or ()
    yield (
        "bad_words",
        len(words) <= params.MAX_BAD_WORDS and all(0 < len(word) <= params.MAX_STOP_LENGTH for word in words),
        f"at most {params.MAX_BAD_WORDS} texts of 1 to {params.MAX_STOP_LENGTH} characters",
    )
    yield "seed", params.seed is None or -(2**63) <= params.seed < 2**64, "a number of 64 bits"
    yield (
        "stop",
        len(params.stop_strings) <= params.MAX_STOP_STRINGS
        and all(0 < len(text) <= params.MAX_STOP_LENGTH for text in params.stop_strings),
        f"at most {params.MAX_STOP_STRINGS} texts of 1 to {params.MAX_STOP_LENGTH} characters",
    )
    ids = params.stop_token_ids or ()
    yield "stop_token_ids", len(ids) <= most and min(ids, default=0) >= 0, f"at most {most} token ids"
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        yield name, value is None or 0 <= value <= params.MAX_LOGPROBS, f"between 0 and {params.MAX_LOGPROBS}"
    kept = params.truncate_prompt_tokens
    yield "truncate_prompt_tokens", kept is None or 1 <= kept < 2**31, "at least 1 and below 2**31"


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """One file as it was sent. `media_type` is a claim, checked against the bytes when they are decoded."""

    data: bytes
    media_type: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that an answer asked to be called; `arguments` is a JSON object."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """`tool_calls` are those of an assistant's message; `tool_call_id` says whose result a message of a tool is."""

    role: Role
    content: tuple[TextPart | ImagePart, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class ChatInput:
    """A conversation, free of any wire format.

    `tools` are the functions that the model may call, in OpenAI's form. `continue_final_message` ends the prompt
    inside the last message, so that the answer goes on with it; else `add_generation_prompt` ends it with the cue
    for a new one. `template_kwargs` are further variables of the chat template, plain JSON values.
    """

    messages: tuple[ChatMessage, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

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
    `digest` is the sha256 over names, dtypes, shapes and bytes of the tensors and over all the rest: one CT in
    two windows is two images. Every cache of the engine is keyed by it.
    `attends_both_ways` says that in the decoder each of its tokens sees those after it, too, as in Gemma3: its span is
    atomic, all of it is computed in one step.
    """

    tensors: Mapping[str, np.ndarray]
    grid: tuple[int, ...]
    num_tokens: int
    digest: str
    attends_both_ways: bool = False

    @classmethod
    def create(
        cls,
        tensors: Mapping[str, np.ndarray],
        grid: tuple[int, ...],
        num_tokens: int,
        *,
        attends_both_ways: bool = False,
    ) -> "ImageInputs":
        sha = hashlib.sha256(repr((grid, num_tokens, attends_both_ways)).encode())
        contiguous = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
        for name, array in contiguous.items():
            sha.update(repr((name, array.dtype.str, array.shape)).encode())
            sha.update(array.data)
        return cls(contiguous, tuple(grid), num_tokens, sha.hexdigest(), attends_both_ways)


ImagePieces = tuple[str | ImageInputs, ...]
"""What stands in a prompt for one image: its inputs, several where it is cut into tiles or crops, and the text of the
model's own between them (`<row_1_col_1>`). The text is trusted: special tokens in it count.
"""


def image_digest(pieces: ImagePieces) -> str:
    """That of an image as the model sees it: its inputs' own, or over those of all its tiles."""
    digests = [piece.digest for piece in pieces if isinstance(piece, ImageInputs)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


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
    word for the tenant: it goes into every cache key, so no tenant can hit another's entries; `tenant` is whom the
    scheduler is fair to. A lower `priority` goes first, 0 is routine.
    `eos_token_ids` end the answer unless `sampling.ignore_eos`. `bad_word_ids` are the token sequences of
    `sampling.bad_words`, `grammar` is `sampling.structured_outputs` as llguidance takes it.
    `pooling` asks for the prompt's embedding and no answer. `continues` says that an answer goes on with the prompt's
    text; else it is a text of its own, a new message.
    The first `both_ways_prefix` tokens see each other, whichever comes first, as PaliGemma's images and question do.
    """

    request_id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    images: tuple[ImageSpan, ...] = ()
    adapter: str | None = None
    cache_salt: str = ""
    tenant: str = ""
    priority: int = 0
    eos_token_ids: tuple[int, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    grammar: str | None = None
    pooling: bool = False
    continues: bool = False
    both_ways_prefix: int = 0

    @property
    def atomic_spans(self) -> tuple[tuple[int, int], ...]:
        """The tokens `[begin, end)` that attend both ways, span by span: each is computed in one step."""
        prefix = self.both_ways_prefix
        images = [
            (span.offset, span.end) for span in self.images if span.inputs.attends_both_ways and span.offset >= prefix
        ]
        return ((0, prefix), *images) if prefix else tuple(images)

    @property
    def longest_atomic_span(self) -> int:
        """The most tokens that have to be computed in one step."""
        return max((end - begin for begin, end in self.atomic_spans), default=0)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probabilities at one position: of the token that is there, first, then of the likeliest in order.

    They are of the model's own distribution, before penalties, bias and temperature. `rank` is that of the first, 1
    for the likeliest.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    rank: int


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What one step of the engine adds to one answer of a request; `index` says which of its `n`.

    `logprobs` has an entry for each of `token_ids` if they were asked for. `prompt_logprobs` comes once, with the
    first tokens, an entry for each token of the prompt but the first. `embedding` is float32 `[hidden_size]` of norm 1,
    for a request that pools. `stop_token` is the token that ended the answer, where one did. `cached_tokens` counts
    the prompt's tokens found in the prefix cache. `queue_seconds` and `prefill_seconds` come with the first tokens.
    `error` is a message for the caller when `finish_reason` is `error`; `error_param` is the field of the request that
    is to blame, None where the server is.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    error: str | None = None
    error_param: str | None = None
    index: int = 0
    stop_token: int | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    embedding: np.ndarray | None = None
    queue_seconds: float | None = None
    prefill_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges and running totals of the engine since its start; `/metrics` exports them.

    A request runs while any of its answers has a row, else it waits.
    `kv_tokens_live` of the `kv_tokens_allocated` places in blocks that sequences hold have keys and values in them.
    """

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    mm_cache_queries: int = 0
    mm_cache_hits: int = 0
    num_preemptions: int = 0
    kv_tokens_live: int = 0
    kv_tokens_allocated: int = 0
    spec_draft_tokens: int = 0
    spec_accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step gives back: outputs by request, and the engine's figures after it.

    `num_tokens` were computed in it and `images_encoded` images, which took `encoder_seconds`.
    """

    outputs: tuple[TokenOutput, ...]
    stats: EngineStats = field(default_factory=EngineStats)
    num_tokens: int = 0
    images_encoded: int = 0
    encoder_seconds: float = 0.0


JsonObject = dict[str, Any]
