"""Layers in groups that page their keys and values alike: what the KV cache is cut by.

One pool of blocks serves every group: a block holds some tokens' keys and values of all layers of one group.
Layers that see the whole context keep theirs to the end; a sliding window lets go of what it has passed.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

MAX_GROUPS = 8
"""Each group has its own block tables, which cost the host a little in every step."""


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers, by index, of one kind: `window` is how many positions a query sees, its own among them, or None."""

    window: int | None
    layers: tuple[int, ...]


def group_layers(windows: Sequence[int | None]) -> tuple[LayerGroup, ...]:
    """Groups of one size, from the window of each layer.

    The last group of a kind may have fewer layers; what its blocks have for the others is never used, and the plan of
    the cache says how much that is. Of the sizes that make few groups the one is taken that wastes least on layers
    without a window, whose blocks are held longest, and after that the least in all.
    """
    layers = {
        window: [index for index, own in enumerate(windows) if own == window]
        for window in sorted(Counter(windows), key=lambda window: (window is not None, window))
    }

    def cost(size: int) -> tuple[bool, int, int, int]:
        groups = {window: -(-len(members) // size) for window, members in layers.items()}
        total = sum(groups.values())
        too_many = total > max(MAX_GROUPS, len(layers))
        return too_many, groups.get(None, 0) * size, total * size, total

    size = min(range(1, len(windows) + 1), key=cost)
    return tuple(
        LayerGroup(window, tuple(members[start : start + size]))
        for window, members in layers.items()
        for start in range(0, len(members), size)
    )
