"""Tokens to text as they come, with stop strings found where the text is made."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from vlm_serve.types import FinishReason, SamplingParams

INVALID_PREFIX = "Invalid prefix encountered"
"""How `tokenizers` says that later bytes have undone a character that it had given out."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What some tokens add to the answer. `token_ids` are those that count: what came after a stop string is dropped,
    and so must the log-probabilities of the tokens beyond them be.

    `stop_reason` is the stop string that ended the answer, or the one of `stop_token_ids`; None for the model's own
    end.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None


class Detokenizer:
    """The text of one answer.

    A character whose bytes are not all there yet, and text that may be the beginning of a stop string, are
    held back until the next token decides. Of several stop strings the one that is complete first ends the answer,
    however the text is cut into tokens; what the first `min_tokens` tokens complete ends nothing.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._stop = sampling.stop_strings
        self._longest = max((len(stop) for stop in self._stop), default=0)
        self._stream = self._new_stream()
        self._pending_ids: list[int] = []
        self._held = ""
        self._num_tokens = 0

    def add(
        self, token_ids: Sequence[int], finish_reason: FinishReason | None, stop_token: int | None = None
    ) -> TextDelta:
        """The delta for the tokens of one step; these, `finish_reason` and `stop_token` are a `TokenOutput`'s.

        Its finish reason is `stop` once a stop string is found, whatever the engine said. The engine's own `stop`
        means that the last token is one that ends answers: it counts, and is text only with
        `include_stop_str_in_output`.
        """
        text, counted = "", []
        is_stopped = finish_reason is FinishReason.STOP
        for index, token_id in enumerate(token_ids):
            counted.append(token_id)
            self._num_tokens += 1
            is_end = is_stopped and index == len(token_ids) - 1
            if is_end and not self._sampling.include_stop_str_in_output:
                break
            length = len(self._held)
            self._held += self._decode(token_id)
            if not is_end and self._num_tokens > self._sampling.min_tokens and (found := self._find_stop(length)):
                start, stop = found
                end = start + len(stop) if self._sampling.include_stop_str_in_output else start
                return TextDelta(text + self._held[:end], tuple(counted), FinishReason.STOP, stop)
            ready = len(self._held) - self._held_back()
            text += self._held[:ready]
            self._held = self._held[ready:]
        if finish_reason is not None:
            text += self._held + self._decode_rest()
            self._held = ""
        stop_reason = stop_token if stop_token in (self._sampling.stop_token_ids or ()) else None
        return TextDelta(text, tuple(counted), finish_reason, stop_reason)

    def _new_stream(self) -> DecodeStream:
        return DecodeStream(skip_special_tokens=self._sampling.skip_special_tokens)

    def _decode(self, token_id: int) -> str:
        self._pending_ids.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception as error:  # the library has no class of its own for it
            if not str(error).startswith(INVALID_PREFIX):
                raise
            # Byte tokens that are no UTF-8 after others that were: those are out already; go on from here.
            text = self._decode_rest()
            self._stream = self._new_stream()
        if text is None:
            return ""
        self._pending_ids.clear()
        return text

    def _decode_rest(self) -> str:
        """An answer cut in the middle of a character ends with the replacement character, as `decode` has it."""
        skip = self._sampling.skip_special_tokens
        return self._tokenizer.decode(self._pending_ids, skip_special_tokens=skip) if self._pending_ids else ""

    def _find_stop(self, known: int) -> tuple[int, str] | None:
        """The stop string that is complete first, of those that end beyond the first `known` held characters, and
        where it begins; of two that end together the longer one.
        """
        found = [
            (start + len(stop), start, stop)
            for stop in self._stop
            if (start := self._held.find(stop, max(0, known - len(stop) + 1))) >= 0
        ]
        return min(found)[1:] if found else None

    def _held_back(self) -> int:
        """The length of the longest end of the held text that begins a stop string."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            ending = self._held[-length:]
            if any(stop.startswith(ending) for stop in self._stop):
                return length
        return 0
