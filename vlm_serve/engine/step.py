"""One step while the scheduler puts it together: what is left of its budgets, and what has been granted."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from vlm_serve.engine.batch import ImageKey, NewRow, PlacedImage, ScheduledBatch, TableEntry
from vlm_serve.engine.sequence import Sequence
from vlm_serve.types import ImageInputs


@dataclass(slots=True)
class Grant:
    """`count` known tokens of a sequence, and after them a `draft`; `blocks` are new in its table."""

    sequence: Sequence
    count: int
    blocks: tuple[TableEntry, ...]
    draft: tuple[int, ...] = ()


@dataclass(slots=True)
class Step:
    """`decoding` are those running that have yet to get the one token that is kept back for each of them, so that none
    waits for another's prefill. The step `is_full` when one that is next finds no row or no blocks: nobody behind it
    may come in. `slots_are_taken` and `images_are_full` say so to those behind who need a slot or have images.
    """

    budget: int
    """Tokens left; less than 0 after an atomic span that is past it."""
    encoder_budget: int
    decoding: set[Sequence] = field(default_factory=set)
    granted: list[Grant] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    encode: dict[ImageKey, ImageInputs] = field(default_factory=dict)
    evict_images: list[ImageKey] = field(default_factory=list)
    load_adapters: list[tuple[int, str]] = field(default_factory=list)
    is_full: bool = False
    slots_are_taken: bool = False
    images_are_full: bool = False

    @property
    def room(self) -> int:
        """Tokens that may be granted beyond those kept back; less than 0 after a span that is past the budget."""
        return self.budget - len(self.decoding)

    def room_without(self, others: Iterable[Sequence]) -> int:
        """The room if these were gone, and nothing were kept back for them."""
        return self.budget - len(self.decoding.difference(others))

    def claim(self, sequence: Sequence) -> int:
        """The room for a running sequence whose turn it is: at least the token that is kept back for it, if one is."""
        is_kept = sequence in self.decoding
        self.decoding.discard(sequence)
        return max(self.room, is_kept)

    def can_encode(self, size: int) -> bool:
        """Whether images of so many tokens may be encoded in it; what is larger than the budget is encoded alone."""
        return size <= self.encoder_budget or not self.encode

    def grant(self, sequence: Sequence, count: int, blocks: tuple[TableEntry, ...]) -> None:
        """A chunk with an atomic span may be past the room; it takes nothing of what is kept back."""
        self.granted.append(Grant(sequence, count, blocks))
        self.budget -= count

    def batch(self) -> ScheduledBatch:
        sequences = [grant.sequence for grant in self.granted]
        counts = np.array([grant.count for grant in self.granted], dtype=np.int64)
        drafts = tuple(grant.draft for grant in self.granted)
        return ScheduledBatch(
            rows=np.array([sequence.row for sequence in sequences], dtype=np.int64),
            starts=np.array([sequence.computed for sequence in sequences], dtype=np.int64),
            counts=counts + np.array([len(draft) for draft in drafts], dtype=np.int64),
            samples=counts == np.array([sequence.remaining for sequence in sequences], dtype=np.int64),
            new_rows=tuple(_new_row(sequence) for sequence in self.admitted),
            new_blocks=tuple(grant.blocks for grant in self.granted),
            encode=tuple(self.encode.items()),
            evict_images=tuple(self.evict_images),
            load_adapters=tuple(self.load_adapters),
            drafts=drafts if any(drafts) else (),
        )


def _new_row(sequence: Sequence) -> NewRow:
    assert sequence.row is not None
    request = sequence.request
    return NewRow(
        row=sequence.row,
        token_ids=tuple(sequence.token_ids),
        prompt_len=sequence.prompt_len,
        images=tuple(
            PlacedImage(sequence.image_key(span), span.offset, span.inputs.num_tokens, span.inputs.grid)
            for span in request.images
        ),
        sampling=request.sampling,
        draw=sequence.draw,
        adapter_slot=sequence.adapter_slot,
        eos_token_ids=request.eos_token_ids,
        bad_word_ids=request.bad_word_ids,
        grammar=request.grammar,
        pooling=request.pooling,
        atomic_spans=request.atomic_spans,
    )
