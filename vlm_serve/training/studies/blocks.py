"""Which slices of a volume are for training, for validation and for the test.

A series is cut into periods; in each, a block is for training, a shorter one for validation and one for the test,
and the slices between blocks are dropped, since neighbours are nearly the same picture.
"""

from collections.abc import Iterable

BLOCKS = {"train": (0.0, 0.54), "validation": (0.62, 0.73), "test": (0.81, 0.92)}
"""The share of a period that is a split's, from and to; between them is dropped."""


def positions(split: str, spans: Iterable[tuple[int, int]], period: int) -> list[int]:
    """The positions of a split within `spans` (first and last, both counted)."""
    first, last = BLOCKS[split]
    return [
        position
        for start, end in spans
        for position in range(start, end + 1)
        if first <= position % period / period < last
    ]


def neighbours(position: int, allowed: Iterable[int], reach: int) -> list[int]:
    """`position` and the ones beside it, up to `reach` away, that belong to the same run of `allowed`."""
    own = set(allowed)
    found = [position]
    for step in (-1, 1):
        at = position + step
        while at in own and abs(at - position) <= reach:
            found.append(at)
            at += step
    return sorted(found)
