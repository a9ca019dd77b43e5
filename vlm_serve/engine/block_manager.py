"""The bookkeeping of KV-cache blocks: who holds which, and which hold a prefix that can be used again.

No tensors here: `kv_cache.py` has them. A full block is known by a hash over everything that its keys and
values depend on, so that a hit is always right: tokens, images, adapter and tenant.
"""

import hashlib
from collections import OrderedDict

from vlm_serve.engine.sequence import Sequence


class BlockManager:
    """Blocks of `block_size` tokens, counted by reference.

    A block is *used* while a sequence holds it and *free* otherwise; a free block keeps its content and its
    hash until it is handed out again, the least recently freed first.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.queries = 0
        self.hits = 0
        self._references = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def can_grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether `grow` to `num_tokens` tokens would find its blocks."""
        return self.blocks_for(num_tokens) - len(sequence.block_table) <= self.num_free

    def grow(self, sequence: Sequence, num_tokens: int) -> tuple[int, ...]:
        """Gives the sequence room for its first `num_tokens` tokens; returns the blocks that were added."""
        added = []
        for _ in range(self.blocks_for(num_tokens) - len(sequence.block_table)):
            block, _ = self._free.popitem(last=False)
            if known := self._hash_of.pop(block, None):
                del self._block_of[known]
            self._references[block] = 1
            added.append(block)
        sequence.block_table.extend(added)
        return tuple(added)

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """The cached blocks that the sequence's known tokens begin with.

        At least one token is left to compute: its logits are what the next token is drawn from.
        """
        if not self.enable_prefix_caching:
            return []
        found = []
        for index in range((len(sequence.token_ids) - 1) // self.block_size):
            block = self._block_of.get(self._hash(sequence, index))
            if block is None:
                break
            found.append(block)
        return found

    def can_admit(self, prefix: list[int], num_tokens: int) -> bool:
        """Whether a new sequence with this cached prefix can grow to `num_tokens` tokens."""
        revived = sum(self._references[block] == 0 for block in prefix)
        return self.blocks_for(num_tokens) - len(prefix) <= self.num_free - revived

    def admit(self, sequence: Sequence, prefix: list[int]) -> None:
        """Starts a sequence on its cached prefix, which counts as computed."""
        for block in prefix:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1
        sequence.block_table = list(prefix)
        sequence.computed = len(prefix) * self.block_size
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
            self.queries += len(sequence.token_ids)
            self.hits += sequence.computed

    def publish(self, sequence: Sequence, computed_before: int) -> None:
        """Makes the blocks that have become full since `computed_before` known to later sequences.

        Called after the step that computed them, so that no one can hit a block before it is written.
        """
        if not self.enable_prefix_caching:
            return
        for index in range(computed_before // self.block_size, sequence.computed // self.block_size):
            block, known = sequence.block_table[index], self._hash(sequence, index)
            if known not in self._block_of and block not in self._hash_of:
                self._block_of[known] = block
                self._hash_of[block] = known

    def release(self, sequence: Sequence) -> None:
        """Takes the sequence's blocks back; the end of its prefix is forgotten first."""
        for block in reversed(sequence.block_table):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)
        sequence.block_table = []
        sequence.computed = 0

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        """sha256 over the parent block's hash, this block's tokens, the adapter, the tenant's salt, and the
        digest and offset of each image that the block overlaps: placeholders alone are alike for everybody.
        """
        hashes = sequence.block_hashes
        while len(hashes) <= index:
            start = len(hashes) * self.block_size
            end = start + self.block_size
            request = sequence.request
            images = [
                (span.inputs.digest, span.offset - start)
                for span in request.images
                if span.offset < end and start < span.end
            ]
            content = (sequence.token_ids[start:end], request.adapter, request.cache_salt, images)
            hashes.append(hashlib.sha256((hashes[-1] if hashes else b"") + repr(content).encode()).digest())
        return hashes[index]
