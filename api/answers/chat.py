"""Chat completions and their chunks."""

from collections.abc import Iterator
from typing import Any

from api.answers.base import Answer, Writer
from api.answers.logprobs import chat_logprobs, prompt_logprobs
from api.responses import AnsweredRun, usage_json
from api.schemas import ChatCompletionRequest
from api.tools import CallArguments, CallBegin, CallParser, Piece, ToolCalling
from vlm_serve.serving.run import TokenDelta
from vlm_serve.serving.served_model import ServedModel
from vlm_serve.types import FinishReason, JsonObject, TokenLogprobs

KIND = "chat.completion"


class ChatWriter(Writer):
    """In OpenAI's form, with vLLM's `stop_reason` and `prompt_logprobs`."""

    def __init__(
        self,
        asked: ChatCompletionRequest,
        calling: ToolCalling | None,
        run: AnsweredRun,
        base: ServedModel,
        created: int,
    ) -> None:
        super().__init__([run], base, created, asked.n or 1)
        self._asked: ChatCompletionRequest = asked
        self._calling = calling
        self._parsers = [CallParser(calling) for _ in self.answers] if calling is not None else []
        self._has_begun = False

    def whole(self) -> JsonObject:
        body = self._head("chatcmpl", KIND) | {
            "choices": [self._choice(answer) for answer in self.answers],
            "usage": usage_json(self.usage),
        }
        return body | self._prompt_logprobs() | self._about_images()

    def _choice(self, answer: Answer) -> JsonObject:
        message: JsonObject = {"role": "assistant", "content": answer.text, "refusal": None}
        if self._calling is not None:
            pieces = list(self._parsers[answer.index].add(answer.text, is_last=True))
            text = "".join(piece for piece in pieces if isinstance(piece, str))
            calls = [piece for piece in pieces if isinstance(piece, CallBegin)]
            message["content"] = text if text or not calls else None
            if calls:
                message["tool_calls"] = [
                    _call(call) | {"function": {"name": call.name, "arguments": _arguments(pieces, call.index)}}
                    for call in calls
                ]
        return {
            "index": answer.index,
            "message": message,
            "logprobs": self._logprobs(answer, answer.logprobs),
            **self._ending(answer),
        }

    def begin(self) -> Iterator[JsonObject]:
        """The role, and `x_vlm_serve` for a request with images; sent before the first token is known."""
        for answer in self.answers:
            about = self._about_images() if answer.index == 0 else {}
            yield self._chunk(answer, {"role": "assistant", "content": ""}) | about

    def events(self, answer: Answer, delta: TokenDelta) -> Iterator[JsonObject]:
        extra = {} if self._has_begun else self._prompt_logprobs()
        self._has_begun = True
        shown: list[JsonObject] = []
        if self._calling is not None:
            pieces = self._parsers[answer.index].add(delta.text, is_last=delta.finish_reason is not None)
            shown += [_delta(piece) for piece in pieces]
        elif delta.text:
            shown.append({"content": delta.text})
        if not shown and (delta.finish_reason is not None or delta.logprobs or extra):
            shown.append({})
        for place, content in enumerate(shown):
            is_last = place == len(shown) - 1
            chunk = self._chunk(answer, content, delta.logprobs if place == 0 else (), is_last=is_last)
            yield chunk | (extra if place == 0 else {})

    def end(self) -> Iterator[JsonObject]:
        """The usage, in a chunk without a choice, for `stream_options.include_usage`."""
        if self._asked.include_usage:
            yield self._head("chatcmpl", f"{KIND}.chunk") | {"choices": [], "usage": usage_json(self.usage)}

    def _chunk(
        self,
        answer: Answer,
        delta: JsonObject,
        logprobs: tuple[TokenLogprobs, ...] = (),
        *,
        is_last: bool = False,
    ) -> JsonObject:
        """`is_last` of its step: then it may carry the answer's end."""
        ending = self._ending(answer) if is_last else {"finish_reason": None, "stop_reason": None}
        choice = {
            "index": answer.index,
            "delta": delta,
            "logprobs": self._logprobs(answer, logprobs) if logprobs else None,
            **ending,
        }
        # As OpenAI has it: every chunk names the usage that only the last one knows.
        usage = {"usage": None} if self._asked.include_usage else {}
        return self._head("chatcmpl", f"{KIND}.chunk") | {"choices": [choice]} | usage

    def _ending(self, answer: Answer) -> JsonObject:
        ending = answer.ending
        called = self._calling is not None and self._parsers[answer.index].num_calls > 0
        if called and not self._is_named and answer.finish_reason is FinishReason.STOP:
            ending["finish_reason"] = "tool_calls"
        return ending

    @property
    def _is_named(self) -> bool:
        """As OpenAI has it, a call that the request itself named ends with `stop`."""
        return self._calling is not None and self._calling.is_named

    def _logprobs(self, answer: Answer, entries: Any) -> JsonObject | None:
        if not self._asked.logprobs:
            return None
        return {"content": chat_logprobs(answer.run, entries, self._asked.top_logprobs or 0), "refusal": None}

    def _prompt_logprobs(self) -> JsonObject:
        count = self._asked.prompt_logprobs
        return {} if count is None else {"prompt_logprobs": prompt_logprobs(self.runs[0], count)}


def _call(call: CallBegin) -> JsonObject:
    return {"id": call.id, "type": "function"}


def _arguments(pieces: list[Piece], index: int) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, CallArguments) and piece.index == index)


def _delta(piece: Piece) -> JsonObject:
    if isinstance(piece, str):
        return {"content": piece}
    if isinstance(piece, CallBegin):
        call = {"index": piece.index, **_call(piece), "function": {"name": piece.name, "arguments": ""}}
    else:
        call = {"index": piece.index, "function": {"arguments": piece.text}}
    return {"tool_calls": [call]}
