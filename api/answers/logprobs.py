"""Log-probabilities on the wire: OpenAI's two forms, and vLLM's for those of a prompt."""

import codecs
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from api.responses import AnsweredRun
from vlm_serve.serving.token_bytes import num_unfinished
from vlm_serve.types import JsonObject, TokenLogprobs

UTF_8 = codecs.getincrementaldecoder("utf-8")

LEAST = -9999.0
"""Stands for minus infinity, which JSON does not know; OpenAI's number."""


def _finite(value: float) -> float:
    return value if math.isfinite(value) else LEAST


def _text(run: AnsweredRun, token_id: int) -> str:
    return run.token_bytes(token_id).decode("utf-8", "replace")


def _token(run: AnsweredRun, token_id: int, logprob: float) -> JsonObject:
    encoded = run.token_bytes(token_id)
    return {"token": encoded.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(encoded)}


def chat_logprobs(run: AnsweredRun, entries: Iterable[TokenLogprobs], top: int) -> list[JsonObject]:
    """The form of chats: each token with its bytes and the `top` likeliest at its place."""
    return [
        _token(run, entry.token_ids[0], entry.logprobs[0])
        | {
            "top_logprobs": [
                _token(run, token_id, logprob)
                for token_id, logprob in zip(entry.token_ids[1 : top + 1], entry.logprobs[1 : top + 1], strict=True)
            ]
        }
        for entry in entries
    ]


def prompt_logprobs(run: AnsweredRun, count: int) -> list[JsonObject | None]:
    """vLLM's form: for each token of the prompt its own and the `count` likeliest, by id; none for the first."""

    def entry(found: TokenLogprobs) -> JsonObject:
        shown: JsonObject = {}
        for place, (token_id, logprob) in enumerate(zip(found.token_ids, found.logprobs, strict=True)):
            if place <= count and str(token_id) not in shown:
                rank = found.rank if place == 0 else place
                shown[str(token_id)] = {
                    "logprob": _finite(logprob),
                    "rank": rank,
                    "decoded_token": _text(run, token_id),
                }
        return shown

    return [None, *(entry(found) for found in run.prompt_logprobs)]


def prompt_text(run: AnsweredRun) -> str:
    """What the prompt's tokens stand for, special ones included; not a character left for the answer to finish."""
    pieces = [run.token_bytes(token_id) for token_id in run.prompt_token_ids]
    return b"".join(pieces[: len(pieces) - num_unfinished(pieces)]).decode("utf-8", "replace")


@dataclass
class LegacyLogprobs:
    """The form of plain completions: four lists side by side. `offset` is that of the next token in the text: of one
    that begins inside a character, the character's.
    """

    run: AnsweredRun
    top: int
    offset: int = 0
    characters: codecs.IncrementalDecoder = field(default_factory=lambda: UTF_8("replace"))
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[JsonObject | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add_prompt(self, text: str) -> None:
        """The prompt's own tokens, for `echo`; the first one follows nothing.

        Args:
            text: as it is echoed. Tokens may have more at their front: `<s>`, a space before the first word.
        """
        self.offset = len(text) - len(prompt_text(self.run))
        entries = (None, *self.run.prompt_logprobs)
        for token_id, entry in zip(self.run.prompt_token_ids, entries, strict=True):
            self._add(token_id, entry)
            self._pass(token_id)

    def add(self, entries: Iterable[TokenLogprobs]) -> None:
        """The answer's next tokens."""
        for entry in entries:
            self._add(entry.token_ids[0], entry)
            if entry.token_ids[0] not in self.run.hidden_ids:
                self._pass(entry.token_ids[0])

    def _add(self, token_id: int, entry: TokenLogprobs | None) -> None:
        self.tokens.append(_text(self.run, token_id))
        self.token_logprobs.append(_finite(entry.logprobs[0]) if entry else None)
        self.top_logprobs.append(dict(self._likeliest(entry)) if entry else None)
        self.text_offset.append(max(0, self.offset))

    def _pass(self, token_id: int) -> None:
        """Counts the characters that are whole with this token."""
        self.offset += len(self.characters.decode(self.run.token_bytes(token_id)))

    def _likeliest(self, entry: TokenLogprobs) -> Iterator[tuple[str, float]]:
        for token_id, logprob in zip(entry.token_ids[1 : self.top + 1], entry.logprobs[1 : self.top + 1], strict=True):
            yield _text(self.run, token_id), _finite(logprob)
        # As OpenAI has it: the token that is there is always among them.
        yield _text(self.run, entry.token_ids[0]), _finite(entry.logprobs[0])

    def take(self) -> JsonObject:
        """What was added since the last time."""
        taken = {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs if self.top else None,
            "text_offset": self.text_offset,
        }
        self.tokens, self.token_logprobs, self.top_logprobs, self.text_offset = [], [], [], []
        return taken
