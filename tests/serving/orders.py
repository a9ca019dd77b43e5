"""A server whose engine process obeys a test; see `engine_hooks/sitecustomize.py`."""

import asyncio
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.serving.engine_hooks.sitecustomize import (
    FAULT_IN_STEP,
    HOLD_IN_STEP,
    HOLD_LATER,
    KILL_IN_STEP,
    KILL_TOGETHER,
    KILL_WHEN_ADDED,
    KILL_WITH_IT,
)

__all__ = [
    "FAULT_IN_STEP",
    "HOLD_IN_STEP",
    "HOLD_LATER",
    "KILL_IN_STEP",
    "KILL_TOGETHER",
    "KILL_WHEN_ADDED",
    "KILL_WITH_IT",
    "Orders",
    "eventually",
    "obeyed",
    "resources",
]

HOOKS = Path(__file__).parent / "engine_hooks"


class Orders:
    """What engine processes started from now on obey."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variables = {"TEST_ORDERS": str(folder)}

    def die_while_loading(self, times: int) -> None:
        (self.folder / "deaths while loading").write_text(str(times))

    @contextmanager
    def held(self, what: str) -> Iterator[None]:
        """`loading` holds processes that start; `step` and `later step` hold those with a request of seed
        `HOLD_IN_STEP` or `HOLD_LATER`.
        """
        with (self.folder / what).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @property
    def steps(self) -> list[list[str]]:
        """The seeds of the requests in each step until now."""
        file = self.folder / "steps"
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []

    def forget_steps(self) -> None:
        (self.folder / "steps").unlink(missing_ok=True)


async def eventually(condition, seconds: float = 180.0) -> None:
    """Waits for something that another process does and tells nobody."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 – nobody sets an event for it
            await asyncio.sleep(0.01)


def resources() -> tuple[int, int, int]:
    """Open file descriptors, child processes and names in shared memory of this process."""
    tasks = Path("/proc/self/task")
    children = sum(len((task / "children").read_text().split()) for task in tasks.iterdir())
    shared = Path("/dev/shm")
    return len(os.listdir("/proc/self/fd")), children, len(os.listdir(shared)) if shared.is_dir() else 0


@contextmanager
def obeyed(folder: Path) -> Iterator[Orders]:
    """Engine processes started meanwhile obey what is ordered; `folder` is where they look."""
    orders = Orders(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HOOKS))
        patch.setenv("TEST_ORDERS", str(folder))
        yield orders
