"""What the writers of answers share: the answers as they grow, their usage, and what each body begins with."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from api.errors import error_body
from api.responses import AnsweredRun, image_answer_json
from api.wire import Asked, name_field
from vlm_serve.errors import InputError
from vlm_serve.serving.run import TokenDelta, Usage
from vlm_serve.serving.served_model import ServedModel
from vlm_serve.types import FinishReason, JsonObject, TokenLogprobs


@dataclass(slots=True)
class Answer:
    """One answer of a request so far. `index` counts through the answers to all its prompts."""

    index: int
    run: AnsweredRun
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def add(self, delta: TokenDelta) -> None:
        self.texts.append(delta.text)
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason

    @property
    def ending(self) -> JsonObject:
        """The end of its choice, as vLLM has it: `stop_reason` is the stop string or token that ended it."""
        reason = self.finish_reason
        return {"finish_reason": reason and reason.value, "stop_reason": self.stop_reason}


class Writer(ABC):
    """Writes the answers of one request, whole or as events, in the form of one endpoint.

    Args:
        runs: one for each prompt, each with `n` answers.
        base: the model that adapters are of.
        created: seconds since 1970.
    """

    DONE: bytes = b"data: [DONE]\n\n"
    """The last event of a stream."""

    _asked: Asked
    """The request; each form of answers has its own."""

    def __init__(self, runs: Sequence[AnsweredRun], base: ServedModel, created: int, n: int = 1) -> None:
        self.runs = runs
        self._base = base
        self._created = created
        self.answers = [Answer(index, runs[index // n]) for index in range(len(runs) * n)]
        self._usages = [Usage(run.prompt_tokens, 0, 0) for run in runs]
        self._n = n

    def accept(self, prompt: int, delta: TokenDelta) -> Answer:
        """Adds to the answer it belongs to, which it returns."""
        answer = self.answers[prompt * self._n + delta.index]
        answer.add(delta)
        self._usages[prompt] = delta.usage
        return answer

    @property
    def usage(self) -> Usage:
        """Of all prompts so far."""
        return Usage(
            sum(usage.prompt_tokens for usage in self._usages),
            sum(usage.completion_tokens for usage in self._usages),
            sum(usage.cached_tokens for usage in self._usages),
        )

    @abstractmethod
    def whole(self) -> JsonObject:
        """The body, once all answers have ended."""

    @abstractmethod
    def begin(self) -> Iterator[JsonObject]:
        """The events before the first token."""

    @abstractmethod
    def events(self, answer: Answer, delta: TokenDelta) -> Iterator[JsonObject]:
        """The events of a delta that `accept` has added to the answer."""

    @abstractmethod
    def end(self) -> Iterator[JsonObject]:
        """The events after the last token."""

    def failure(self, error: Exception) -> JsonObject:
        """The event for a stream that breaks off."""
        if isinstance(error, InputError):
            name_field(error, self._asked)
        return error_body(error)

    def _head(self, prefix: str, kind: str) -> JsonObject:
        model = self.runs[0].model
        return {
            "id": f"{prefix}-{self.runs[0].request_id}",
            "object": kind,
            "created": self._created,
            "model": model.id,
            "system_fingerprint": model.digest[:16],
        }

    def _about_images(self) -> JsonObject:
        """`x_vlm_serve`, for an answer to images."""
        run = self.runs[0]
        return {"x_vlm_serve": image_answer_json(run, self._base)} if run.receipts else {}
