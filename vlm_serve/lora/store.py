"""The adapters on disk, and which of them sit in the device's slots.

`AdapterStore` knows the folders by name and digest; `AdapterSlots` keeps the books of the device.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from vlm_serve.digests import folder_digest
from vlm_serve.errors import AdapterError
from vlm_serve.lora.checkpoint import CONFIG_FILE, WEIGHTS_FILE


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """An adapter by the name users ask for and by what it is: the digest of its config and weights."""

    name: str
    folder: Path
    digest: str


class AdapterStore:
    """The adapters under one directory: each folder with an `adapter_config.json`, named after the folder; or the one
    adapter that the directory itself is.
    """

    def __init__(self, directory: Path | None) -> None:
        """Raises:
        AdapterError: the directory does not exist.
        """
        self._by_name: dict[str, AdapterFolder] = {}
        if directory is None:
            return
        if not directory.is_dir():
            raise AdapterError(f"The adapters directory {directory} does not exist. Create it or drop --adapters.")
        itself = [directory.resolve()] if (directory / CONFIG_FILE).is_file() else []
        for folder in itself or sorted(config.parent for config in directory.glob(f"*/{CONFIG_FILE}")):
            digest = folder_digest(folder, (CONFIG_FILE, WEIGHTS_FILE))
            self._by_name[folder.name] = AdapterFolder(folder.name, folder, digest)

    @property
    def adapters(self) -> tuple[AdapterFolder, ...]:
        return tuple(self._by_name.values())

    def get(self, name: str) -> AdapterFolder | None:
        return self._by_name.get(name)


class AdapterSlots:
    """Which adapter is in which device slot. Pinned while a running sequence uses it, else the least
    recently used gives way.

    `pin` must be matched by one `unpin`; it is only called when `can_pin` said yes.
    """

    def __init__(self, count: int) -> None:
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._pins: dict[str, int] = {}
        self._empty = list(range(count))[::-1]

    def can_pin(self, digest: str) -> bool:
        return digest in self._slots or bool(self._empty) or len(self._pins) < len(self._slots)

    def pin(self, digest: str) -> tuple[int, bool]:
        """The adapter's slot, and whether it must be copied there first."""
        is_new = digest not in self._slots
        if is_new:
            if not self._empty:
                victim = next(adapter for adapter in self._slots if adapter not in self._pins)
                self._empty.append(self._slots.pop(victim))
            self._slots[digest] = self._empty.pop()
        self._slots.move_to_end(digest)
        self._pins[digest] = self._pins.get(digest, 0) + 1
        return self._slots[digest], is_new

    def unpin(self, digest: str) -> None:
        self._pins[digest] -= 1
        if not self._pins[digest]:
            del self._pins[digest]

    def forget(self, digest: str) -> None:
        """Frees the slot of an adapter whose copy failed; nobody pins it any more."""
        assert digest not in self._pins
        if (slot := self._slots.pop(digest, None)) is not None:
            self._empty.append(slot)

    @property
    def pinned(self) -> int:
        """How many adapters are held by running sequences."""
        return len(self._pins)
