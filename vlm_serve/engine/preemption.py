"""Who gives way when rows, blocks, adapter slots or image room run short: worse classes first, in a class the latest.

Nobody does where all who may would not be enough.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator

from vlm_serve.engine.encoder_cache import EncoderCache
from vlm_serve.engine.image_grants import first_image_fits
from vlm_serve.engine.sequence import Sequence
from vlm_serve.engine.step import Step
from vlm_serve.lora.store import AdapterSlots

MAX_PREEMPTIONS = 4
"""How often a sequence gives way to a better class; the last time it joins that class."""


def victims(running: list[Sequence], worse_than: int | None = None) -> Iterator[Sequence]:
    """Running sequences in the order in which they give way; with `worse_than`, those of worse classes than this."""
    latest_first = running[::-1]
    for sequence in sorted(latest_first, key=lambda one: -one.priority):
        if worse_than is None or sequence.priority > worse_than:
            yield sequence


def enough_of(candidates: Iterable[Sequence], suffice: Callable[[list[Sequence]], bool]) -> list[Sequence] | None:
    """As few of the candidates as suffice, from the first on; None where all of them do not.

    Args:
        suffice: whether it is enough that these give way; if some are, so are more.
    """
    everyone = list(candidates)
    if not suffice(everyone):
        return None
    return everyone[: bisect_left(range(len(everyone)), True, key=lambda count: suffice(everyone[:count]))]


def slot_users(adapters: AdapterSlots, running: list[Sequence], sequence: Sequence) -> list[Sequence] | None:
    """Who must give way for the sequence's adapter to find a slot: the fewest who use one that only worse classes use;
    None where there is no such.
    """
    if sequence.request.adapter is None or adapters.can_pin(sequence.request.adapter):
        return []
    users: dict[str, list[Sequence]] = {}
    for one in running:
        if one.request.adapter is not None:
            users.setdefault(one.request.adapter, []).append(one)
    worse = (group for group in users.values() if all(user.priority > sequence.priority for user in group))
    return min(worse, key=len, default=None)


def image_users(
    cache: EncoderCache, running: list[Sequence], step: Step, sequence: Sequence, start: int
) -> list[Sequence] | None:
    """Who must give way for the image under `start` to find room: as few as suffice of those of worse classes that are
    in the middle of one; None where they would not be enough.
    """
    holders = (one for one in victims(running, worse_than=sequence.priority) if one.pinned_images)
    return enough_of(holders, lambda some: first_image_fits(cache, step, sequence, start, without=some))


def give_way(victim: Sequence, winner: Sequence) -> None:
    """One that has given way to better classes again and again joins the class that it gives way to."""
    if winner.priority < victim.priority:
        victim.preemptions += 1
        if victim.preemptions >= MAX_PREEMPTIONS:
            victim.priority = winner.priority
