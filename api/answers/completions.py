"""Plain completions and their chunks, in OpenAI's older form."""

from collections.abc import Iterator, Sequence

from api.answers.base import Answer, Writer
from api.answers.logprobs import LegacyLogprobs, prompt_logprobs
from api.responses import AnsweredRun, usage_json
from api.schemas import CompletionRequest
from vlm_serve.serving.run import TokenDelta
from vlm_serve.serving.served_model import ServedModel
from vlm_serve.types import JsonObject, TokenLogprobs

KIND = "text_completion"


class TextWriter(Writer):
    """With vLLM's `stop_reason` and `prompt_logprobs`.

    Args:
        echoes: the text of each prompt, to stand before its answers; empty without `echo`.
    """

    def __init__(
        self,
        asked: CompletionRequest,
        echoes: Sequence[str],
        runs: Sequence[AnsweredRun],
        base: ServedModel,
        created: int,
    ) -> None:
        n = asked.n or 1
        super().__init__(runs, base, created, n)
        self._asked = asked
        self._echoes = [echoes[answer.index // n] if asked.echo else "" for answer in self.answers]
        self._logprobs = [LegacyLogprobs(answer.run, asked.logprobs or 0) for answer in self.answers]
        self._has_begun = [False] * len(self.answers)

    def whole(self) -> JsonObject:
        choices = [self._choice(answer, answer.text, answer.logprobs, is_first=True) for answer in self.answers]
        return self._head("cmpl", KIND) | {"choices": choices, "usage": usage_json(self.usage)}

    def begin(self) -> Iterator[JsonObject]:
        yield from ()

    def events(self, answer: Answer, delta: TokenDelta) -> Iterator[JsonObject]:
        is_first = not self._has_begun[answer.index]
        self._has_begun[answer.index] = True
        if delta.text or delta.logprobs or delta.finish_reason is not None or is_first:
            choice = self._choice(answer, delta.text, delta.logprobs, is_first=is_first)
            usage = {"usage": None} if self._asked.include_usage else {}
            yield self._head("cmpl", KIND) | {"choices": [choice]} | usage

    def end(self) -> Iterator[JsonObject]:
        if self._asked.include_usage:
            yield self._head("cmpl", KIND) | {"choices": [], "usage": usage_json(self.usage)}

    def _choice(self, answer: Answer, text: str, entries: Sequence[TokenLogprobs], *, is_first: bool) -> JsonObject:
        """`is_first` of its answer: with the prompt before it, where that is asked for."""
        choice: JsonObject = {
            "index": answer.index,
            "text": (self._echoes[answer.index] if is_first else "") + text,
            "logprobs": self._taken(answer, entries, is_first=is_first),
            **answer.ending,
        }
        count = self._asked.prompt_logprobs
        if is_first and count is not None:
            choice["prompt_logprobs"] = prompt_logprobs(answer.run, count)
        return choice

    def _taken(self, answer: Answer, entries: Sequence[TokenLogprobs], *, is_first: bool) -> JsonObject | None:
        if self._asked.logprobs is None:
            return None
        logprobs = self._logprobs[answer.index]
        if is_first and self._asked.echo:
            logprobs.add_prompt()
        logprobs.add(entries)
        return logprobs.take()
