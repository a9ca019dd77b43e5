"""Bars on the terminal for long runs: `training.progress.Progress`, shown by rich."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class TerminalProgress:
    """One bar a task, with the newest figure behind it; where there is no terminal, a line as each task ends."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[told]}"),
        )
        self._progress = Progress(*columns, console=self._console, transient=True)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator["TerminalTask"]:
        task = TerminalTask(self._progress, self._progress.add_task(name, total=total, completed=done, told=""))
        try:
            yield task
        finally:
            self._progress.remove_task(task.id)
        self._console.print(f"{name}: done. {task.told}".rstrip(), markup=False, soft_wrap=True)


class TerminalTask:
    """See `training.progress.Task`."""

    def __init__(self, progress: Progress, id: TaskID) -> None:
        self._progress = progress
        self.id = id
        self.told = ""

    def advance(self, steps: int = 1) -> None:
        self._progress.advance(self.id, steps)

    def tell(self, text: str) -> None:
        self.told = text
        self._progress.update(self.id, told=text)
