"""The bookkeeping of KV-cache blocks: who holds which, and which hold a prefix that can be used again.

No tensors here: `kv_cache.py` has them. A full block is known by a hash over everything that its keys and
values depend on, so that a hit is always right: tokens, images, adapter and tenant.
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence as Many

from vlm_serve.engine.batch import NULL_BLOCK, TableEntry
from vlm_serve.engine.sequence import Sequence


def first_seen(position: int, window: int | None) -> int:
    """The first position that a query at `position` sees."""
    return 0 if window is None else max(0, position - window + 1)


def most_blocks(num_tokens: int, block_size: int, windows: Many[int | None], max_chunk: int) -> int:
    """The most blocks that a sequence holds on its way to `num_tokens` tokens, `max_chunk` or fewer of them a step.

    Under a window that is what the first token of a chunk sees, and the chunk. To it comes what a fork needs: it
    starts up to a block before its parent, which keeps that for it.
    """
    whole = -(-num_tokens // block_size)
    total = 0
    for window in windows:
        if window is None:
            total += whole
        else:
            reach = block_size + window - 1 + max_chunk
            total += min(whole, -(-(reach - 1) // block_size) + 1)
    return total


class BlockManager:
    """Blocks of `block_size` tokens, counted by reference.

    A block is *used* while a sequence holds it and *free* otherwise; a free block keeps its content and its
    hash until it is handed out again, the least recently freed first.

    Layers come in groups that share the one pool. An entry of a block table has a block of each group for the same
    tokens; a group with a window gives its block back once no query can see it, and its place is `NULL_BLOCK`.

    Args:
        windows: of each group of layers, how many positions a query sees; None is all.
        max_chunk: the most tokens of a sequence that one step computes; None is any number.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        windows: tuple[int | None, ...] = (None,),
        max_chunk: int | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.windows = windows
        self.max_chunk = num_blocks * block_size if max_chunk is None else max_chunk
        self.queries = 0
        self.hits = 0
        self.tokens_live = 0
        """Places in used blocks whose keys and values a later step can still read; the rest of
        `tokens_allocated` is waste. Where sequences share a block it is what the last of them made of it."""
        self._windowed = [(group, window) for group, window in enumerate(windows) if window is not None]
        self._live = [0] * num_blocks
        self._references = [0] * num_blocks
        self._hash_of: dict[int, tuple[int, bytes]] = {}
        self._block_of: dict[tuple[int, bytes], int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def tokens_allocated(self) -> int:
        """Places for tokens in the blocks that sequences hold, a block that several hold counted once."""
        return (self.num_blocks - len(self._free)) * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """How many entries of a block table `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def most_for(self, num_tokens: int, longest_span: int) -> int:
        """The most blocks that a sequence holds on its way to `num_tokens` tokens, `longest_span` of which have to be
        computed in one step.
        """
        return most_blocks(num_tokens, self.block_size, self.windows, max(self.max_chunk, longest_span))

    def can_grow(self, sequence: Sequence, num_tokens: int, without: Many[Sequence] = ()) -> bool:
        """Whether `grow` to `num_tokens` tokens would find its blocks, were it without these other sequences."""
        entries = self.blocks_for(num_tokens) - len(sequence.block_table)
        return entries * len(self.windows) <= self.num_free + len(self._held_only_by(without))

    def grow(self, sequence: Sequence, num_tokens: int) -> tuple[TableEntry, ...]:
        """Gives the sequence room for its first `num_tokens` tokens; returns the entries that were added."""
        entries = self.blocks_for(num_tokens) - len(sequence.block_table)
        added = [tuple([self._take() for _ in self.windows]) for _ in range(entries)]
        sequence.block_table.extend(added)
        return tuple(added)

    def find_prefix(self, sequence: Sequence) -> list[TableEntry]:
        """The cached blocks that the sequence's known tokens begin with.

        At least one token is left to compute: its logits are what the next token is drawn from. It is the longest
        prefix of which every group has what the next query sees: of a window its last blocks, of the others all. It
        does not end inside a span that attends both ways.
        """
        if not self.enable_prefix_caching:
            return []
        groups, longest = range(len(self.windows)), 0
        found: list[TableEntry] = []
        missed = [-1] * len(self.windows)  # the last block of each group that is not cached
        for index in range((len(sequence.token_ids) - 1) // self.block_size):
            known = self._hash(sequence, index)
            entry = tuple([self._block_of.get((group, known), NULL_BLOCK) for group in groups])
            found.append(entry)
            for group in groups:
                if entry[group] == NULL_BLOCK:
                    missed[group] = index
            if any(missed[group] >= 0 for group in groups if self.windows[group] is None):
                break
            if all(missed[group] < self._first_needed(index + 1, group) for group in groups):
                longest = index + 1 if sequence.atomic_span_at((index + 1) * self.block_size) is None else longest
        return self._seen(found[:longest])

    def find_fork(self, parent: Sequence, child: Sequence) -> list[TableEntry]:
        """The blocks of `parent` that `child`, another answer to the same prompt, can start on: the full blocks of
        the prompt that the parent has computed. A prefix like those of `find_prefix`, for `can_admit` and `admit`; it
        needs no prefix caching.

        It ends as one of `find_prefix` does. Where layers have windows it is empty from the parent's second token on,
        when the window has left the prompt's end, or if a span that attends both ways is there.
        """
        full = min(parent.computed, child.prompt_len - 1) // self.block_size
        while span := child.atomic_span_at(full * self.block_size):
            full = span[0] // self.block_size
        entries = self._seen(parent.block_table[:full])
        for group, _ in self._windowed:
            if any(entry[group] == NULL_BLOCK for entry in entries[self._first_needed(full, group) :]):
                return []
        return entries

    def find_longest(self, sequence: Sequence) -> list[TableEntry]:
        """The longest of the prefixes that the cache and the other answers to its prompt have for a sequence."""
        prefixes = [
            self.find_fork(sibling, sequence)
            for sibling in sequence.run.answers
            if sibling.row is not None
            and sibling.computed >= sibling.prompt_len
            and sibling.is_long == sequence.is_long
        ]
        if not sequence.lacks_prompt_logprobs:
            prefixes.append(self.find_prefix(sequence))
        return max(prefixes, key=len, default=[])

    def can_admit(self, sequence: Sequence, prefix: list[TableEntry], without: Many[Sequence] = ()) -> bool:
        """Whether a new sequence with this prefix can come to all of its known tokens, were it without these others."""
        num_tokens, freed = len(sequence.token_ids), self._held_only_by(without)
        max_chunk = max(self.max_chunk, sequence.request.longest_atomic_span)
        room = self.num_free + len(freed)
        for group, window in enumerate(self.windows):
            own = [entry[group] for entry in prefix if entry[group] != NULL_BLOCK]
            revived = sum(not self._references[block] or block in freed for block in own)
            needed = self.blocks_for(num_tokens) - len(prefix)
            if window is not None:  # what is revived goes back as the window passes it
                needed = min(needed, most_blocks(num_tokens, self.block_size, (window,), max_chunk) - revived)
            room -= needed + revived
        return room >= 0

    def admit(self, sequence: Sequence, prefix: list[TableEntry]) -> None:
        """Starts a sequence on its cached prefix, which counts as computed."""
        for entry in prefix:
            for block in entry:
                if block == NULL_BLOCK:
                    continue
                if self._references[block] == 0:
                    del self._free[block]
                    self._set_live(block, self.block_size)
                self._references[block] += 1
        sequence.block_table = list(prefix)
        sequence.computed = len(prefix) * self.block_size
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
            self.queries += len(sequence.token_ids)
            self.hits += sequence.computed

    def publish(self, sequence: Sequence, computed_before: int) -> None:
        """Takes in that a step computed the tokens from `computed_before` on: blocks that have become full are known
        to later sequences, and those that fell out of a window go back.

        Called after the step, so that no one can hit a block before it is written, nor write where it is read.
        """
        full = sequence.computed // self.block_size
        for index in range(computed_before // self.block_size, self.blocks_for(sequence.computed)):
            filled = min(self.block_size, sequence.computed - index * self.block_size)
            for group, block in enumerate(sequence.block_table[index]):
                self._set_live(block, filled)
                if index < full and self.enable_prefix_caching:
                    known = group, self._hash(sequence, index)
                    if known not in self._block_of and block not in self._hash_of:
                        self._block_of[known] = block
                        self._hash_of[block] = known
        if self._windowed:
            self._give_back(sequence)

    def release(self, sequence: Sequence) -> None:
        """Takes the sequence's blocks back; the end of its prefix is forgotten first."""
        for entry in reversed(sequence.block_table):
            for block in entry:
                if block != NULL_BLOCK:
                    self._drop(block)
        sequence.block_table = []
        sequence.computed = 0

    def _held_only_by(self, sequences: Many[Sequence]) -> set[int]:
        """The blocks that would be free without these sequences."""
        held = Counter(block for one in sequences for entry in one.block_table for block in entry)
        held.pop(NULL_BLOCK, None)
        return {block for block, count in held.items() if self._references[block] == count}

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        if known := self._hash_of.pop(block, None):
            del self._block_of[known]
        self._references[block] = 1
        return block

    def _drop(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block] == 0:
            self._set_live(block, 0)
            self._free[block] = None
            if block not in self._hash_of:
                self._free.move_to_end(block, last=False)

    def _set_live(self, block: int, count: int) -> None:
        self.tokens_live += count - self._live[block]
        self._live[block] = count

    def _give_back(self, sequence: Sequence) -> None:
        """Takes back the blocks that no query still to come can see."""
        table, position = sequence.block_table, sequence.computed
        if sequence.request.sampling.n > 1 and position <= sequence.prompt_len:
            # The other answers to the prompt fork when it is computed, and begin with its last block.
            position = min(position, (sequence.prompt_len - 1) // self.block_size * self.block_size)
        for group, window in self._windowed:
            seen = first_seen(position, window)
            needed = seen // self.block_size
            for index in range(needed - 1, -1, -1):
                block = table[index][group]
                if block == NULL_BLOCK:
                    break
                table[index] = (*table[index][:group], NULL_BLOCK, *table[index][group + 1 :])
                self._drop(block)
            if needed < self.blocks_for(position) and self._references[table[needed][group]] == 1:
                end = min(sequence.computed, (needed + 1) * self.block_size)
                self._set_live(table[needed][group], end - seen)

    def _first_needed(self, num_blocks: int, group: int) -> int:
        """The first block that the query after `num_blocks` full ones sees."""
        return first_seen(num_blocks * self.block_size, self.windows[group]) // self.block_size

    def _seen(self, prefix: list[TableEntry]) -> list[TableEntry]:
        """The prefix without the blocks that the query after it does not see."""
        if not self._windowed:
            return prefix
        first = [self._first_needed(len(prefix), group) for group in range(len(self.windows))]
        return [
            tuple([block if index >= first[group] else NULL_BLOCK for group, block in enumerate(entry)])
            for index, entry in enumerate(prefix)
        ]

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        """sha256 over the parent block's hash, this block's tokens, the adapter, the tenant's salt, which rotary
        frequencies turned its keys, and the digest and offset of each image that the block overlaps: placeholders alone
        are alike for everybody.

        The first block's is over the whole of a prefix that attends both ways, and through it every other block's:
        keys and values in the prefix depend on all of it.
        """
        hashes = sequence.block_hashes
        while len(hashes) <= index:
            request = sequence.request
            start = len(hashes) * self.block_size
            prefix = 0 if hashes else request.both_ways_prefix
            end = max(start + self.block_size, prefix)
            images = [
                (span.inputs.digest, span.offset - start)
                for span in request.images
                if span.offset < end and start < span.end
            ]
            own = (request.adapter, request.cache_salt, sequence.is_long)
            content = (sequence.token_ids[start:end], *own, images, prefix)
            hashes.append(hashlib.sha256((hashes[-1] if hashes else b"") + repr(content).encode()).digest())
        return hashes[index]
