"""How much memory a piece of work takes at most: for a process of its own, so that nothing else is counted."""

from pathlib import Path


def kilobytes(name: str) -> int:
    """A line of this process's status, such as `VmRSS`."""
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])


class Peak:
    """Begins when it is made. `bytes()` is the most that this process has held since, beyond what it held then."""

    def __init__(self) -> None:
        self._before = kilobytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        return (kilobytes("VmHWM") - self._before) * 1024
