"""Plain completions and their chunks, in OpenAI's older form."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from api.answers.base import Answer, Writer
from api.answers.logprobs import LegacyLogprobs, prompt_logprobs, prompt_text
from api.responses import AnsweredRun, usage_json
from api.schemas import CompletionRequest
from vlm_serve.serving.run import TokenDelta
from vlm_serve.serving.served_model import ServedModel
from vlm_serve.types import FinishReason, JsonObject, TokenLogprobs

KIND = "text_completion"


class TextWriter(Writer):
    """With vLLM's `stop_reason` and `prompt_logprobs`.

    Args:
        prompts: each as it was asked for, to stand before its answers where `echo` wants that.
    """

    def __init__(
        self,
        asked: CompletionRequest,
        prompts: Sequence[str | tuple[int, ...]],
        runs: Sequence[AnsweredRun],
        base: ServedModel,
        created: int,
    ) -> None:
        n = asked.n or 1
        super().__init__(runs, base, created, n)
        self._asked: CompletionRequest = asked
        echoes = [self._echo(prompt, run) for prompt, run in zip(prompts, runs, strict=True)] if asked.echo else []
        self._echoes = [echoes[answer.index // n] if asked.echo else "" for answer in self.answers]
        self._logprobs = [LegacyLogprobs(answer.run, asked.logprobs or 0) for answer in self.answers]
        self._has_begun = [False] * len(self.answers)

    def accept(self, prompt: int, delta: TokenDelta) -> Answer:
        return super().accept(prompt, self._asked_for(delta))

    def whole(self) -> JsonObject:
        choices = [self._choice(answer, answer.text, answer.logprobs, is_first=True) for answer in self.answers]
        return self._head("cmpl", KIND) | {"choices": choices, "usage": usage_json(self.usage)}

    def begin(self) -> Iterator[JsonObject]:
        yield from ()

    def events(self, answer: Answer, delta: TokenDelta) -> Iterator[JsonObject]:
        is_first = not self._has_begun[answer.index]
        self._has_begun[answer.index] = True
        delta = self._asked_for(delta)
        if delta.text or delta.logprobs or delta.finish_reason is not None or is_first:
            choice = self._choice(answer, delta.text, delta.logprobs, is_first=is_first)
            usage = {"usage": None} if self._asked.include_usage else {}
            yield self._head("cmpl", KIND) | {"choices": [choice]} | usage

    def end(self) -> Iterator[JsonObject]:
        if self._asked.include_usage:
            yield self._head("cmpl", KIND) | {"choices": [], "usage": usage_json(self.usage)}

    def _asked_for(self, delta: TokenDelta) -> TokenDelta:
        """Nothing but the end where no token was asked for: the prompt's log-probabilities come with a first one."""
        if self._asked.max_tokens != 0:
            return delta
        end = FinishReason.LENGTH if delta.finish_reason is not None else None
        return TokenDelta(delta.index, "", (), end, None, replace(delta.usage, completion_tokens=0))

    def _echo(self, prompt: str | tuple[int, ...], run: AnsweredRun) -> str:
        """The prompt as it was given; of one that came as token ids, or was cut, what its tokens stand for."""
        if isinstance(prompt, str) and (self._asked.truncate_prompt_tokens or math.inf) > run.prompt_tokens:
            return prompt
        text = prompt_text(run)
        return prompt if isinstance(prompt, str) and text.endswith(prompt) else text

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
            logprobs.add_prompt(self._echoes[answer.index])
        logprobs.add(entries)
        return logprobs.take()
