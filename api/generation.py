"""Runs of the engine on their way out: counted, written whole or as server-sent events, ended when the client leaves.

Serves every endpoint that answers with text; a `Writer` knows the form.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from api.answers.base import Writer
from api.disconnect import ClientGoneError, while_connected
from api.errors import CLIENT_CLOSED_REQUEST, http_error
from api.gateway.keys import Identity
from api.metrics import RequestFigures
from api.record import RequestRecord, record_of
from api.request_log import STOPPING
from api.responses import server_sent_event
from api.state import AppState
from vlm_serve.errors import RequestFailedError, ServiceError, VlmServeError
from vlm_serve.serving.run import Run, TokenDelta
from vlm_serve.types import FinishReason, JsonObject


class Generation:
    """The runs of one request under way, until `close`. One reader.

    Args:
        runs: admitted ones, one for each prompt.
    """

    def __init__(self, runs: Sequence[Run], state: AppState, record: RequestRecord, identity: Identity) -> None:
        self.runs = runs
        self._record = record
        self._figures: list[RequestFigures] = []
        for run in runs:
            adapter = run.model.id if run.model.parent is not None else ""
            figures = state.metrics.request(adapter, identity.tenant)
            figures.admitted(run.prompt_tokens)
            self._figures.append(figures)
        record.facts |= {
            "run": runs[0].request_id,
            "model": runs[0].model.id,
            "prompt_tokens": sum(run.prompt_tokens for run in runs),
        }

    async def close(self) -> None:
        """Aborts what has not ended."""
        for run, figures in zip(self.runs, self._figures, strict=True):
            await run.aclose()
            figures.close()

    async def deltas(self, answers: int) -> AsyncGenerator[tuple[int, TokenDelta], None]:
        """The deltas of all runs up to the end of all `answers`, each measured, with its run's number.

        Where one `starts_over`, those of its run that came before are void.

        Raises:
            RequestFailedError: an answer ended in another way than by its own last token.
        """
        facts = self._record.facts
        of_each = answers // len(self.runs)
        left = [of_each] * len(self.runs)
        completion: dict[int, int] = {}
        cached: dict[int, int] = {}
        async with _merged(self.runs) as merged:
            async for number, delta in merged:
                if delta.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                    break
                if delta.starts_over:
                    left[number] = of_each
                now = self._record.elapsed
                if delta.token_ids:
                    facts.setdefault("ttft", now)
                self._figures[number].add(delta, now)
                completion[number] = delta.usage.completion_tokens
                cached[number] = delta.usage.cached_tokens
                facts |= {"completion_tokens": sum(completion.values()), "cached_tokens": sum(cached.values())}
                if delta.finish_reason is not None:
                    facts["finish"] = delta.finish_reason.value
                    left[number] -= 1
                yield number, delta
                if not any(left):
                    return
        raise RequestFailedError("The server stopped this request before its end. Send it again.")

    async def whole(self, writer: Writer) -> JsonObject:
        """The finished body; cancelled, it aborts the runs. An engine that dies meanwhile costs time and no more."""
        for run in self.runs:
            run.withhold()
        found: list[list[TokenDelta]] = [[] for _ in self.runs]
        try:
            async with aclosing(self.deltas(len(writer.answers))) as deltas:
                async for number, delta in deltas:
                    if delta.starts_over:
                        found[number].clear()
                    found[number].append(delta)
            return await asyncio.to_thread(_written, writer, found)
        finally:
            await self.close()

    async def events(self, writer: Writer) -> AsyncGenerator[JsonObject, None]:
        """The answers in events."""
        for event in writer.begin():
            yield event
        async with aclosing(self.deltas(len(writer.answers))) as deltas:
            async for number, delta in deltas:
                answer = writer.accept(number, delta)
                for event in writer.events(answer, delta):
                    yield event
        for event in writer.end():
            yield event


def _written(writer: Writer, found: Sequence[Sequence[TokenDelta]]) -> JsonObject:
    """The body of what each run gave."""
    for number, deltas in enumerate(found):
        for delta in deltas:
            writer.accept(number, delta)
    return writer.whole()


@asynccontextmanager
async def _merged(runs: Sequence[Run]) -> AsyncIterator[AsyncIterator[tuple[int, TokenDelta]]]:
    """The deltas of several runs as they come, each with the number of its run."""
    if len(runs) == 1:
        yield _numbered(runs[0])
        return
    arrivals: asyncio.Queue[tuple[int, TokenDelta] | BaseException | None] = asyncio.Queue(len(runs))

    async def pump(number: int, run: Run) -> None:
        try:
            async for delta in run:
                await arrivals.put((number, delta))
            await arrivals.put(None)
        except Exception as error:  # noqa: BLE001 – raised by the reader
            await arrivals.put(error)

    async def arriving() -> AsyncIterator[tuple[int, TokenDelta]]:
        running = len(runs)
        while running:
            arrival = await arrivals.get()
            if isinstance(arrival, BaseException):
                raise arrival
            if arrival is None:
                running -= 1
            else:
                yield arrival

    pumps = [asyncio.create_task(pump(number, run)) for number, run in enumerate(runs)]
    try:
        yield arriving()
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _numbered(run: Run) -> AsyncIterator[tuple[int, TokenDelta]]:
    async for delta in run:
        yield 0, delta


async def respond(generation: Generation, writer: Writer, receive: Receive, *, stream: bool) -> Response:
    """The answer to a request whose runs are admitted.

    Raises:
        ClientGoneError: nobody waits for it any more; the runs are aborted.
    """
    if stream:
        return EventStream(generation, writer)
    return JSONResponse(await while_connected(receive, generation.whole(writer)))


class EventStream(Response):
    """Sends an answer's events as they come and aborts its runs when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, writer: Writer) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation
        self._writer = writer

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
            await self._send_failure(send, ServiceError(STOPPING))
            await send({"type": "http.response.body", "body": b""})

    async def _send_all(self, send: Send, record: RequestRecord) -> None:
        """A failure midway is an event of its own, in the endpoint's form for errors, and the last."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._generation.close)
            events = await stack.enter_async_context(aclosing(self._generation.events(self._writer)))
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            unexpected: Exception | None = None
            try:
                async for event in events:
                    await self._send_event(send, server_sent_event(event))
                if self._writer.DONE:
                    await self._send_event(send, self._writer.DONE)
            except VlmServeError as error:
                record.facts["error"] = http_error(error).code or "error"
                await self._send_failure(send, error)
            except Exception as error:  # noqa: BLE001 – raised again below, once the client knows
                unexpected = error
                await self._send_failure(send, error)
            await send({"type": "http.response.body", "body": b""})
            if unexpected is not None:
                raise unexpected

    async def _send_failure(self, send: Send, error: Exception) -> None:
        await self._send_event(send, server_sent_event(self._writer.failure(error)))

    @staticmethod
    async def _send_event(send: Send, event: bytes) -> None:
        await send({"type": "http.response.body", "body": event, "more_body": True})
