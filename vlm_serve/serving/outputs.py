"""What the offline class gives back, in vLLM's shapes, and how it grows from the engine's outputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from vlm_serve.clinical.image import ImageReceipt
from vlm_serve.serving.ingest import PreparedPrompt
from vlm_serve.serving.run import Deltas
from vlm_serve.serving.token_bytes import TokenBytes
from vlm_serve.types import FinishReason, Request, TokenLogprobs, TokenOutput


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability. `rank` is 1 for the likeliest; `decoded_token` is the token's own text, with U+FFFD
    for bytes that are no whole character.
    """

    logprob: float
    rank: int
    decoded_token: str


Position = Mapping[int, Logprob]
"""By token id: of the token that is there, then of the likeliest in order."""


@dataclass(slots=True)
class CompletionOutput:
    """One answer. `finish_reason` is `stop`, `length`, or `error` where a fault in the engine cut it short; `error`
    then says so. `stop_reason` is the stop string that ended it, or the one of `stop_token_ids`; None for the model's
    own end.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[Position] | None
    finish_reason: str | None
    stop_reason: int | str | None
    error: str | None


@dataclass(slots=True)
class RequestOutput:
    """The answers to one prompt, with the receipts of its images.

    `prompt` is the text as given, None for a conversation or token ids. `prompt_logprobs` has None for the prompt's
    first token, which nothing comes before. `notice` is what the model says of itself to be told with every answer
    about an image; `image_digests` are those of the images as the model saw them.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[Position | None] | None
    finished: bool
    num_cached_tokens: int
    receipts: tuple[ImageReceipt, ...]
    image_digests: tuple[str, ...]
    notice: str | None


@dataclass(slots=True)
class EmbeddingOutput:
    """A prompt's embedding: `hidden_size` numbers, of norm 1. Empty where a fault in the engine ended the request."""

    embedding: list[float]
    error: str | None

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """The embedding of one prompt."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool


@dataclass(slots=True)
class Answer:
    """One answer while it is made, and once it is."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    error_param: str | None = None


class Answers:
    """The `n` answers to a request while they are made, and once they are.

    `prompt` is the prompt's text where it was one.
    """

    def __init__(self, request: Request, prompt: str | None, prepared: PreparedPrompt, token_bytes: TokenBytes) -> None:
        self.request_id = request.request_id
        self.sampling = request.sampling
        self.prompt = prompt
        self.prompt_token_ids = request.token_ids
        self.receipts = prepared.receipts
        self.image_digests = prepared.image_digests
        self.answers = [Answer() for _ in range(self.sampling.n)]
        self._deltas = Deltas(request, token_bytes)
        self._token_bytes = token_bytes

    @property
    def has_ended(self) -> bool:
        return all(answer.finish_reason is not None for answer in self.answers)

    @property
    def num_tokens(self) -> int:
        return self._deltas.num_tokens

    @property
    def cached_tokens(self) -> int:
        return self._deltas.cached_tokens or 0

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprobs, ...]:
        return self._deltas.prompt_logprobs

    def add(self, output: TokenOutput, abort: Callable[[int], None]) -> None:
        """Takes in what one step adds to one answer. `abort` ends the answer of an index in the engine."""
        delta = self._deltas.add(output, abort)
        if delta is None:
            return
        answer = self.answers[delta.index]
        answer.text += delta.text
        answer.token_ids += delta.token_ids
        answer.logprobs += delta.logprobs
        answer.finish_reason, answer.stop_reason = delta.finish_reason, delta.stop_reason
        answer.error, answer.error_param = output.error, output.error_param

    def output(self, notice: str | None) -> RequestOutput:
        """In vLLM's shape. `notice` is what the model says of itself."""
        has_prompt_logprobs = self.sampling.prompt_logprobs is not None
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(self.prompt_token_ids),
            outputs=[self._completion(index, answer) for index, answer in enumerate(self.answers)],
            prompt_logprobs=[None, *map(self._position, self.prompt_logprobs)] if has_prompt_logprobs else None,
            finished=self.has_ended,
            num_cached_tokens=self.cached_tokens,
            receipts=self.receipts,
            image_digests=self.image_digests,
            notice=notice if self.receipts else None,
        )

    def _completion(self, index: int, answer: Answer) -> CompletionOutput:
        has_logprobs = self.sampling.logprobs is not None
        return CompletionOutput(
            index=index,
            text=answer.text,
            token_ids=answer.token_ids,
            cumulative_logprob=sum(entry.logprobs[0] for entry in answer.logprobs) if has_logprobs else None,
            logprobs=[self._position(entry) for entry in answer.logprobs] if has_logprobs else None,
            finish_reason=answer.finish_reason and answer.finish_reason.value,
            stop_reason=answer.stop_reason,
            error=answer.error,
        )

    def _position(self, entry: TokenLogprobs) -> Position:
        """The likeliest are ranked by their order."""
        own, *likeliest = entry.token_ids
        ranks = {token: rank for rank, token in enumerate(likeliest, 1)} | {own: entry.rank}
        values = dict(zip(entry.token_ids, entry.logprobs, strict=True))
        return {token: Logprob(value, ranks[token], self._text(token)) for token, value in values.items()}

    def _text(self, token_id: int) -> str:
        return self._token_bytes[token_id].decode(errors="replace")


class Pooled:
    """A request's embedding while it is made, and once it is."""

    def __init__(self, request: Request) -> None:
        self.request_id = request.request_id
        self.prompt_token_ids = request.token_ids
        self.embedding: np.ndarray | None = None
        self.error: str | None = None
        self.error_param: str | None = None
        self.has_ended = False
        self.num_tokens = 0

    def add(self, output: TokenOutput, abort: Callable[[int], None]) -> None:
        """As `Answers.add`; nothing ends it but the engine."""
        self.embedding, self.error, self.error_param = output.embedding, output.error, output.error_param
        self.has_ended = output.finish_reason is not None

    def output(self, notice: str | None) -> EmbeddingRequestOutput:
        """In vLLM's shape."""
        vector: list[float] = [] if self.embedding is None else self.embedding.tolist()
        outputs = EmbeddingOutput(vector, self.error)
        return EmbeddingRequestOutput(self.request_id, outputs, list(self.prompt_token_ids), self.has_ended)
