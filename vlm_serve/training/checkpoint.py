"""The checkpoint of a fine-tuning run: one file, whole or not there, taken up only by the run that it belongs to."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

CHECKPOINT_FILE = "checkpoint.pt"


def write_checkpoint(work: Path, identity: str, state: dict[str, Any]) -> None:
    """Replaces the folder's checkpoint; a process that dies in between leaves the old one.

    Args:
        work: made if need be.
        identity: of the run: its data, model and settings.
        state: tensors and plain values.
    """
    work.mkdir(parents=True, exist_ok=True)
    draft = work / f"{CHECKPOINT_FILE}.{os.getpid()}.tmp"
    with draft.open("wb") as file:
        torch.save({"identity": identity, "state": state}, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(work / CHECKPOINT_FILE)


def read_checkpoint(work: Path, identity: str) -> dict[str, Any] | None:
    """The state that was written for this run; None if there is none, or one of another run."""
    try:
        content = torch.load(work / CHECKPOINT_FILE, map_location="cpu", weights_only=True)
    except (FileNotFoundError, EOFError, RuntimeError, pickle.UnpicklingError):
        return None
    if content.get("identity") != identity:
        return None
    state: dict[str, Any] = content["state"]
    return state
