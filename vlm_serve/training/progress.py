"""What a long run tells of itself, to whoever shows it: a terminal's bar, a log, nobody."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One part of the work."""

    def advance(self, steps: int = 1) -> None:
        """So many steps more are done."""

    def tell(self, text: str) -> None:
        """A short figure to show beside the bar: a loss, a score."""


class Progress(Protocol):
    """Opens a task of `total` steps, `done` of them behind it already."""

    def task(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Task]: ...


class Silent:
    """A `Progress` that shows nothing."""

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator[Task]:
        yield self

    def advance(self, steps: int = 1) -> None:
        pass

    def tell(self, text: str) -> None:
        pass
