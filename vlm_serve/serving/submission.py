"""`Submission`: one request from when it is handed in to its last output, whichever engine process makes it.
`OutputStream` is its reader's side.
"""

import asyncio
from collections.abc import Callable

from vlm_serve.errors import InvalidRequestError, RequestFailedError, VlmServeError
from vlm_serve.types import FinishReason, Request, TokenOutput


class Submission:
    """A request, what came of it that is not read yet, and how it stands with the engine process.

    `request`, with the tensors of its images, is kept while it can be run again: until its reader has taken the first
    tokens, which may have left the server then, or to its end if the reader withholds them. `life` counts how often it
    was. The engine process has heard of it once it is admitted. A suspect is one that the process may have died of, in
    `deaths` so far; `deaths_alone` counts those that nobody else can have caused.
    """

    def __init__(self, request: Request) -> None:
        self.request: Request | None = request
        self.request_id = request.request_id
        self.num_answers = request.sampling.n
        self.unfinished = set(range(self.num_answers))
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_sent = False
        self.is_heard_of = False
        self.life = 0
        self.is_suspect = False
        self.deaths = 0
        self.deaths_alone = 0
        self._is_withheld = False
        self._num_tokens = 0
        self._num_tokens_at_death = 0
        self._inbox: asyncio.Queue[TokenOutput | VlmServeError] = asyncio.Queue()

    @property
    def has_started(self) -> bool:
        """Whether tokens of it may have left the server."""
        return self.request is None

    @property
    def has_outlived_its_death(self) -> bool:
        """Whether a suspect has got further than it was when the process died: another is at fault.

        Only the first time: two that end the process together, and not alone, would else do so for ever.
        """
        return self.deaths == 1 and self._num_tokens > self._num_tokens_at_death

    def withhold(self) -> None:
        """Its reader promises that nothing leaves the server before its end."""
        self._is_withheld = True

    def admit(self) -> None:
        """The engine process has taken it, perhaps not the first that did."""
        self.is_heard_of = True
        if not self.admitted.done():
            self.admitted.set_result(None)

    def put(self, output: TokenOutput) -> bool:
        """Takes an output in; True if it is the last of all answers."""
        if output.index not in self.unfinished:
            return False
        self._inbox.put_nowait(output)
        self._num_tokens += len(output.token_ids)
        if output.finish_reason is FinishReason.ERROR:
            self.unfinished.clear()
        elif output.finish_reason is not None:
            self.unfinished.discard(output.index)
        return not self.unfinished

    def fail(self, error: VlmServeError) -> None:
        """Ends it with an error, for whoever waits: for the admission, or for the next output."""
        if self.admitted.done():
            self._inbox.put_nowait(error)
        else:
            self.admitted.set_exception(error)
            self.admitted.exception()  # its waiter may have left

    def suspect(self, *, alone: bool) -> None:
        """The process has died, perhaps of this request; `alone`: of no other."""
        self.is_suspect = True
        self.deaths += 1
        self.deaths_alone += alone
        self._num_tokens_at_death = self._num_tokens

    def rewind(self) -> None:
        """Back to before it was sent: all that came is void and will come again."""
        while not self._inbox.empty():
            self._inbox.get_nowait()
        self._num_tokens = 0
        self.life += 1
        self.unfinished = set(range(self.num_answers))
        self.is_sent = self.is_heard_of = False

    async def take(self) -> TokenOutput:
        """The next output, while there is one to come: check `is_over` first.

        Raises:
            VlmServeError: what ended the request.
        """
        arrival = await self._inbox.get()
        if isinstance(arrival, VlmServeError):
            raise arrival
        if not self._is_withheld:
            self.request = None
        return arrival

    @property
    def is_over(self) -> bool:
        """All has come, and has been taken."""
        return not self.unfinished and self._inbox.empty()


class OutputStream:
    """The outputs of one request, in the order in which they are made, until all its answers have ended. One reader.

    Iterating raises:
        InvalidRequestError: what it asks for left no token that may come next.
        RequestFailedError: a fault ended the request.
        PoisonedRequestError: it ended the engine process, again.
        EngineDeadError: the engine process has died after the first tokens, or for good.
    """

    def __init__(self, submission: Submission, abort: Callable[[Submission, int | None], None]) -> None:
        self._submission = submission
        self._abort = abort
        self._has_ended = False

    @property
    def life(self) -> int:
        """How often the request has been run again: what was taken in an earlier life is void."""
        return self._submission.life

    def withhold(self) -> None:
        """The reader promises that nothing of the answers leaves the server before the last of them has ended. Until
        then the request is run again if the engine process dies. To be called before the first output is taken.
        """
        self._submission.withhold()

    def __aiter__(self) -> "OutputStream":
        return self

    async def __anext__(self) -> TokenOutput:
        if self._has_ended or self._submission.is_over:
            raise StopAsyncIteration
        try:
            output = await self._submission.take()
        except VlmServeError:
            self._has_ended = True
            raise
        if output.finish_reason is FinishReason.ERROR:
            self._has_ended = True
            if output.error_param is not None:
                raise InvalidRequestError(output.error or "The request cannot go on.", param=output.error_param)
            raise RequestFailedError(output.error or "The request failed.")
        return output

    def abort(self, index: int | None = None) -> None:
        """Ends the answer of this index, or all, and gives back what they hold in the engine."""
        if not self._has_ended:
            self._has_ended = index is None
            self._abort(self._submission, index)
