"""Who is next: better classes first, then the tenant that has been served least, then who came first."""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator

from vlm_serve.engine.sequence import Sequence
from vlm_serve.engine.step import Step
from vlm_serve.engine.tenants import TokenCounters


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


class WaitingQueue:
    """The sequences without a row, by class and tenant, in the order in which they came.

    `suspects` stand before all classes: they are run one at a time.
    """

    def __init__(self) -> None:
        self.counters = TokenCounters()
        self.suspects: deque[Sequence] = deque()
        self._classes: dict[int, dict[str, list[Sequence]]] = {}

    def __len__(self) -> int:
        queues = (queue for tenants in self._classes.values() for queue in tenants.values())
        return len(self.suspects) + sum(len(queue) for queue in queues)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.suspects
        for tenants in self._classes.values():
            for queue in tenants.values():
                yield from queue

    def __bool__(self) -> bool:
        return bool(self.suspects or self._classes)

    @property
    def priorities(self) -> set[int]:
        return set(self._classes)

    def arrive(self, sequence: Sequence) -> None:
        """Queues a new sequence."""
        tenant = sequence.request.tenant
        waiting = {other for tenants in self._classes.values() for other in tenants}
        if tenant not in waiting:
            self.counters.lift(tenant, waiting)
        self.put_back(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Queues one that has lost its row, at the place that its arrival gives it; a suspect before all others."""
        if sequence.is_suspect:
            self.suspects.appendleft(sequence)
            return
        tenants = self._classes.setdefault(sequence.priority, {})
        insort(tenants.setdefault(sequence.request.tenant, []), sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        self.counters.leave(sequence.request.tenant)
        if sequence.is_suspect:
            self.suspects.remove(sequence)
            return
        tenant = sequence.request.tenant
        tenants = self._classes[sequence.priority]
        queue = tenants[tenant]
        place = bisect_left(queue, sequence.order, key=_order)
        assert queue[place] is sequence
        del queue[place]
        if not queue:
            del tenants[tenant]
        if not tenants:
            del self._classes[sequence.priority]

    def candidates(self, priority: int) -> Iterator[Sequence]:
        """Those of a class, each once: again and again the first of the tenant that has been served least by now.

        They may be removed meanwhile.
        """
        queues = {tenant: deque(queue) for tenant, queue in self._classes.get(priority, {}).items()}
        while queues:
            tenant = min(queues, key=lambda name: (self.counters[name], queues[name][0].order))
            yield queues[tenant].popleft()
            if not queues[tenant]:
                del queues[tenant]

    def heads(self) -> Iterator[Sequence]:
        """Who came first, of each class and tenant."""
        for tenants in self._classes.values():
            for queue in tenants.values():
                yield queue[0]


class Neglect:
    """For how many steps in a row each class was passed over for a better one, nobody of it moving on."""

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._steps: dict[int, int] = {}

    def observe(self, step: Step, others: Iterable[Sequence]) -> list[tuple[Sequence, int]]:
        """Takes in a step; returns who came first of each class whose patience is at an end, with the class that was
        served instead. One token of an answer is no progress of a class: everybody who runs gets it.

        Args:
            others: those who wait and those who run, whether granted something or not.
        """
        served = {grant.sequence for grant in step.granted}
        best = min((sequence.priority for sequence in served), default=0)
        moved_on = {one.priority for one in served if one.remaining > 1 or one in step.admitted}
        first: dict[int, Sequence] = {}
        for one in others:
            if served and one not in served and one.priority > best and one.priority not in moved_on:
                first[one.priority] = min(first.get(one.priority, one), one, key=_order)
        self._steps = {priority: self._steps.get(priority, 0) + 1 for priority in first}
        neglected = [priority for priority, steps in self._steps.items() if steps > self._patience]
        for priority in neglected:
            del self._steps[priority]
        return [(first[priority], best) for priority in neglected]
