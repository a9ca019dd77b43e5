"""The bookkeeping of image embeddings: which are on the device, which a running sequence needs.

No tensors here: the model runner has them. Room is counted in image tokens.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping

from vlm_serve.engine.batch import ImageKey


class EncoderCache:
    """Embeddings by `ImageKey`, the least recently used given up first, a pinned one never."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.queries = 0
        self.hits = 0
        self._sizes: OrderedDict[ImageKey, int] = OrderedDict()
        self._pins: dict[ImageKey, int] = {}
        self._held = 0
        self._pinned = 0

    def __contains__(self, key: ImageKey) -> bool:
        return key in self._sizes

    @property
    def held(self) -> int:
        """Image tokens on the device."""
        return self._held

    def can_add(self, size: int, unpinned: Iterable[ImageKey] = ()) -> bool:
        """Whether `add` would find room, evicting what is not pinned, were each of `unpinned` pinned once less."""
        freed = sum(self._sizes[key] for key in self._let_go(unpinned))
        return size <= self.capacity - self._pinned + freed

    def can_pin(self, sizes: Mapping[ImageKey, int], unpinned: Iterable[ImageKey] = ()) -> bool:
        """Whether all of these would find room at once, those that are here among them, were each of `unpinned` pinned
        once less.
        """
        free = self._let_go(unpinned)
        missing = sum(size for key, size in sizes.items() if key not in self._pins or key in free)
        return missing <= self.capacity - self._pinned + sum(self._sizes[key] for key in free)

    def _let_go(self, unpinned: Iterable[ImageKey]) -> set[ImageKey]:
        """Those that nobody would pin any more, were each of `unpinned` pinned once less."""
        return {key for key, count in Counter(unpinned).items() if self._pins[key] == count}

    def add(self, key: ImageKey, size: int) -> list[ImageKey]:
        """Makes room and enters the image; returns the keys that gave way. It must be pinned next."""
        evicted = []
        for candidate in list(self._sizes):
            if self._held + size <= self.capacity:
                break
            if candidate not in self._pins:
                self._held -= self._sizes.pop(candidate)
                evicted.append(candidate)
        self._sizes[key] = size
        self._held += size
        return evicted

    def pin(self, key: ImageKey) -> None:
        """A sequence needs it until it unpins it."""
        self._sizes.move_to_end(key)
        if key not in self._pins:
            self._pinned += self._sizes[key]
        self._pins[key] = self._pins.get(key, 0) + 1

    def unpin(self, key: ImageKey) -> None:
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]
            self._pinned -= self._sizes[key]

    def forget(self, key: ImageKey) -> None:
        """Takes out an image whose encoding failed; nobody pins it any more."""
        assert key not in self._pins
        self._held -= self._sizes.pop(key, 0)
