"""What requests change in their logits before a token is drawn: bias, penalties, and tokens that may not come.

Only the tokens concerned are touched, by their indices, for all rows at once; a row that asks for nothing costs
nothing. The order is transformers': bias, penalties, then what is forbidden.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlm_serve.engine.batch import NewRow


class TokenCounts:
    """The distinct tokens of one sequence, and how often each is in its answer.

    Args:
        prompt: tokens that are there and count 0.
        vocab_size: tokens past it, an image's placeholders, are left out.
    """

    def __init__(self, prompt: Sequence[int], vocab_size: int) -> None:
        ids = np.unique(np.array(prompt, dtype=np.int64))
        ids = ids[ids < vocab_size]
        self._slots = {token: slot for slot, token in enumerate(ids.tolist())}
        self._ids = np.concatenate([ids, np.zeros(64, dtype=np.int64)])
        self._counts = np.zeros(len(self._ids), dtype=np.float32)

    def add(self, token: int) -> None:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token
        self._counts[slot] += 1

    @property
    def ids(self) -> np.ndarray:
        """int64 `[k]`."""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> np.ndarray:
        """float32 `[k]`, parallel to `ids`."""
        return self._counts[: len(self._slots)]


@dataclass(slots=True, eq=False)
class LogitEdits:
    """One row's wishes, with what they depend on of its answer so far.

    `bias_ids` with `bias`; `allowed` are the only tokens that may come, None for all; `end_ids` may not come before
    `min_tokens`; `bad_words` are token sequences. `seen` is None without penalties.
    """

    bias_ids: np.ndarray
    bias: np.ndarray
    allowed: np.ndarray | None
    end_ids: np.ndarray
    min_tokens: int
    bad_words: tuple[tuple[int, ...], ...]
    repetition: float
    frequency: float
    presence: float
    seen: TokenCounts | None
    answer: list[int]

    @classmethod
    def create(cls, new: NewRow, vocab_size: int) -> "LogitEdits | None":
        """None for a row that changes nothing. The ends of an answer that has a grammar are the grammar's concern."""

        def known(tokens: Iterable[int]) -> np.ndarray:
            return np.array([token for token in tokens if token < vocab_size], dtype=np.int64)

        params = new.sampling
        bias = {token: value for token, value in (params.logit_bias or {}).items() if token < vocab_size}
        prompt, answer = new.token_ids[: new.prompt_len], new.token_ids[new.prompt_len :]
        repeats = params.repetition_penalty != 1
        seen = None
        if repeats or params.frequency_penalty or params.presence_penalty:
            seen = TokenCounts(prompt if repeats else (), vocab_size)
        min_tokens = params.min_tokens if new.grammar is None else 0
        if not (bias or params.allowed_token_ids or new.bad_word_ids or min_tokens or seen):
            return None
        edits = cls(
            bias_ids=np.array(list(bias), dtype=np.int64),
            bias=np.array(list(bias.values()), dtype=np.float32),
            allowed=None if params.allowed_token_ids is None else np.unique(known(params.allowed_token_ids)),
            end_ids=known((*new.eos_token_ids, *(params.stop_token_ids or ()))),
            min_tokens=min_tokens,
            bad_words=tuple(word for word in new.bad_word_ids if word[-1] < vocab_size),
            repetition=params.repetition_penalty,
            frequency=params.frequency_penalty,
            presence=params.presence_penalty,
            seen=seen,
            answer=[],
        )
        for token in answer:
            edits.observe(token)
        return edits

    def observe(self, token: int) -> None:
        """Takes in a token of the answer."""
        self.answer.append(token)
        if self.seen is not None:
            self.seen.add(token)

    def forbidden(self) -> np.ndarray:
        """Tokens that may not come next: ends that are too early, and the last of a bad word whose others are there.
        A word that began in the prompt is none of the answer's.
        """
        ends = self.end_ids.tolist() if len(self.answer) < self.min_tokens else []
        lasts = [
            word[-1] for word in self.bad_words if len(word) == 1 or tuple(self.answer[1 - len(word) :]) == word[:-1]
        ]
        return np.array(ends + lasts, dtype=np.int64)


def edit_logits(logits: torch.Tensor, rows: Sequence[tuple[int, LogitEdits]]) -> None:
    """Changes logits float32 `[n, vocab]` in place.

    Args:
        rows: `(row of the logits, its edits)`.
    """
    _add_bias(logits, [(row, edits) for row, edits in rows if len(edits.bias_ids)])
    _penalize(logits, [(row, edits.seen, edits) for row, edits in rows if edits.seen is not None])
    forbidden = [(row, edits.forbidden()) for row, edits in rows]
    if where := _places(logits, forbidden):
        logits[where] = float("-inf")
    _keep_only(logits, [(row, edits.allowed) for row, edits in rows if edits.allowed is not None])


def mask_logits(logits: torch.Tensor, rows: np.ndarray, allowed: np.ndarray) -> None:
    """Forbids in place what is not allowed.

    Args:
        logits: float32 `[n, vocab]`.
        rows: int64 `[m]`, rows of the logits.
        allowed: bool `[m, vocab]`.
    """
    # A bit a token on its way to the device.
    packed = _put(np.packbits(allowed, axis=1, bitorder="little"), logits)
    bits = (packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=logits.device)) & 1
    index = _put(rows, logits)
    logits[index] = logits[index].masked_fill(bits.flatten(1)[:, : logits.shape[1]] == 0, float("-inf"))


def _add_bias(logits: torch.Tensor, rows: Sequence[tuple[int, LogitEdits]]) -> None:
    if where := _places(logits, [(row, edits.bias_ids) for row, edits in rows]):
        logits[where] += _put(np.concatenate([edits.bias for _, edits in rows]), logits)


def _keep_only(logits: torch.Tensor, rows: Sequence[tuple[int, np.ndarray]]) -> None:
    if not rows:
        return
    where = _places(logits, rows)
    kept = None if where is None else logits[where]
    logits[[row for row, _ in rows]] = float("-inf")
    if where is not None and kept is not None:
        logits[where] = kept


def _penalize(logits: torch.Tensor, rows: Sequence[tuple[int, TokenCounts, LogitEdits]]) -> None:
    """Repetition as CTRL has it (arXiv 1909.05858), frequency and presence as OpenAI's API."""
    where = _places(logits, [(row, seen.ids) for row, seen, _ in rows])
    if not where:
        return
    lengths = [len(seen.ids) for _, seen, _ in rows]

    def spread(values: list[float]) -> torch.Tensor:
        return _put(np.repeat(np.array(values, dtype=np.float32), lengths), logits)

    repetition = spread([edits.repetition for _, _, edits in rows])
    counts = _put(np.concatenate([seen.counts for _, seen, _ in rows]), logits)
    values = logits[where]
    values = torch.where(values < 0, values * repetition, values / repetition)
    values -= spread([edits.frequency for _, _, edits in rows]) * counts
    values -= spread([edits.presence for _, _, edits in rows]) * (counts > 0)
    logits[where] = values


def _places(logits: torch.Tensor, rows: Sequence[tuple[int, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Indices of these tokens of these rows; None if there are none."""
    lengths = [len(ids) for _, ids in rows]
    if not sum(lengths):
        return None
    return (
        _put(np.repeat(np.array([row for row, _ in rows], dtype=np.int64), lengths), logits),
        _put(np.concatenate([ids for _, ids in rows]), logits),
    )


def _put(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(array).to(like.device)
