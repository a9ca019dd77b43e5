"""Responses, OpenAI's newer form of an answer, with the sequence of events that its clients build one from."""

import uuid
from collections.abc import Iterator
from typing import Any

from api.answers.base import Answer, Writer
from api.answers.logprobs import chat_logprobs
from api.errors import error_body
from api.responses import AnsweredRun
from api.schemas import ResponsesRequest
from vlm_serve.serving.run import TokenDelta
from vlm_serve.serving.served_model import ServedModel
from vlm_serve.types import FinishReason, JsonObject, TokenLogprobs


class ResponseWriter(Writer):
    """One message of text as the only item of the output."""

    DONE = b""

    def __init__(self, asked: ResponsesRequest, run: AnsweredRun, base: ServedModel, created: int) -> None:
        super().__init__([run], base, created)
        self._asked: ResponsesRequest = asked
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._number = 0

    def whole(self) -> JsonObject:
        (answer,) = self.answers
        is_cut = answer.finish_reason is FinishReason.LENGTH
        return self._response(
            "incomplete" if is_cut else "completed",
            output=[self._item("incomplete" if is_cut else "completed", [self._part()])],
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
            usage=self._usage(),
        )

    def begin(self) -> Iterator[JsonObject]:
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", []))
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield self._part_event("response.content_part.added", part=part)

    def events(self, answer: Answer, delta: TokenDelta) -> Iterator[JsonObject]:
        if delta.text or delta.logprobs:
            yield self._part_event(
                "response.output_text.delta", delta=delta.text, logprobs=self._logprobs(delta.logprobs)
            )

    def end(self) -> Iterator[JsonObject]:
        part, response = self._part(), self.whole()
        yield self._part_event("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
        yield self._part_event("response.content_part.done", part=part)
        yield self._event("response.output_item.done", output_index=0, item=response["output"][0])
        yield self._event(f"response.{response['status']}", response=response)

    def failure(self, error: Exception) -> JsonObject:
        shown = error_body(error)["error"]
        failed = self._response("failed", error={"code": shown["code"] or shown["type"], "message": shown["message"]})
        return self._event("response.failed", response=failed)

    def _event(self, kind: str, **content: Any) -> JsonObject:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **content}

    def _part_event(self, kind: str, **content: Any) -> JsonObject:
        return self._event(kind, item_id=self._item_id, output_index=0, content_index=0, **content)

    def _response(self, status: str, **content: Any) -> JsonObject:
        asked, (run,) = self._asked, self.runs
        form = asked.text.format if asked.text is not None else None
        response: JsonObject = {
            "id": f"resp_{run.request_id}",
            "object": "response",
            "created_at": self._created,
            "model": run.model.id,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "top_logprobs": asked.top_logprobs,
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}},
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "metadata": asked.metadata or {},
        }
        return response | content | self._about_images()

    def _item(self, status: str, parts: list[JsonObject]) -> JsonObject:
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": parts}

    def _part(self) -> JsonObject:
        (answer,) = self.answers
        logprobs = self._logprobs(answer.logprobs)
        return {"type": "output_text", "text": answer.text, "annotations": [], "logprobs": logprobs}

    def _logprobs(self, entries: tuple[TokenLogprobs, ...] | list[TokenLogprobs]) -> list[JsonObject]:
        return chat_logprobs(self.runs[0], entries, self._asked.top_logprobs or 0)

    def _usage(self) -> JsonObject:
        usage = self.usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
