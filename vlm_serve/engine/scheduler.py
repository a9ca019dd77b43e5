"""Which tokens of which sequences are computed in the next step.

There are no prefill and decode phases: a sequence has `computed` of its known tokens, and a step grants tokens under
one budget. Class by class, the better first, running sequences go before waiting ones (`waiting.py` has their order).
"""

import time
from collections.abc import Callable, Iterable, Set
from dataclasses import replace
from itertools import chain, takewhile

import numpy as np

from vlm_serve.config import EngineConfig
from vlm_serve.engine.admission import check_request
from vlm_serve.engine.batch import ScheduledBatch, StepResult, TableEntry
from vlm_serve.engine.block_manager import BlockManager
from vlm_serve.engine.encoder_cache import EncoderCache
from vlm_serve.engine.image_grants import grant_images, unpin_images, unpin_passed_images
from vlm_serve.engine.preemption import enough_of, give_way, image_users, slot_users, victims
from vlm_serve.engine.sequence import RequestRun, Sequence
from vlm_serve.engine.speculation import grant_drafts
from vlm_serve.engine.step import Step
from vlm_serve.engine.waiting import Neglect, WaitingQueue
from vlm_serve.errors import InvalidRequestError
from vlm_serve.lora.store import AdapterSlots
from vlm_serve.types import EngineStats, FinishReason, Request, TokenLogprobs, TokenOutput

PATIENCE = 64
"""Steps for which one who finds no room lets others pass who do; then it is they who wait."""


class Scheduler:
    """Queue, rows and budgets. It owns the books of blocks, image embeddings and adapter slots.

    Args:
        stretches_from: `DecoderConfig.stretches_from`.
        image_adapters: digests of the adapters that change the embeddings of images.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        num_blocks: int,
        max_model_len: int,
        windows: tuple[int | None, ...] = (None,),
        stretches_from: int | None = None,
        image_adapters: Set[str] = frozenset(),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config = config
        self.max_model_len = max_model_len
        self.stretches_from = max_model_len if stretches_from is None else stretches_from
        self.image_adapters = image_adapters
        self.blocks = BlockManager(
            num_blocks,
            config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            windows=windows,
            max_chunk=config.max_num_batched_tokens,
        )
        self.images = EncoderCache(config.encoder_cache_tokens)
        self.adapters = AdapterSlots(config.max_adapters)
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        """In the order in which they took their rows."""
        self.num_preemptions = 0
        self.num_drafted = 0
        self.num_accepted = 0
        self._clock = clock
        self._arrivals = 0
        self._free_rows = list(range(config.max_num_seqs))[::-1]
        self._by_row: dict[int, Sequence] = {}
        self._runs: dict[str, RequestRun] = {}
        self._neglect = Neglect(PATIENCE)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            InvalidRequestError: it can never be served (see `check_request`), or its id is in use.
        """
        if request.request_id in self._runs:
            raise InvalidRequestError("A request with this id is running.", param="request_id")
        max_tokens = check_request(
            request, max_model_len=self.max_model_len, max_image_tokens=self.images.capacity, blocks=self.blocks
        )
        run = RequestRun(arrival=self._arrivals, arrived=self._clock())
        self._arrivals += 1
        self._runs[request.request_id] = run
        for index in range(1 if request.pooling else request.sampling.n):
            sequence = Sequence.create(request, max_tokens, index=index, run=run)
            sequence.is_long = sequence.prompt_len > self.stretches_from
            sequence.image_adapter = request.adapter if request.adapter in self.image_adapters else None
            self.waiting.arrive(sequence)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one of its answers, at whatever stage it is; what is unknown has already ended."""
        if run := self._runs.get(request_id):
            for sequence in list(run.answers):
                if index is None or sequence.index == index:
                    self._finish(sequence, FinishReason.ABORT)

    def schedule(self) -> ScheduledBatch | None:
        """The next step's work; None when no sequence can be granted a token."""
        step = self._suspect_step()
        if not step.granted:
            step = self._step()
        return step.batch() if step.granted else None

    def request_ids(self, batch: ScheduledBatch) -> tuple[str, ...]:
        """The requests in a batch, each once."""
        return tuple(dict.fromkeys(self._by_row[row].request.request_id for row in batch.rows.tolist()))

    def update(self, batch: ScheduledBatch, result: StepResult) -> tuple[TokenOutput, ...]:
        """Takes in what the step computed for `batch`, as `schedule` made it."""
        outputs = []
        none = ((),) * len(batch.rows)
        drawn = zip(result.tokens, result.logprobs or none[: len(result.tokens)], strict=True)
        columns = batch.rows.tolist(), batch.counts.tolist(), batch.samples.tolist(), batch.drafts or none
        for row, count, samples, draft, entries in zip(*columns, result.prompt_logprobs or none, strict=True):
            sequence = self._by_row[row]
            computed_before = sequence.computed
            sequence.run.take_prompt_logprobs(computed_before, entries)
            tokens, logprobs = next(drawn) if samples else ((), ())
            self.num_drafted += len(draft)
            self.num_accepted += max(0, len(tokens) - 1)
            tokens = sequence.extend(tokens)
            sequence.computed += count - len(draft) + max(0, len(tokens) - 1)
            self.blocks.publish(sequence, computed_before)
            unpin_passed_images(self.images, sequence)
            if samples and row not in result.failed:
                outputs.append(self._output(sequence, tokens, logprobs[: len(tokens)], result.embeddings.get(row)))
            if not sequence.is_long and sequence.row is not None and len(sequence.token_ids) > self.stretches_from:
                self._start_over(sequence)
        for row, failure in result.failed.items():
            if failed := self._by_row.get(row):
                outputs += self._end_in_error(failed.request.request_id, failure.message, failure.param)
        return tuple(outputs)

    def fail(self, batch: ScheduledBatch, message: str, param: str | None = None) -> tuple[TokenOutput, ...]:
        """Ends every request of a step that could not be computed, and takes back what the step promised. `param` is
        the field to blame, None where the server is.
        """
        outputs: list[TokenOutput] = []
        for request_id in self.request_ids(batch):
            outputs += self._end_in_error(request_id, message, param)
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
            self.waiting.put_back(sequence)
        self._take_back(batch)

    def _take_back(self, batch: ScheduledBatch) -> None:
        """Forgets what a failed step was to bring to the device; nobody pins it any more."""
        for key, _ in batch.encode:
            self.images.forget(key)
        for _, digest in batch.load_adapters:
            self.adapters.forget(digest)

    def stats(self) -> EngineStats:
        num_running = len({sequence.request.request_id for sequence in self.running})
        return EngineStats(
            num_requests_running=num_running,
            num_requests_waiting=len(self._runs) - num_running,
            kv_blocks_used=self.blocks.num_blocks - self.blocks.num_free,
            kv_blocks_total=self.blocks.num_blocks,
            prefix_cache_queries=self.blocks.queries,
            prefix_cache_hits=self.blocks.hits,
            mm_cache_queries=self.images.queries,
            mm_cache_hits=self.images.hits,
            num_preemptions=self.num_preemptions,
            kv_tokens_live=self.blocks.tokens_live,
            kv_tokens_allocated=self.blocks.tokens_allocated,
            spec_draft_tokens=self.num_drafted,
            spec_accepted_tokens=self.num_accepted,
        )

    def _suspect_step(self) -> Step:
        """One suspect at a time, alone, until it has drawn a token. Nothing is granted where there is none, or where
        it finds no room beside those that run.
        """
        step = Step(self.config.max_num_batched_tokens, self.config.max_encoder_tokens)
        if suspects := [sequence for sequence in self.running if sequence.is_suspect]:
            self._grant_running(step, suspects)
        elif self.waiting.suspects:
            self._admit_waiting(step, [self.waiting.suspects[0]])
        return step

    def _step(self) -> Step:
        step = Step(self.config.max_num_batched_tokens, self.config.max_encoder_tokens)
        step.decoding.update(sequence for sequence in self.running if sequence.remaining == 1)
        for priority in sorted(self.waiting.priorities.union(sequence.priority for sequence in self.running)):
            self._grant_running(step, [sequence for sequence in self.running if sequence.priority == priority])
            if not self.waiting.suspects:  # one found no room; nobody else may take what becomes free
                self._admit_waiting(step, self.waiting.candidates(priority))
        if self.config.speculative_tokens:
            most = self.config.speculative_tokens
            grant_drafts(step, self.blocks, most=most, stretches_from=self.stretches_from)
        self._promote_neglected(step)
        return step

    def _grant_running(self, step: Step, candidates: Iterable[Sequence]) -> None:
        for sequence in candidates:
            if sequence.row is None:
                continue  # preempted by one before it
            count = sequence.chunk(sequence.computed, step.claim(sequence))
            # Blocks before images, so that no image is encoded for one that gives way itself.
            if count > 0 and self._make_blocks(step, sequence, sequence.computed + count):
                count = grant_images(self.images, step, sequence, sequence.computed, count)
                if count > 0:
                    step.grant(sequence, count, self.blocks.grow(sequence, sequence.computed + count))

    def _make_blocks(self, step: Step, sequence: Sequence, num_tokens: int) -> bool:
        """Whether a running sequence finds the blocks for so many tokens, if need be those of others that give way
        before it does; else it gives way itself.
        """
        if self.blocks.can_grow(sequence, num_tokens):
            return True
        before = takewhile(lambda one: one is not sequence, victims(self.running))
        gone = enough_of(before, lambda some: self.blocks.can_grow(sequence, num_tokens, without=some))
        for victim in gone or [sequence]:
            self._preempt(step, victim, sequence)
        return gone is not None

    def _admit_waiting(self, step: Step, candidates: Iterable[Sequence]) -> None:
        """Lets in those whose turn it is. One that lacks a row or blocks is waited for. One that lacks a slot for its
        adapter or room for its first image is passed by those who need none, lest it block them; by those who want
        the same not at all or not for long, lest it starve.
        """
        for sequence in candidates:
            if step.is_full or (step.room <= 0 and self._free_rows):
                return
            if sequence.awaits_sibling or (step.images_are_full and sequence.request.images):
                continue
            must_wait = step.slots_are_taken and sequence.request.adapter is not None
            users = None if must_wait else slot_users(self.adapters, self.running, sequence)
            if users is None:
                if not step.slots_are_taken:
                    sequence.slotless_steps += 1
                    step.slots_are_taken = sequence.slotless_steps > PATIENCE
                continue
            prefix = self.blocks.find_longest(sequence)
            start = len(prefix) * self.config.block_size
            holders = image_users(self.images, self.running, step, sequence, start)
            if holders is None:
                step.images_are_full = True
                continue
            if not self._make_room(step, sequence, prefix, [*dict.fromkeys(users + holders)]):
                step.is_full = True
                return
            count = grant_images(self.images, step, sequence, start, sequence.chunk(start, step.room))
            self.waiting.remove(sequence)
            self._take_row(step, sequence)
            self._start(sequence, prefix)
            self.blocks.grow(sequence, start + count)
            step.grant(sequence, count, tuple(sequence.block_table))

    def _start(self, sequence: Sequence, prefix: list[TableEntry]) -> None:
        """Gives a sequence its prefix. The first time its tenant pays for the rest of the prompt."""
        run, is_new = sequence.run, sequence.cached_tokens is None
        if run.started is None:
            run.started = self._clock()
        if is_new:
            sequence.cached_tokens = run.cached_tokens  # what the request found; what a sibling has made is no find
        self.blocks.admit(sequence, prefix)
        run.cached_tokens = sequence.cached_tokens
        if is_new:
            uncached = sequence.prompt_len - sequence.computed
            self.waiting.counters.charge(sequence.request.tenant, prompt=uncached)

    def _make_room(self, step: Step, sequence: Sequence, prefix: list[TableEntry], users: list[Sequence]) -> bool:
        """Whether it finds a row, blocks and a token of the budget, if need be those of running sequences of worse
        classes. These give way, and the `users` of its adapter's slot and its image's room with them, only if it does.

        Blocks for all that is known, not for one chunk: a prompt let in by halves is soon preempted.
        """

        def suffice(others: list[Sequence]) -> bool:
            gone = users + others
            has_row = bool(self._free_rows or gone) and step.room_without(gone) > 0
            return has_row and self.blocks.can_admit(sequence, prefix, without=gone)

        worse = victims(self.running, worse_than=sequence.priority)
        others = enough_of((one for one in worse if one not in users), suffice)
        if others is None:
            return False
        for victim in users + others:
            self._preempt(step, victim, sequence)
        return True

    def _promote_neglected(self, step: Step) -> None:
        """No class waits for ever: who came first of one that was long passed over joins the one that was served."""
        for sequence, priority in self._neglect.observe(step, chain(self.waiting.heads(), self.running)):
            if sequence.row is None:
                self.waiting.remove(sequence)
                sequence.priority = priority
                self.waiting.put_back(sequence)
            else:
                sequence.priority = priority

    def _take_row(self, step: Step, sequence: Sequence) -> None:
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
        unpin_images(self.images, sequence, sequence.pinned_images)
        if sequence.request.adapter is not None:
            self.adapters.unpin(sequence.request.adapter)
        sequence.adapter_slot = None
        del self._by_row[sequence.row]
        self._free_rows.append(sequence.row)
        sequence.row = None
        self.running.remove(sequence)

    def _start_over(self, sequence: Sequence) -> None:
        """Has a sequence that has become long computed again: none of its keys are turned as they now have to be."""
        self._leave_row(sequence)
        sequence.is_long = True
        sequence.block_hashes.clear()
        self.waiting.put_back(sequence)

    def _preempt(self, step: Step, victim: Sequence, winner: Sequence) -> None:
        """Sends a sequence back to the queue; its tokens are kept and computed again later."""
        self._leave_row(victim)
        give_way(victim, winner)
        self.waiting.put_back(victim)
        self.num_preemptions += 1
        step.decoding.discard(victim)

    def _output(
        self,
        sequence: Sequence,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
        embedding: np.ndarray | None,
    ) -> TokenOutput:
        """What a sequence that has drawn tokens, or was pooled, says; it ends if it has to."""
        sequence.is_suspect = False
        if sequence.request.pooling:
            sequence.finish_reason = FinishReason.STOP
        self.waiting.counters.charge(sequence.request.tenant, generated=len(tokens))
        output = TokenOutput(
            sequence.request.request_id,
            tokens,
            sequence.finish_reason,
            cached_tokens=sequence.cached_tokens or 0,
            index=sequence.index,
            stop_token=sequence.stop_token,
            logprobs=logprobs,
            embedding=embedding,
        )
        if sequence.finish_reason is not None:
            self._finish(sequence, sequence.finish_reason)
        return sequence.run.complete(output, self._clock())

    def _end_in_error(self, request_id: str, message: str, param: str | None = None) -> list[TokenOutput]:
        """A fault ends one request, with all its answers."""
        ended = TokenOutput(request_id, finish_reason=FinishReason.ERROR, error=message, error_param=param)
        outputs = []
        for sequence in list(self._runs[request_id].answers):
            outputs.append(replace(ended, index=sequence.index))
            self._finish(sequence, FinishReason.ERROR)
        return outputs

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        if sequence.row is None:
            self.waiting.remove(sequence)
        else:
            self._leave_row(sequence)
        sequence.run.answers.remove(sequence)
        if not sequence.run.answers:
            del self._runs[sequence.request.request_id]
