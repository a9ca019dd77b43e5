"""Tokens to text as they come, with stop strings found where the text is made."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers.decoders import DecodeStream

from vlm_serve.serving.token_bytes import TokenBytes, begins_inside_a_character, num_unfinished
from vlm_serve.types import FinishReason, SamplingParams

INVALID_PREFIX = "Invalid prefix encountered"
"""How `tokenizers` says that later bytes have undone a character that it had given out."""


REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""Stands in decoded text for bytes that are no UTF-8."""

CONTEXTS = (8, 64, 512)
"""Tokens to look at: of ordinary text one is enough, of a character in single bytes four. Special ones may be none."""

MAX_DROPPED = 8
"""Tokens: what there is to look at is bounded, whatever a prompt ends in."""


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

    Args:
        before: the tokens of the text that the answer goes on with, none for an answer that is a text of its own.
            Decoders of SentencePiece's kind take the space off a text's first word alone. A character that they leave
            unfinished is the answer's.
    """

    def __init__(self, token_bytes: TokenBytes, sampling: SamplingParams, before: Sequence[int] = ()) -> None:
        self._tokenizer = token_bytes.tokenizer
        self._sampling = sampling
        self._stop = sampling.stop_strings
        self._longest = max((len(stop) for stop in self._stop), default=0)
        end = len(before) - num_unfinished([token_bytes[token] for token in before[-3:]])
        self._shown_ids = self._last_shown(token_bytes, before[:end])
        self._stream = self._new_stream()
        self._pending_ids: list[int] = []
        self._held = "".join(map(self._decode, before[end:]))
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

    def _last_shown(self, token_bytes: TokenBytes, before: Sequence[int]) -> list[int]:
        """Some of the last tokens, from the beginning of a character on, that are any text; none if there are none.

        What the stream is begun with must not end in U+FFFD, which it takes for a character that is not whole yet.
        """
        for size in CONTEXTS:
            last = list(before[-size:])
            while last and begins_inside_a_character(token_bytes[last[0]]):
                del last[0]
            for _ in range(MAX_DROPPED):
                text = self._decode_all(last)
                if not text.endswith(REPLACEMENT):
                    break
                del last[-1]
            if text and not text.endswith(REPLACEMENT):
                return last
        return []

    def _new_stream(self) -> DecodeStream:
        """One that goes on with what was shown last."""
        return DecodeStream(ids=self._shown_ids, skip_special_tokens=self._sampling.skip_special_tokens)

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
        if not text.endswith(REPLACEMENT):
            self._shown_ids = self._pending_ids
        self._pending_ids = []
        return text

    def _decode_rest(self) -> str:
        """An answer cut in the middle of a character ends with the replacement character, as `decode` has it."""
        return self._decode_all(self._pending_ids) if self._pending_ids else ""

    def _decode_all(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._sampling.skip_special_tokens)

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
