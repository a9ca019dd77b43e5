"""`Run`: the answers to one prompt under way, as text, and `TokenDelta`, what a step adds to one of them."""

from dataclasses import dataclass, field

from vlm_serve.clinical.image import ImageReceipt
from vlm_serve.serving.detokenizer import Detokenizer
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
    first tokens.
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


@dataclass(slots=True)
class _Answer:
    """One of the `n` while it is made."""

    detokenizer: Detokenizer
    num_tokens: int = 0
    has_ended: bool = field(default=False)


class Run:
    """The `n` answers to one prompt: what is known before the first token, then the deltas as they come. One reader.

    It ends when all answers have. `prompt_logprobs` is set once the first delta has come, where they were asked for:
    an entry for each token of the prompt but the first.

    Iterating raises what `OutputStream` raises.
    """

    def __init__(
        self,
        request: Request,
        model: ServedModel,
        receipts: tuple[ImageReceipt, ...],
        outputs: OutputStream,
        token_bytes: TokenBytes,
    ) -> None:
        self.request_id = request.request_id
        self.model = model
        self.receipts = receipts
        self.image_digests = tuple(span.inputs.digest for span in request.images)
        self.prompt_token_ids = request.token_ids
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self._outputs = outputs
        self._token_bytes = token_bytes
        self._answers = [
            _Answer(Detokenizer(token_bytes.tokenizer, request.sampling)) for _ in range(request.sampling.n)
        ]
        self._cached_tokens: int | None = None

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, to the byte; a character may take several."""
        return self._token_bytes[token_id]

    def __aiter__(self) -> "Run":
        return self

    async def __anext__(self) -> TokenDelta:
        while True:
            output = await anext(self._outputs)
            answer = self._answers[output.index]
            if not answer.has_ended:  # else: on its way when a stop string was found
                return self._delta(answer, output)

    def _delta(self, answer: _Answer, output: TokenOutput) -> TokenDelta:
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
        if self._cached_tokens is None:
            self._cached_tokens = output.cached_tokens
        text = answer.detokenizer.add(output.token_ids, output.finish_reason, output.stop_token)
        answer.num_tokens += len(text.token_ids)
        if text.finish_reason is not None:
            answer.has_ended = True
            if output.finish_reason is None:  # a stop string, which the engine does not know of
                self._outputs.abort(output.index)
        total = sum(one.num_tokens for one in self._answers)
        return TokenDelta(
            index=output.index,
            text=text.text,
            token_ids=text.token_ids,
            finish_reason=text.finish_reason,
            stop_reason=text.stop_reason,
            usage=Usage(self.prompt_tokens, total, self._cached_tokens),
            logprobs=output.logprobs[: len(text.token_ids)],
            queue_seconds=output.queue_seconds,
            prefill_seconds=output.prefill_seconds,
        )

    async def aclose(self) -> None:
        """Aborts the answers that have not ended."""
        self._outputs.abort()
