"""From hidden states to what a step gives back: tokens, accepted drafts, log-probabilities, embeddings.

Every row keeps here what its request asks of the sampler. A step looks at nothing that none of its rows asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from vlm_serve.decoders.decoder import Decoder
from vlm_serve.engine.batch import Failure, NewRow, ScheduledBatch, StepResult
from vlm_serve.engine.grammar_rows import GrammarRows
from vlm_serve.engine.logits import LogitEdits, edit_logits, mask_logits
from vlm_serve.engine.logprobs import prompt_logprobs, token_logprobs
from vlm_serve.engine.sampler import SamplingRows, sample
from vlm_serve.engine.structured import Structures
from vlm_serve.types import TokenLogprobs

NOT_ASKED = -1
NOTHING = np.empty(0, dtype=np.int64)

NO_TOKEN_LEFT = Failure(
    "No token is left that this request allows here. Loosen allowed_token_ids, bad_words, min_tokens or the "
    "structured output.",
    param="allowed_token_ids",
)


@dataclass(frozen=True, slots=True)
class _Places:
    """The L positions of a step whose next token is drawn.

    Args:
        rows: int64 `[L]`, whose they are.
        flat: int64 `[L]`, where they are among the outputs of the step.
        lengths: int64 `[L]`, known tokens up to and with each.
    """

    rows: np.ndarray
    flat: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True, slots=True)
class _Drawn:
    """What was drawn at L places.

    Args:
        tokens: int64 `[L]`.
        logprobs: by place, where they are asked for.
        failed: by row, why its answer cannot go on.
    """

    tokens: np.ndarray
    logprobs: Mapping[int, TokenLogprobs]
    failed: Mapping[int, Failure]


class SamplingHead:
    """What comes after the decoder's layers.

    Args:
        decoder: its norm and output head.
        tokens: int64 `[max_rows, max_model_len]`, the known tokens of every row; what is drawn is written into it.
        load_structures: for requests with a grammar; called for the first of them.
    """

    def __init__(self, decoder: Decoder, tokens: np.ndarray, load_structures: Callable[[], Structures]) -> None:
        self._decoder = decoder
        self._tokens = tokens
        max_rows = len(tokens)
        self._prompt_lengths = np.zeros(max_rows, dtype=np.int64)
        self._temperature = np.zeros(max_rows)
        self._top_k = np.zeros(max_rows, dtype=np.int64)
        self._top_p = np.ones(max_rows)
        self._min_p = np.zeros(max_rows)
        self._draws = np.zeros(max_rows, dtype=np.uint64)
        self._logprobs = np.full(max_rows, NOT_ASKED, dtype=np.int64)
        self._prompt_logprobs = np.full(max_rows, NOT_ASKED, dtype=np.int64)
        self._pools = np.zeros(max_rows, dtype=bool)
        self._edits: dict[int, LogitEdits] = {}
        self._grammars = GrammarRows(load_structures)

    def start(self, new: NewRow) -> None:
        """Puts a new sequence on a row."""
        row, sampling = new.row, new.sampling
        self._prompt_lengths[row] = new.prompt_len
        self._temperature[row] = sampling.temperature
        self._top_k[row] = sampling.top_k
        self._top_p[row] = sampling.top_p
        self._min_p[row] = sampling.min_p
        self._draws[row] = new.draw
        self._logprobs[row] = NOT_ASKED if sampling.logprobs is None else sampling.logprobs
        self._prompt_logprobs[row] = NOT_ASKED if sampling.prompt_logprobs is None else sampling.prompt_logprobs
        self._pools[row] = new.pooling
        self._edits.pop(row, None)
        if edits := LogitEdits.create(new, self._decoder.config.vocab_size):
            self._edits[row] = edits
        self._grammars.start(new)

    def write_drafts(self, batch: ScheduledBatch) -> None:
        """Puts the guessed tokens where the step reads its tokens."""
        ends = (batch.starts + batch.counts).tolist()
        for index, draft in enumerate(batch.drafts):
            if draft:
                self._tokens[batch.rows[index], ends[index] - len(draft) : ends[index]] = draft

    def outputs(self, batch: ScheduledBatch) -> np.ndarray:
        """Of how many of its last tokens in the step each sequence needs the hidden states, int64 `[S]`: those that its
        next tokens are drawn from, or all whose log-probabilities were asked for.
        """
        drafts = np.array([len(draft) for draft in batch.drafts], dtype=np.int64) if batch.drafts else 0
        needed = np.where(batch.samples, 1 + drafts, 0)
        asked = (self._prompt_logprobs[batch.rows] != NOT_ASKED) & (batch.starts < self._prompt_lengths[batch.rows])
        return np.where(asked, batch.counts, needed)

    def finish(self, batch: ScheduledBatch, output_start: np.ndarray, hidden: torch.Tensor) -> StepResult:
        """What a step gives back, without the time of its images.

        Args:
            output_start: int32 `[S + 1]`, prefix sums of `outputs`, or of the tokens granted.
            hidden: `[n, hidden_size]`, of the last layer, before the final norm: each sequence's last tokens.
        """
        of_prompt = self._of_prompt(batch, output_start, hidden)
        draws = batch.samples
        embeddings: dict[int, np.ndarray] = {}
        if (pools := draws & self._pools[batch.rows]).any():
            embeddings = self._pool(batch.rows[pools], output_start[1:][pools], hidden)
            draws = draws & ~pools
        if not draws.any():
            return StepResult(((),) * len(embeddings), prompt_logprobs=of_prompt, embeddings=embeddings)
        drafts = [batch.drafts[index] for index in draws.nonzero()[0].tolist()] if any(batch.drafts) else []
        drawn = self._draw(_places(batch, output_start, draws, drafts), hidden)
        answers = _accepted(drawn.tokens, drafts)
        rows = batch.rows[draws].tolist()
        if drawn.failed:
            answers = [() if row in drawn.failed else answer for row, answer in zip(rows, answers, strict=True)]
        self._observe(rows, answers)
        logprobs = _of_answers(drawn.logprobs, answers, drafts)
        if embeddings:  # they have their places in the order, too
            own, own_logprobs = iter(answers), iter(logprobs)
            does_draw = draws[batch.samples].tolist()
            answers = [next(own) if draw else () for draw in does_draw]
            logprobs = [next(own_logprobs) if draw else () for draw in does_draw] if logprobs else []
        return StepResult(tuple(answers), tuple(logprobs), of_prompt, embeddings, drawn.failed)

    def _draw(self, places: _Places, hidden: torch.Tensor) -> _Drawn:
        rows = places.rows
        logits = self._decoder.logits(hidden[torch.from_numpy(places.flat).to(hidden.device)])
        asked = (self._logprobs[rows] != NOT_ASKED).nonzero()[0]
        own = torch.log_softmax(logits[torch.from_numpy(asked).to(logits.device)], dim=-1) if len(asked) else None
        changed, failed = self._change(logits, rows) if self._edits or self._grammars else (NOTHING, {})
        sampling = SamplingRows(
            temperature=self._temperature[rows],
            top_k=self._top_k[rows],
            top_p=self._top_p[rows],
            min_p=self._min_p[rows],
            draws=self._draws[rows],
            indices=places.lengths - self._prompt_lengths[rows],
        )
        drawn = sample(logits, sampling)
        if len(changed):
            index = torch.from_numpy(changed).to(logits.device)
            for row in rows[changed[logits[index, drawn[index]].isneginf().cpu().numpy()]].tolist():
                failed.setdefault(row, NO_TOKEN_LEFT)
        tokens: np.ndarray = drawn.cpu().numpy()
        fits = places.lengths < self._tokens.shape[1]  # the very last token is never fed back
        # What follows a draft that was wrong is written too, and over before it is read.
        self._tokens[rows[fits], places.lengths[fits]] = tokens[fits]
        logprobs: dict[int, TokenLogprobs] = {}
        if own is not None:
            entries = token_logprobs(own, tokens[asked], self._logprobs[rows[asked]])
            logprobs = dict(zip(asked.tolist(), entries, strict=True))
        return _Drawn(tokens, logprobs, failed)

    def _change(self, logits: torch.Tensor, rows: np.ndarray) -> tuple[np.ndarray, dict[int, Failure]]:
        """Edits and masks logits in place; returns which, int64, and by row why an answer cannot go on."""
        changed: list[int] = []
        failed: dict[int, Failure] = {}
        if self._edits:
            edits = [(index, self._edits[row]) for index, row in enumerate(rows.tolist()) if row in self._edits]
            edit_logits(logits, edits)
            changed += [index for index, _ in edits]
        if self._grammars:
            allowed, failed = self._grammars.masks(rows.tolist())
            masks = [(index, allowed[row]) for index, row in enumerate(rows.tolist()) if row in allowed]
            if masks:
                mask_logits(logits, np.array([index for index, _ in masks]), np.stack([mask for _, mask in masks]))
                changed += [index for index, _ in masks]
        return np.array(sorted(set(changed)), dtype=np.int64), failed

    def _observe(self, rows: Sequence[int], answers: Sequence[tuple[int, ...]]) -> None:
        """Tells the rows that depend on their answer so far what was drawn."""
        if not self._edits and not self._grammars:
            return
        for row, answer in zip(rows, answers, strict=True):
            for token in answer:
                if row in self._edits:
                    self._edits[row].observe(token)
                if row in self._grammars:
                    self._grammars.advance(row, token)

    def _of_prompt(
        self, batch: ScheduledBatch, output_start: np.ndarray, hidden: torch.Tensor
    ) -> tuple[tuple[TokenLogprobs, ...], ...]:
        """The entries of the prompts' tokens that follow the positions of this step; empty if none was asked for."""
        asked = self._prompt_logprobs[batch.rows] != NOT_ASKED
        if not asked.any():
            return ()
        # The position of a prompt's last token says something of the answer alone.
        lasts = np.minimum(batch.starts + batch.counts, self._prompt_lengths[batch.rows] - 1)
        entries: list[tuple[TokenLogprobs, ...]] = [()] * len(batch.rows)
        for index in (asked & (batch.starts < lasts)).nonzero()[0].tolist():
            row, start, last = int(batch.rows[index]), int(batch.starts[index]), int(lasts[index])
            first = int(output_start[index])
            positions = hidden[first : first + last - start]
            targets = self._tokens[row, start + 1 : last + 1]
            count = int(self._prompt_logprobs[row])
            entries[index] = tuple(prompt_logprobs(self._decoder, positions, targets, count))
        return tuple(entries)

    def _pool(self, rows: np.ndarray, ends: np.ndarray, hidden: torch.Tensor) -> dict[int, np.ndarray]:
        """The last token's final hidden state of each row, normed to length 1."""
        last = torch.from_numpy(ends.astype(np.int64) - 1).to(hidden.device)
        vectors = F.normalize(self._decoder.norm(hidden[last]).float(), dim=-1).cpu().numpy()
        return dict(zip(rows.tolist(), vectors, strict=True))


def _places(
    batch: ScheduledBatch, output_start: np.ndarray, draws: np.ndarray, drafts: Sequence[tuple[int, ...]]
) -> _Places:
    """The last position of each sequence that draws, and before it those before its drafts."""
    rows, ends, lengths = (
        batch.rows[draws],
        output_start[1:][draws].astype(np.int64),
        (batch.starts + batch.counts)[draws],
    )
    if not drafts:
        return _Places(rows, ends - 1, lengths)
    sizes = np.array([1 + len(draft) for draft in drafts])
    first = np.cumsum(sizes) - sizes
    back = np.repeat(sizes - 1 + first, sizes) - np.arange(sizes.sum())  # how far each is from its sequence's last
    return _Places(np.repeat(rows, sizes), np.repeat(ends - 1, sizes) - back, np.repeat(lengths, sizes) - back)


def _accepted(tokens: np.ndarray, drafts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The tokens of each sequence: those drawn up to the first that is not as drafted, that one included."""
    if not drafts:
        return [(token,) for token in tokens.tolist()]
    drawn, answers = iter(tokens.tolist()), []
    for draft in drafts:
        own = [next(drawn) for _ in range(1 + len(draft))]
        right = next((index for index, guess in enumerate(draft) if guess != own[index]), len(draft))
        answers.append(tuple(own[: right + 1]))
    return answers


def _of_answers(
    logprobs: Mapping[int, TokenLogprobs], answers: Sequence[tuple[int, ...]], drafts: Sequence[tuple[int, ...]]
) -> list[tuple[TokenLogprobs, ...]]:
    """The entries of each answer's tokens, by their places; empty if there are none at all."""
    if not logprobs:
        return []
    entries, place = [], 0
    for index, answer in enumerate(answers):
        entries.append(tuple(logprobs[place + k] for k in range(len(answer)) if place + k in logprobs))
        place += 1 + (len(drafts[index]) if drafts else 0)
    return entries
