"""`POST /v1/chat/completions`: one conversation, its answer whole or as a stream of server-sent events."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from api.disconnect import ClientGoneError, while_connected
from api.errors import error_body, http_error, invalid_request
from api.metrics import Metrics
from api.openapi import CHAT_ANSWER, CHAT_REQUEST
from api.record import RequestRecord, record_of
from api.request_log import STOPPING
from api.responses import DONE, CompletionWriter, server_sent_event
from api.schemas import ChatCompletionRequest
from api.state import AppState, app_state
from api.wire import chat_input, sampling_params
from vlm_serve.errors import InvalidRequestError, RequestFailedError, ServiceError, VlmServeError
from vlm_serve.serving.async_llm import ChatRun, TokenDelta
from vlm_serve.types import ChatInput, FinishReason, JsonObject, SamplingParams

router = APIRouter()

CLIENT_CLOSED_REQUEST = 499
"""In the log, for a client that left before its answer (nginx's number); nobody is there to read it."""


@router.post(
    "/v1/chat/completions",
    responses=CHAT_ANSWER,
    openapi_extra=CHAT_REQUEST,
)
async def create_chat_completion(request: Request, state: Annotated[AppState, Depends(app_state)]) -> Response:
    """Answer a conversation; `stream` decides how."""
    record = record_of(request.scope)
    body = await _json_body(request)
    # Megabytes of base64 take time to parse and decode: off the event loop, so that streams go on.
    asked, chat, sampling = await asyncio.to_thread(_parse, body, state.config.max_images)
    record.facts |= {"stream": int(bool(asked.stream)), "images": len(chat.images)}
    answer = Answer(asked, state, record)
    try:
        run = await while_connected(
            request.receive,
            # The engine's id is the server's own: two clients may send the same X-Request-Id at once.
            state.llm.chat(chat, model=asked.model, sampling=sampling, request_id=uuid.uuid4().hex),
        )
        answer.admit(run)
        if asked.stream:
            return EventStream(answer, run)
        return JSONResponse(await while_connected(request.receive, answer.whole(run)))
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _json_body(request: Request) -> bytes:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # A web page may send other types to a local server without asking it first.
        raise InvalidRequestError("Send the header Content-Type: application/json.")
    return await request.body()


def _parse(body: bytes, max_images: int) -> tuple[ChatCompletionRequest, ChatInput, SamplingParams]:
    try:
        asked = ChatCompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise invalid_request(error) from None
    return asked, chat_input(asked, max_images=max_images), sampling_params(asked)


class Answer:
    """One answer on its way out, counted in the metrics and the log as it goes."""

    def __init__(self, asked: ChatCompletionRequest, state: AppState, record: RequestRecord) -> None:
        self._asked = asked
        self._state = state
        self._record = record
        self._created = int(time.time())

    @property
    def _metrics(self) -> Metrics:
        return self._state.metrics

    def admit(self, run: ChatRun) -> None:
        self._record.facts |= {"run": run.request_id, "model": run.model.id, "prompt_tokens": run.prompt_tokens}
        self._metrics.admitted(self._adapter(run), run.prompt_tokens)

    @staticmethod
    def _adapter(run: ChatRun) -> str:
        return run.model.id if run.model.parent is not None else ""

    async def _deltas(self, run: ChatRun) -> AsyncGenerator[TokenDelta, None]:
        """The run's deltas up to its end, each measured.

        Raises:
            RequestFailedError: the run ended in another way than by its own last token.
        """
        adapter, facts = self._adapter(run), self._record.facts
        previous: float | None = None
        async for delta in run:
            now = self._record.elapsed
            if delta.token_ids:
                if previous is None:
                    facts["ttft"] = now
                    self._metrics.first_tokens(adapter, now, len(delta.token_ids))
                else:
                    self._metrics.next_tokens(adapter, now - previous, len(delta.token_ids))
                previous = now
            facts |= {
                "completion_tokens": delta.usage.completion_tokens,
                "cached_tokens": delta.usage.cached_tokens,
            }
            if delta.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                break
            if delta.finish_reason is not None:
                facts["finish"] = delta.finish_reason.value
                self._metrics.finished(adapter, delta.finish_reason, now, delta.usage.completion_tokens)
            yield delta
            if delta.finish_reason is not None:
                return
        raise RequestFailedError("The server stopped this request before its end. Send it again.")

    async def whole(self, run: ChatRun) -> JsonObject:
        """The finished answer; cancelled, it aborts the run."""
        async with aclosing(run), aclosing(self._deltas(run)) as deltas:
            text: list[str] = []
            async for delta in deltas:
                text.append(delta.text)
                if delta.finish_reason is not None:
                    return self._writer(run).completion("".join(text), delta.finish_reason, delta.usage)
        raise AssertionError("a run's last delta has a finish reason")

    async def events(self, run: ChatRun) -> AsyncGenerator[JsonObject, None]:
        """The answer in chunks, role and `x_vlm_serve` first."""
        writer = self._writer(run)
        yield writer.first_chunk()
        async with aclosing(self._deltas(run)) as deltas:
            async for delta in deltas:
                if delta.text or delta.finish_reason is not None:
                    yield writer.text_chunk(delta.text, delta.finish_reason)
                if delta.finish_reason is not None and self._asked.include_usage:
                    yield writer.usage_chunk(delta.usage)

    def _writer(self, run: ChatRun) -> CompletionWriter:
        return CompletionWriter(run, self._state.base, self._created, include_usage=self._asked.include_usage)


class EventStream(Response):
    """Sends an answer's events as they come and aborts its run when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, run: ChatRun) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answer = answer
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = record_of(scope)
        try:
            await while_connected(receive, self._send_all(send, record))
        except ClientGoneError:
            record.status = CLIENT_CLOSED_REQUEST
        except asyncio.CancelledError:  # the server is told to stop at once
            if record.status is None:
                raise  # `RequestLog` answers
            record.facts["error"] = "shutdown"
            await self._send_event(send, server_sent_event(error_body(ServiceError(STOPPING))))
            await send({"type": "http.response.body", "body": b""})

    async def _send_all(self, send: Send, record: RequestRecord) -> None:
        """A failure midway is an event of its own, in the error form, and the last."""
        async with aclosing(self._run), aclosing(self._answer.events(self._run)) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            unexpected: Exception | None = None
            try:
                async for event in events:
                    await self._send_event(send, server_sent_event(event))
                await self._send_event(send, DONE)
            except VlmServeError as error:
                record.facts["error"] = http_error(error).code or "error"
                await self._send_event(send, server_sent_event(error_body(error)))
            except Exception as error:  # noqa: BLE001 – raised again below, once the client knows
                unexpected = error
                await self._send_event(send, server_sent_event(error_body(error)))
            await send({"type": "http.response.body", "body": b""})
            if unexpected is not None:
                raise unexpected

    @staticmethod
    async def _send_event(send: Send, event: bytes) -> None:
        await send({"type": "http.response.body", "body": event, "more_body": True})
