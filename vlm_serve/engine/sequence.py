"""An answer's run through the engine: what is computed, what is generated, what it holds; and what the answers of one
request have in common.
"""

import secrets
from dataclasses import dataclass, field, replace

from vlm_serve.engine.batch import ImageKey, TableEntry
from vlm_serve.engine.ngram import NgramIndex
from vlm_serve.types import FinishReason, ImageSpan, Request, TokenLogprobs, TokenOutput


@dataclass(slots=True, eq=False)
class RequestRun:
    """What the `n` answers of a request share.

    `arrival` counts requests, `arrived` and `started` are the clock's seconds at which it came and took its first row.
    `answers` are those that have not ended. `cached_tokens` of the prompt were found in the cache. `prompt_logprobs`
    are the entries that there are, from the prompt's second token on. It `has_spoken` once the first tokens of any
    answer have gone out.
    """

    arrival: int = 0
    arrived: float = 0.0
    started: float | None = None
    answers: list["Sequence"] = field(default_factory=list)
    cached_tokens: int | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    has_spoken: bool = False

    def take_prompt_logprobs(self, start: int, entries: tuple[TokenLogprobs, ...]) -> None:
        """Adds the entries that positions of the prompt from `start` on gave. Those computed again, after a preemption
        or by another answer, are there already.
        """
        self.prompt_logprobs.extend(entries[len(self.prompt_logprobs) - start :])

    def complete(self, output: TokenOutput, now: float) -> TokenOutput:
        """The output, with what is said once, with the first tokens of the request."""
        if self.has_spoken:
            return output
        assert self.started is not None
        self.has_spoken = True
        return replace(
            output,
            prompt_logprobs=tuple(self.prompt_logprobs),
            queue_seconds=self.started - self.arrived,
            prefill_seconds=now - self.started,
        )


@dataclass(slots=True, eq=False)
class Sequence:
    """The mutable side of one answer to a `Request`; `index` says which.

    `computed` tokens have their keys and values in the cache; `token_ids` are the prompt and the answer so
    far. `row` is its place in the batch while it runs. `block_hashes` grows with the full blocks of
    `token_ids` and never changes; `block_table` is what it holds of the cache now. A suspect was in a step
    that failed and has to pass one alone. `priority` is the request's until it has waited or given way too often;
    `preemptions` count how often it gave way to a better class.
    `slotless_steps` count those in which its adapter found no slot. `image_adapter` is the digest of its adapter if
    that changes the embeddings of images. It `is_long` once it has outgrown the first of a model's two sets of rotary
    frequencies.
    """

    request: Request
    max_tokens: int
    token_ids: list[int]
    draw: int
    priority: int
    index: int = 0
    run: RequestRun = field(default_factory=RequestRun)
    row: int | None = None
    adapter_slot: int | None = None
    computed: int = 0
    cached_tokens: int | None = None
    block_table: list[TableEntry] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    pinned_images: set[ImageKey] = field(default_factory=set)
    ngrams: NgramIndex | None = None
    preemptions: int = 0
    slotless_steps: int = 0
    image_adapter: str | None = None
    is_suspect: bool = False
    is_long: bool = False
    finish_reason: FinishReason | None = None
    stop_token: int | None = None

    @classmethod
    def create(cls, request: Request, max_tokens: int, *, index: int = 0, run: RequestRun | None = None) -> "Sequence":
        """The answer `index` to a request, in the run of its siblings or, without one, in its own."""
        seed = request.sampling.seed
        draw = secrets.randbits(64) if seed is None else (seed + index) % 2**64
        sequence = cls(request, max_tokens, list(request.token_ids), draw, request.priority, index, run or RequestRun())
        sequence.run.answers.append(sequence)
        return sequence

    @property
    def order(self) -> tuple[int, int]:
        """Who came first."""
        return self.run.arrival, self.index

    @property
    def prompt_len(self) -> int:
        return len(self.request.token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def remaining(self) -> int:
        """Tokens that are known and not yet computed."""
        return len(self.token_ids) - self.computed

    @property
    def awaits_sibling(self) -> bool:
        """Whether another answer is computing the prompt that this one can start on."""
        running = [sibling for sibling in self.run.answers if sibling.row is not None]
        return bool(running) and all(sibling.computed < sibling.prompt_len for sibling in running)

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether the prompt must be computed for its log-probabilities, though it may be in the cache."""
        asked = self.request.sampling.prompt_logprobs is not None
        return asked and len(self.run.prompt_logprobs) < self.prompt_len - 1

    @property
    def can_speculate(self) -> bool:
        """Whether tokens may be guessed ahead: those drawn must not depend on the ones drawn before them by more than
        the model's logits, and nothing but tokens be asked for.
        """
        sampling = self.request.sampling
        return (
            self.num_generated >= max(1, sampling.min_tokens)
            and self.remaining == 1
            and sampling.repetition_penalty == 1
            and sampling.presence_penalty == sampling.frequency_penalty == 0
            and sampling.logprobs is None
            and self.request.grammar is None
            and not self.request.bad_word_ids
        )

    def atomic_span_at(self, position: int) -> tuple[int, int] | None:
        """The span `[begin, end)` that attends both ways and that a cut before `position` would part."""
        if position >= self.prompt_len:
            return None
        return next(((begin, end) for begin, end in self.request.atomic_spans if begin < position < end), None)

    def chunk(self, start: int, room: int) -> int:
        """How many of the known tokens from `start` on a step with this room computes. A cut that would part a span
        moves to before it; if the span is what comes next, to behind it, past the room.
        """
        count = max(0, min(len(self.token_ids) - start, room))
        span = self.atomic_span_at(start + count) if count else None
        if span is None:
            return count
        begin, end = span
        return (begin if begin > start else end) - start

    def image_key(self, span: ImageSpan) -> ImageKey:
        return ImageKey(span.inputs.digest, self.request.cache_salt, self.image_adapter)

    def propose(self, limit: int) -> tuple[int, ...]:
        """A guess at its next tokens, at most `limit` of them."""
        if self.ngrams is None:
            spans = [(span.offset, span.end) for span in self.request.images]
            self.ngrams = NgramIndex(self.prompt_len + self.max_tokens, spans)
        return self.ngrams.propose(self.token_ids, limit)

    def extend(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Adds generated tokens up to the one that ends the answer, which `finish_reason` tells; returns them.

        The end-of-sequence token or stop token is part of the answer's tokens; the detokenizer leaves it out of the
        text.
        """
        for count, token_id in enumerate(token_ids, start=1):
            self._append(token_id)
            if self.finish_reason is not None:
                return token_ids[:count]
        return token_ids

    def _append(self, token_id: int) -> None:
        sampling = self.request.sampling
        self.token_ids.append(token_id)
        is_stop = token_id in (sampling.stop_token_ids or ()) or (
            not sampling.ignore_eos and token_id in self.request.eos_token_ids
        )
        if is_stop and self.num_generated >= sampling.min_tokens:
            self.finish_reason = FinishReason.STOP
            self.stop_token = token_id
        elif self.num_generated >= self.max_tokens:
            self.finish_reason = FinishReason.LENGTH
