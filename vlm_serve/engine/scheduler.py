"""Which tokens of which sequences are computed in the next step.

There are no prefill and decode phases: a sequence has `computed` of its known tokens, and a step grants
tokens under one budget, to running sequences first, then to waiting ones, first come first served.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from vlm_serve.config import EngineConfig
from vlm_serve.engine.batch import ImageKey, NewRow, PlacedImage, ScheduledBatch
from vlm_serve.engine.block_manager import BlockManager
from vlm_serve.engine.encoder_cache import EncoderCache
from vlm_serve.engine.sequence import Sequence
from vlm_serve.errors import ContextLengthError, InvalidRequestError
from vlm_serve.lora.store import AdapterSlots
from vlm_serve.types import EngineStats, FinishReason, ImageInputs, Request, TokenOutput


@dataclass(slots=True)
class _Step:
    """One step while it is put together."""

    budget: int
    encoder_budget: int
    granted: list[tuple[Sequence, int, tuple[int, ...]]] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    encode: dict[ImageKey, ImageInputs] = field(default_factory=dict)
    evict_images: list[ImageKey] = field(default_factory=list)
    load_adapters: list[tuple[int, str]] = field(default_factory=list)
    preempted: bool = False


class Scheduler:
    """Queues, rows and budgets. It owns the books of blocks, image embeddings and adapter slots."""

    def __init__(self, config: EngineConfig, *, num_blocks: int, max_model_len: int) -> None:
        self.config = config
        self.max_model_len = max_model_len
        self.blocks = BlockManager(num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching)
        self.images = EncoderCache(config.encoder_cache_tokens)
        self.adapters = AdapterSlots(config.max_adapters)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._free_rows = list(range(config.max_num_seqs))[::-1]
        self._by_row: dict[int, Sequence] = {}
        self._by_id: dict[str, Sequence] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            ContextLengthError: prompt and answer do not fit in the context.
            InvalidRequestError: an empty prompt, an image larger than the encoder cache, an id in use.
        """
        prompt_len, max_tokens = len(request.token_ids), request.sampling.max_tokens
        if prompt_len == 0:
            raise InvalidRequestError("The prompt is empty.", param="messages")
        if request.request_id in self._by_id:
            raise InvalidRequestError("A request with this id is running.", param="request_id")
        room = self.max_model_len - prompt_len
        if room < 1 or (max_tokens is not None and max_tokens > room):
            raise ContextLengthError(
                f"The prompt has {prompt_len} tokens and {max_tokens or 'at least 1'} may be generated; the context "
                f"holds {self.max_model_len}. Shorten the prompt, send fewer images or lower max_tokens.",
                param="messages" if room < 1 else "max_tokens",
            )
        largest = max((span.inputs.num_tokens for span in request.images), default=0)
        if largest > self.images.capacity:
            raise InvalidRequestError(
                f"An image takes {largest} tokens; the encoder cache holds {self.images.capacity}. "
                "Send a smaller image.",
                param="messages",
            )
        sequence = Sequence.create(request, room if max_tokens is None else max_tokens)
        self._by_id[request.request_id] = sequence
        self.waiting.append(sequence)

    def abort(self, request_id: str) -> None:
        """Ends a request at whatever stage it is; an unknown id has already ended."""
        if sequence := self._by_id.get(request_id):
            if sequence.row is None:
                self.waiting.remove(sequence)
            self._finish(sequence, FinishReason.ABORT)

    def schedule(self) -> ScheduledBatch | None:
        """The next step's work; None when no sequence can be granted a token."""
        step = _Step(self.config.max_num_batched_tokens, self.config.max_encoder_tokens)
        self._grant_suspect(step)
        if not step.granted:
            self._grant_running(step, self.running)
            if not step.preempted:
                self._admit_waiting(step, list(self.waiting))
        return self._batch(step) if step.granted else None

    def update(self, batch: ScheduledBatch, tokens: np.ndarray) -> tuple[TokenOutput, ...]:
        """Takes in what the step computed.

        Args:
            batch: as `schedule` made it.
            tokens: int64, the token drawn for each sequence with `batch.samples`, in their order.
        """
        outputs, drawn = [], iter(tokens.tolist())
        for row, count, samples in zip(batch.rows.tolist(), batch.counts.tolist(), batch.samples.tolist(), strict=True):
            sequence = self._by_row[row]
            computed_before = sequence.computed
            sequence.computed += count
            self.blocks.publish(sequence, computed_before)
            self._unpin_images(sequence)
            if not samples:
                continue
            token = next(drawn)
            sequence.is_suspect = False
            sequence.append(token)
            outputs.append(
                TokenOutput(sequence.request.request_id, (token,), sequence.finish_reason, sequence.cached_tokens or 0)
            )
            if sequence.finish_reason:
                self._finish(sequence, sequence.finish_reason)
        return tuple(outputs)

    def fail(self, batch: ScheduledBatch, message: str) -> tuple[TokenOutput, ...]:
        """Ends every request of a step that could not be computed, and takes back what the step promised."""
        outputs = []
        for row in batch.rows.tolist():
            sequence = self._by_row[row]
            outputs.append(TokenOutput(sequence.request.request_id, finish_reason=FinishReason.ERROR, error=message))
            self._finish(sequence, FinishReason.ERROR)
        self._take_back(batch)
        return tuple(outputs)

    def suspect(self, batch: ScheduledBatch) -> None:
        """Sends the sequences of a step that failed back to the head of the queue, to be run one at a time
        until it is known which of them it was. What they have generated is kept.
        """
        for row in reversed(batch.rows.tolist()):
            sequence = self._by_row[row]
            sequence.is_suspect = True
            self._leave_row(sequence)
            self.waiting.appendleft(sequence)
        self._take_back(batch)

    def _take_back(self, batch: ScheduledBatch) -> None:
        """Forgets what a failed step was to bring to the device; nobody pins it any more."""
        for key, _ in batch.encode:
            self.images.forget(key)
        for _, digest in batch.load_adapters:
            self.adapters.forget(digest)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_requests_running=len(self.running),
            num_requests_waiting=len(self.waiting),
            kv_blocks_used=self.blocks.num_blocks - self.blocks.num_free,
            kv_blocks_total=self.blocks.num_blocks,
            prefix_cache_queries=self.blocks.queries,
            prefix_cache_hits=self.blocks.hits,
            mm_cache_queries=self.images.queries,
            mm_cache_hits=self.images.hits,
            num_preemptions=self.num_preemptions,
        )

    def _grant_suspect(self, step: _Step) -> None:
        """One suspect at a time, alone, until it has drawn a token."""
        if running := [sequence for sequence in self.running if sequence.is_suspect]:
            self._grant_running(step, running)
        elif self.waiting and self.waiting[0].is_suspect:
            self._admit_waiting(step, [self.waiting[0]])

    def _grant_running(self, step: _Step, candidates: list[Sequence]) -> None:
        # One token is kept back for each sequence that decodes, so that none waits for another's prefill.
        decoding = sum(sequence.remaining == 1 for sequence in candidates)
        for sequence in list(candidates):
            if sequence.row is None:
                continue  # preempted by one before it
            decoding -= sequence.remaining == 1
            wanted = min(sequence.remaining, step.budget - decoding)
            if wanted <= 0:
                continue
            count = self._grant_images(step, sequence, sequence.computed, wanted)
            while count > 0 and not self.blocks.can_grow(sequence, sequence.computed + count):
                victim = self.running[-1]
                decoding -= victim is not sequence and victim.remaining == 1
                self._preempt(step, victim)
                if victim is sequence:
                    count = 0
            if count > 0:
                self._grant(step, sequence, count, self.blocks.grow(sequence, sequence.computed + count))

    def _admit_waiting(self, step: _Step, candidates: list[Sequence]) -> None:
        slots_are_taken = False
        for sequence in candidates:
            if not self._free_rows or step.budget == 0:
                return
            adapter = sequence.request.adapter
            if adapter is not None and (slots_are_taken or not self.adapters.can_pin(adapter)):
                # Base requests may pass. Other adapters may not, lest busy ones hold their slots for ever.
                slots_are_taken = True
                continue
            prefix = self.blocks.find_prefix(sequence)
            # Room for all that is known, not for one chunk: a prompt let in by halves is soon preempted.
            if not self.blocks.can_admit(prefix, len(sequence.token_ids)):
                return
            start = len(prefix) * self.config.block_size
            wanted = min(len(sequence.token_ids) - start, step.budget)
            count = self._grant_images(step, sequence, start, wanted)
            if count <= 0:
                return
            self.waiting.remove(sequence)
            self._take_row(step, sequence)
            self.blocks.admit(sequence, prefix)
            self.blocks.grow(sequence, start + count)
            self._grant(step, sequence, count, tuple(sequence.block_table))

    def _grant(self, step: _Step, sequence: Sequence, count: int, new_blocks: tuple[int, ...]) -> None:
        step.granted.append((sequence, count, new_blocks))
        step.budget -= count

    def _grant_images(self, step: _Step, sequence: Sequence, start: int, count: int) -> int:
        """Sees to it that every image under `[start, start + count)` is on the device or encoded in this
        step; returns how many tokens can be granted, cut just before an image that finds no room.
        """
        spans = sequence.request.images
        if not spans or start >= spans[-1].end:
            return count
        for span in spans:
            if span.end <= start:
                continue
            if span.offset >= start + count:
                break
            key, size = sequence.image_key(span), span.inputs.num_tokens
            if key in sequence.pinned_images:
                continue
            is_hit = key in self.images
            if not is_hit:
                # An image larger than the budget of a step is encoded alone.
                over_budget = size > step.encoder_budget and bool(step.encode)
                if over_budget or not self.images.can_add(size):
                    return max(0, span.offset - start)
                for evicted in self.images.add(key, size):
                    step.encode.pop(evicted, None)
                    step.evict_images.append(evicted)
                step.encode[key] = span.inputs
                step.encoder_budget -= size
            self.images.queries += 1
            self.images.hits += is_hit
            self.images.pin(key)
            sequence.pinned_images.add(key)
        return count

    def _unpin_images(self, sequence: Sequence) -> None:
        """Lets go of every image but one that `computed` lies inside of. To hold more would let two
        sequences wait for each other's room for ever.
        """
        if sequence.pinned_images:
            under_way = {
                sequence.image_key(span)
                for span in sequence.request.images
                if span.offset < sequence.computed < span.end
            }
            for key in sequence.pinned_images - under_way:
                self.images.unpin(key)
            sequence.pinned_images &= under_way

    def _take_row(self, step: _Step, sequence: Sequence) -> None:
        adapter = sequence.request.adapter
        if adapter is not None:
            sequence.adapter_slot, is_new = self.adapters.pin(adapter)
            if is_new:
                step.load_adapters.append((sequence.adapter_slot, adapter))
        sequence.row = self._free_rows.pop()
        self._by_row[sequence.row] = sequence
        self.running.append(sequence)
        step.admitted.append(sequence)

    def _leave_row(self, sequence: Sequence) -> None:
        """Gives back all that a running sequence holds."""
        assert sequence.row is not None
        self.blocks.release(sequence)
        for key in sequence.pinned_images:
            self.images.unpin(key)
        sequence.pinned_images.clear()
        if sequence.request.adapter is not None:
            self.adapters.unpin(sequence.request.adapter)
        sequence.adapter_slot = None
        del self._by_row[sequence.row]
        self._free_rows.append(sequence.row)
        sequence.row = None
        self.running.remove(sequence)

    def _preempt(self, step: _Step, sequence: Sequence) -> None:
        """Sends a sequence back to the head of the queue; its tokens are kept and computed again later."""
        self._leave_row(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1
        step.preempted = True

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        if sequence.row is not None:
            self._leave_row(sequence)
        del self._by_id[sequence.request.request_id]

    def _batch(self, step: _Step) -> ScheduledBatch:
        sequences = [sequence for sequence, _, _ in step.granted]
        counts = np.array([count for _, count, _ in step.granted], dtype=np.int64)
        return ScheduledBatch(
            rows=np.array([sequence.row for sequence in sequences], dtype=np.int64),
            starts=np.array([sequence.computed for sequence in sequences], dtype=np.int64),
            counts=counts,
            samples=counts == np.array([sequence.remaining for sequence in sequences], dtype=np.int64),
            new_rows=tuple(_new_row(sequence) for sequence in step.admitted),
            new_blocks=tuple(blocks for _, _, blocks in step.granted),
            encode=tuple(step.encode.items()),
            evict_images=tuple(step.evict_images),
            load_adapters=tuple(step.load_adapters),
        )


def _new_row(sequence: Sequence) -> NewRow:
    assert sequence.row is not None
    request = sequence.request
    return NewRow(
        row=sequence.row,
        token_ids=tuple(sequence.token_ids),
        prompt_len=sequence.prompt_len,
        images=tuple(
            PlacedImage(sequence.image_key(span), span.offset, span.inputs.num_tokens) for span in request.images
        ),
        sampling=request.sampling,
        draw=sequence.draw,
        adapter_slot=sequence.adapter_slot,
    )
