"""What must hold of the scheduler's books after every step, and a runner without a model that holds it to its word.

`Machine` keeps what the model runner keeps: rows, tables, image embeddings, adapters, and in each place of each block
what its keys and values would be made of. A batch that would read a wrong key is an error there.
"""

import random
from collections import Counter

import numpy as np

from vlm_serve.engine.batch import NULL_BLOCK, NewRow, ScheduledBatch, StepResult
from vlm_serve.engine.scheduler import Scheduler
from vlm_serve.engine.sequence import Sequence
from vlm_serve.types import TokenLogprobs


def assert_books_agree(one: Scheduler) -> None:
    """Reference counts agree with the tables, pins with who runs, queues with who waits."""
    blocks = one.blocks
    held = Counter(block for sequence in one.running for entry in sequence.block_table for block in entry)
    held.pop(NULL_BLOCK, None)
    assert blocks._references == [held[block] for block in range(blocks.num_blocks)]
    assert set(blocks._free) == set(range(blocks.num_blocks)) - set(held)
    assert {block: known for known, block in blocks._block_of.items()} == blocks._hash_of
    assert blocks.tokens_live == sum(blocks._live) <= blocks.tokens_allocated == len(held) * blocks.block_size
    if set(blocks.windows) == {None}:
        assert blocks._live == _written(one)
    for sequence in one.running:
        assert 0 <= sequence.computed < len(sequence.token_ids) <= one.max_model_len
        assert sequence.computed <= len(sequence.block_table) * blocks.block_size
        assert_parts_no_span(sequence, sequence.computed)
    _assert_pins_agree(one)
    waiting = list(one.waiting)
    assert len(waiting) == len(one.waiting)
    run = {sequence.request.request_id for sequence in one.running}
    wait = {sequence.request.request_id for sequence in waiting} - run
    stats = one.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting) == (len(run), len(wait))
    assert all(sequence.row is None and sequence.computed == 0 and not sequence.block_table for sequence in waiting)
    assert all(sequence.is_suspect for sequence in one.waiting.suspects)
    for priority, tenants in one.waiting._classes.items():
        for tenant, queue in tenants.items():
            assert queue
            assert {(s.priority, s.request.tenant, s.is_suspect) for s in queue} == {(priority, tenant, False)}
            assert [s.order for s in queue] == sorted(s.order for s in queue)
    rows = [sequence.row for sequence in one.running]
    assert sorted(rows + one._free_rows) == list(range(one.config.max_num_seqs))
    assert one._by_row == {sequence.row: sequence for sequence in one.running}
    alive = {sequence for run in one._runs.values() for sequence in run.answers}
    assert alive == set(waiting) | set(one.running)
    assert len(alive) == len(waiting) + len(one.running)
    assert all(sequence.finish_reason is None for sequence in alive)


def _written(one: Scheduler) -> list[int]:
    """How many places of each block the running sequences have written, where no window passes any."""
    size, written = one.blocks.block_size, [0] * one.blocks.num_blocks
    for sequence in one.running:
        for index, entry in enumerate(sequence.block_table):
            for block in entry:
                written[block] = max(written[block], min(size, sequence.computed - index * size))
    return written


def assert_parts_no_span(sequence: Sequence, position: int) -> None:
    """Nothing begins or ends here, inside a span that attends both ways."""
    for begin, end in sequence.request.atomic_spans:
        assert not begin < position < end, "a span that attends both ways is parted"


def _assert_pins_agree(one: Scheduler) -> None:
    images = one.images
    pinned = Counter(key for sequence in one.running for key in sequence.pinned_images)
    assert images._pins == pinned
    assert images._held == sum(images._sizes.values()) <= images.capacity
    assert images._pinned == sum(images._sizes[key] for key in pinned)
    assert not any(sequence.pinned_images for sequence in one.waiting)
    users = Counter(s.request.adapter for s in one.running if s.request.adapter)
    assert one.adapters._pins == users
    slots = one.adapters._slots
    assert sorted([*slots.values(), *one.adapters._empty]) == list(range(one.config.max_adapters))
    assert all(s.adapter_slot == slots[s.request.adapter] for s in one.running if s.request.adapter)


def assert_empty(one: Scheduler) -> None:
    """Nobody is there, and nothing is held for anybody."""
    assert_books_agree(one)
    assert not one.has_work
    assert not one._runs
    assert one.blocks.num_free == one.blocks.num_blocks
    assert one.blocks.tokens_live == 0
    assert one.adapters.pinned == 0
    assert one.images.can_add(one.images.capacity)


def fake_logprobs(token: int, position: int) -> TokenLogprobs:
    return TokenLogprobs((token,), (-float(position),), 1)


class Machine:
    """The model runner's side of the bargain, without the model: it draws from `vocabulary` by chance."""

    def __init__(self, one: Scheduler, seed: int = 0, vocabulary: int = 3) -> None:
        self.one = one
        self.rng = random.Random(seed)
        self.vocabulary = vocabulary
        self.tables: dict[int, list[tuple[int, ...]]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.rows: dict[int, NewRow] = {}
        self.embeddings: set = set()
        self.adapters: dict[int, str] = {}
        self.content: dict[tuple[int, int], int] = {}

    def lose(self, batch: ScheduledBatch) -> None:
        """A step that fails, as it may at its beginning and at its end; the runner keeps none of its images."""
        self.embeddings.difference_update(batch.evict_images)
        if self.rng.random() < 0.5:
            self._take_in(batch)
            self.embeddings.difference_update(key for key, _ in batch.encode)

    def run(self, batch: ScheduledBatch) -> StepResult:
        self._assert_budgets(batch)
        self._take_in(batch)
        rows, starts, counts = batch.rows.tolist(), batch.starts.tolist(), batch.counts.tolist()
        drafts = batch.drafts or ((),) * len(rows)
        self._assert_no_block_is_written_twice(rows, starts, counts)
        tokens, logprobs, prompt_logprobs, embeddings = [], [], [], {}
        for row, start, count, samples, draft in zip(rows, starts, counts, batch.samples.tolist(), drafts, strict=True):
            new, known = self.rows[row], self.tokens[row]
            assert count > 0
            assert start + count < new.prompt_len + max(1, new.sampling.max_tokens), "more than the answer can have"
            assert samples == (start + count - len(draft) == len(known))
            assert not draft or count == 1 + len(draft)
            self._compute(row, start, known[: start + count] + list(draft))
            last = min(start + count, new.prompt_len - 1) if new.sampling.prompt_logprobs is not None else 0
            prompt_logprobs.append(tuple(fake_logprobs(known[at + 1], at + 1) for at in range(start, last)))
            if not samples:
                continue
            drawn: tuple[int, ...] = ()
            if new.pooling:
                embeddings[row] = np.ones(2, dtype=np.float32)
            else:
                drawn = (*draft[: self.rng.randint(0, len(draft))], self.rng.randrange(self.vocabulary))
            tokens.append(drawn)
            known.extend(drawn)
            asked = new.sampling.logprobs is not None
            logprobs.append(tuple(fake_logprobs(token, index) for index, token in enumerate(drawn)) if asked else ())
        return StepResult(tuple(tokens), tuple(logprobs), tuple(prompt_logprobs), embeddings)

    def assert_agrees(self) -> None:
        """The device has what the books say, no more and no less."""
        assert self.embeddings == set(self.one.images._sizes)
        assert {slot: self.adapters[slot] for slot in self.one.adapters._slots.values()} == {
            slot: digest for digest, slot in self.one.adapters._slots.items()
        }

    def _assert_budgets(self, batch: ScheduledBatch) -> None:
        config = self.one.config
        self._assert_only_a_span_passes_the_budget(batch)
        assert len(set(batch.rows.tolist())) == len(batch.rows) <= config.max_num_seqs
        sizes = [inputs.num_tokens for _, inputs in batch.encode]
        if len(sizes) > 1 and sum(sizes) > config.max_encoder_tokens:
            self._assert_one_prefix_has(batch, {key for key, _ in batch.encode})
        assert all(len(draft) <= config.speculative_tokens for draft in batch.drafts)

    def _assert_one_prefix_has(self, batch: ScheduledBatch, keys: set) -> None:
        """All these images are of one prefix that attends both ways, which needs them at once."""
        prefixes = []
        for row in batch.rows.tolist():
            sequence = self.one._by_row[row]
            spans = [span for span in sequence.request.images if span.offset < sequence.request.both_ways_prefix]
            prefixes.append({sequence.image_key(span) for span in spans})
        assert any(keys <= prefix for prefix in prefixes), "images past the encoder's budget"

    def _assert_only_a_span_passes_the_budget(self, batch: ScheduledBatch) -> None:
        """A chunk that is one span that attends both ways may be past it, if a token of it was not."""
        assert batch.num_tokens > 0
        past = batch.num_tokens - self.one.config.max_num_batched_tokens
        chunks = set(zip(batch.rows.tolist(), batch.starts.tolist(), batch.counts.tolist(), strict=True))
        spans = [
            end - begin
            for row in batch.rows.tolist()
            for begin, end in self.one._by_row[row].request.atomic_spans
            if (row, begin, end - begin) in chunks
        ]
        assert past < max(spans, default=1)

    def _take_in(self, batch: ScheduledBatch) -> None:
        self.embeddings.difference_update(batch.evict_images)
        assert set(batch.rows.tolist()) >= {new.row for new in batch.new_rows}
        for new in batch.new_rows:
            self.rows[new.row], self.tokens[new.row], self.tables[new.row] = new, list(new.token_ids), []
        for row, added in zip(batch.rows.tolist(), batch.new_blocks, strict=True):
            self.tables[row].extend(added)
        self.adapters.update(batch.load_adapters)
        for key, _ in batch.encode:
            assert key not in self.embeddings
            assert key.adapter is None or key.adapter in self.adapters.values(), "encoded with what is not there"
            self.embeddings.add(key)

    def _assert_no_block_is_written_twice(self, rows: list[int], starts: list[int], counts: list[int]) -> None:
        size = self.one.config.block_size
        written = Counter(
            block
            for row, start, count in zip(rows, starts, counts, strict=True)
            for entry in self.tables[row][start // size : (start + count - 1) // size + 1]
            for block in entry
        )
        assert NULL_BLOCK not in written
        assert set(written.values()) <= {1}

    def _compute(self, row: int, start: int, tokens: list[int]) -> None:
        """Writes the keys of `[start, len(tokens))` and reads all those that their queries see."""
        new, table, size = self.rows[row], self.tables[row], self.one.config.block_size
        sequence = self.one._by_row[row]
        assert_parts_no_span(sequence, start)
        assert_parts_no_span(sequence, len(tokens))
        for image in new.images:
            assert image.key.adapter in (None, sequence.request.adapter), "another adapter's image"
            assert image.key.adapter or sequence.request.adapter not in self.one.image_adapters, (
                "the base model's image"
            )
            if image.offset < len(tokens) and start < image.offset + image.length:
                assert image.key in self.embeddings, "an image that is not on the device"
        if sequence.request.adapter is not None:
            assert self.adapters[new.adapter_slot] == sequence.request.adapter, "another adapter in its slot"
        is_long = len(new.token_ids) > self.one.stretches_from
        assert is_long or len(tokens) <= self.one.stretches_from, "a sequence goes on past its frequencies"
        prefix = sequence.request.both_ways_prefix  # the keys of all of it depend on all of it
        shown = tuple((image.key, image.offset) for image in new.images if image.offset < prefix)
        keys = []
        own = (sequence.request.adapter, sequence.request.cache_salt, is_long)
        key = hash((own, tuple(tokens[:prefix]), prefix, shown))
        for position, token in enumerate(tokens):
            image = next((i.key for i in new.images if i.offset <= position < i.offset + i.length), None)
            key = hash((key, token, image))
            keys.append(key)
        for position in range(start, len(tokens)):
            for block in table[position // size]:
                self.content[block, position % size] = keys[position]
        for group, window in enumerate(self.one.blocks.windows):
            for position in range(0 if window is None else max(0, start - window + 1), len(tokens)):
                found = self.content.get((table[position // size][group], position % size))
                assert found == keys[position], f"the key of position {position} is not this sequence's"
