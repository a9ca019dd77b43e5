"""`Run`: the answers to one prompt under way, as text, and `TokenDelta`, what a step adds to one of them.
`Deltas` makes these, for the offline class, too.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from vlm_serve.serving.detokenizer import Detokenizer
from vlm_serve.serving.ingest import PreparedPrompt
from vlm_serve.serving.served_model import ServedModel
from vlm_serve.serving.submission import OutputStream
from vlm_serve.serving.token_bytes import TokenBytes
from vlm_serve.types import FinishReason, Request, TokenLogprobs, TokenOutput


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens so far, of all answers of the request. `cached_tokens` of the prompt were found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """What one step adds to one answer; `index` says which of the request's `n`, `usage` is the running total.

    `stop_reason` is the stop string that ended the answer, or the one of `stop_token_ids`; None for the model's own
    end. `logprobs` has an entry for each of `token_ids` if they were asked for. The seconds come with an answer's
    first tokens. `starts_over` says that the engine has died and the request is run again: what came before of any of
    its answers is void.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    usage: Usage
    logprobs: tuple[TokenLogprobs, ...] = ()
    queue_seconds: float | None = None
    prefill_seconds: float | None = None
    starts_over: bool = False


@dataclass(slots=True)
class _Answer:
    """One of the `n` while it is made."""

    detokenizer: Detokenizer
    num_tokens: int = 0
    has_ended: bool = False


class Deltas:
    """What the engine adds to the `n` answers to one prompt, made text, and what it told of the prompt meanwhile.

    `prompt_logprobs` has an entry for each token of the prompt but the first, where they were asked for;
    `cached_tokens` of the prompt were found in the prefix cache. Both come with the first output.
    """

    def __init__(self, request: Request, token_bytes: TokenBytes) -> None:
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self.cached_tokens: int | None = None
        self._prompt_tokens = len(request.token_ids)
        before = request.token_ids if request.continues else ()
        self._answers = [_Answer(Detokenizer(token_bytes, request.sampling, before)) for _ in range(request.sampling.n)]

    @property
    def num_tokens(self) -> int:
        """Of all answers so far."""
        return sum(answer.num_tokens for answer in self._answers)

    def add(self, output: TokenOutput, abort: Callable[[int], None]) -> TokenDelta | None:
        """What one output adds; None for one that was on its way when a stop string was found.

        Args:
            abort: ends the answer of an index, of whose stop string the engine does not know.
        """
        answer = self._answers[output.index]
        if answer.has_ended:
            return None
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
        if self.cached_tokens is None:
            self.cached_tokens = output.cached_tokens
        text = answer.detokenizer.add(output.token_ids, output.finish_reason, output.stop_token)
        answer.num_tokens += len(text.token_ids)
        answer.has_ended = text.finish_reason is not None
        if answer.has_ended and output.finish_reason is None:
            abort(output.index)
        return TokenDelta(
            index=output.index,
            text=text.text,
            token_ids=text.token_ids,
            finish_reason=text.finish_reason,
            stop_reason=text.stop_reason,
            usage=Usage(self._prompt_tokens, self.num_tokens, self.cached_tokens),
            logprobs=output.logprobs[: len(text.token_ids)],
            queue_seconds=output.queue_seconds,
            prefill_seconds=output.prefill_seconds,
        )


class Run:
    """The `n` answers to one prompt: what is known before the first token, then the deltas as they come. One reader.

    It ends when all answers have. `prompt_logprobs` is set once the first delta has come, where they were asked for.

    Iterating raises what `OutputStream` raises.
    """

    def __init__(
        self,
        request: Request,
        model: ServedModel,
        prepared: PreparedPrompt,
        outputs: OutputStream,
        token_bytes: TokenBytes,
    ) -> None:
        self.request_id = request.request_id
        self.model = model
        self.receipts = prepared.receipts
        self.image_digests = prepared.image_digests
        self.prompt_token_ids = request.token_ids
        self._outputs = outputs
        self._token_bytes = token_bytes
        self._skips_special_tokens = request.sampling.skip_special_tokens
        self._new_deltas = partial(Deltas, replace(request, images=()), token_bytes)  # the tensors are not kept
        self._deltas = self._new_deltas()
        self._life = outputs.life

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprobs, ...]:
        """An entry for each token of the prompt but the first."""
        return self._deltas.prompt_logprobs

    @property
    def hidden_ids(self) -> frozenset[int]:
        """Tokens that are no text in an answer."""
        return self._token_bytes.special_ids if self._skips_special_tokens else frozenset()

    def withhold(self) -> None:
        """As `OutputStream.withhold`: a reader that does must heed `starts_over`."""
        self._outputs.withhold()

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, to the byte; a character may take several."""
        return self._token_bytes[token_id]

    def __aiter__(self) -> "Run":
        return self

    async def __anext__(self) -> TokenDelta:
        starts_over = False
        while True:
            output = await anext(self._outputs)
            if self._outputs.life != self._life:
                self._life, self._deltas, starts_over = self._outputs.life, self._new_deltas(), True
            if delta := self._deltas.add(output, self._outputs.abort):
                return replace(delta, starts_over=True) if starts_over else delta

    async def aclose(self) -> None:
        """Aborts the answers that have not ended."""
        self._outputs.abort()
