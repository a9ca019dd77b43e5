"""Tokens to text as they come, with stop strings found where the text is made."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from vlm_serve.types import FinishReason


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What some tokens add to the answer. `token_ids` are those that count: what came after a stop string
    is dropped.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


class Detokenizer:
    """The text of one answer.

    A character whose bytes are not all there yet, and text that may be the beginning of a stop string, are
    held back until the next token decides.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._pending_ids: list[int] = []
        self._held = ""

    def add(self, token_ids: Sequence[int], finish_reason: FinishReason | None) -> TextDelta:
        """The delta for the tokens of one step. Its finish reason is `stop` once a stop string is found,
        whatever the engine said.

        The engine's own `stop` means that the last token is one that ends answers: it counts and is no text.
        """
        text, counted = "", []
        is_end = finish_reason is FinishReason.STOP
        for index, token_id in enumerate(token_ids):
            counted.append(token_id)
            if is_end and index == len(token_ids) - 1:
                break
            self._held += self._decode(token_id)
            if (cut := self._find_stop()) is not None:
                return TextDelta(text + self._held[:cut], tuple(counted), FinishReason.STOP)
            keep = self._held_back()
            text += self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]
        if finish_reason is not None:
            text += self._held + self._decode_rest()
            self._held = ""
        return TextDelta(text, tuple(counted), finish_reason)

    def _decode(self, token_id: int) -> str:
        self._pending_ids.append(token_id)
        text = self._stream.step(self._tokenizer, token_id)
        if text is None:
            return ""
        self._pending_ids.clear()
        return text

    def _decode_rest(self) -> str:
        """An answer cut in the middle of a character ends with the replacement character, as `decode` has it."""
        return self._tokenizer.decode(self._pending_ids, skip_special_tokens=True) if self._pending_ids else ""

    def _find_stop(self) -> int | None:
        """Where the earliest stop string in the held text begins."""
        found = [position for stop in self._stop if (position := self._held.find(stop)) >= 0]
        return min(found, default=None)

    def _held_back(self) -> int:
        """The length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            ending = self._held[-length:]
            if any(stop.startswith(ending) for stop in self._stop):
                return length
        return 0
