"""The rows of the batch that answer in a grammar: their masks are made on threads while the model runs.

What goes wrong with one grammar ends one request.
"""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property

import numpy as np

from vlm_serve.engine.batch import Failure, NewRow
from vlm_serve.engine.structured import AnswerMatcher, GrammarError, Structures

logger = logging.getLogger(__name__)

MAX_MASK_SECONDS = 10.0
"""What a step waits at the most. llguidance's own limits end a mask long before, unless the machine is overloaded."""

TOO_COMPLEX = Failure(
    "The structured output cannot go on: its schema or grammar is too complex here, or leaves no token of the model's. "
    "Simplify it.",
    param="structured_outputs",
)
TOO_LATE = Failure(
    "The structured output took too long to check. Simplify its schema or grammar, or send the request again."
)
FAULT = Failure("A fault in the structured output ended this request.")

_Place = tuple[AnswerMatcher, np.ndarray]
"""Where an answer is in its grammar, and what may come next there."""


class GrammarRows:
    """The grammars of the rows that have one.

    Args:
        load: makes what knows the vocabulary; called once, on a thread, when the first grammar comes.
    """

    def __init__(self, load: Callable[[], Structures]) -> None:
        self._load = load
        self._places: dict[int, Future[_Place]] = {}

    def __bool__(self) -> bool:
        return bool(self._places)

    def __contains__(self, row: int) -> bool:
        return row in self._places

    def start(self, new: NewRow) -> None:
        """Puts a new sequence on a row, with or without a grammar."""
        self._places.pop(new.row, None)
        if new.grammar is not None:
            loading = self._loading
            self._places[new.row] = self._threads.submit(_begin, loading, new, new.grammar)

    def masks(self, rows: Sequence[int]) -> tuple[dict[int, np.ndarray], dict[int, Failure]]:
        """What may come next in those of the rows that have a grammar: bool `[vocab]` by row, and by row why an answer
        cannot go on.
        """
        asked = {row: self._places[row] for row in rows if row in self._places}
        if asked:
            wait([self._loading])  # no fault of a request's
        wait(asked.values(), timeout=MAX_MASK_SECONDS)
        allowed: dict[int, np.ndarray] = {}
        failed: dict[int, Failure] = {}
        for row, future in asked.items():
            if not future.done():
                future.cancel()
                failed[row] = TOO_LATE
            elif (error := future.exception()) is None:
                allowed[row] = future.result()[1]
            elif isinstance(error, GrammarError):
                failed[row] = TOO_COMPLEX
            else:
                failed[row] = FAULT
                # No text of the exception: it may carry what a patient's answer held.
                logger.error("A mask of a structured output failed: %s", type(error).__name__)
        for row in failed:
            del self._places[row]
        return allowed, failed

    def advance(self, row: int, token: int) -> None:
        """Takes in the token drawn; the next mask is begun."""
        matcher, _ = self._places[row].result()
        self._places[row] = self._threads.submit(_advance, matcher, token)

    @cached_property
    def _loading(self) -> Future[Structures]:
        return self._threads.submit(self._load)

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="grammar")


def _begin(loading: Future[Structures], new: NewRow, grammar: str) -> _Place:
    matcher = AnswerMatcher(
        loading.result(),  # submitted before, so that it waits for no thread
        grammar,
        min_tokens=new.sampling.min_tokens,
        end_ids=(*new.eos_token_ids, *(new.sampling.stop_token_ids or ())),
        answer=new.token_ids[new.prompt_len :],
    )
    return matcher, matcher.mask()


def _advance(matcher: AnswerMatcher, token: int) -> _Place:
    matcher.advance(token)
    return matcher, matcher.mask()
