"""A tiny checkpoint of every family that takes images, for tests that ask the same of each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import make_llava, make_timm_vlm
from tests.families.gemma_checkpoints import make_gemma3, make_paligemma
from tests.families.qwen_checkpoints import make_qwen_vl
from tests.families.test_llava_original import make_original_llava
from tests.families.tile_checkpoints import make_idefics3, make_internvl, make_llava_next

Make = Callable[[Path, pytest.MonkeyPatch], Path]
"""Writes a checkpoint under a folder and returns its own; the patch is for as long as it is read."""


def _made(make: Callable[..., Any], *arguments: Any, **changes: Any) -> Make:
    def made(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        make(root / "tiny", *arguments, **changes)
        return root / "tiny"

    return made


FAMILIES: dict[str, Make] = {
    "LLaVA": _made(make_llava),
    "LLaVA, original": lambda root, monkeypatch: make_original_llava(root, monkeypatch)[0],
    "LLaVA-NeXT": _made(make_llava_next),
    "Gemma3": _made(make_gemma3),
    "Gemma3, pan and scan": _made(make_gemma3, pan_and_scan=True),
    "PaliGemma": _made(make_paligemma),
    "Qwen2-VL": _made(make_qwen_vl, "qwen2_vl"),
    "Qwen2.5-VL": _made(make_qwen_vl, "qwen2_5_vl"),
    "Qwen3-VL": _made(make_qwen_vl, "qwen3_vl"),
    "Idefics3": _made(make_idefics3, "idefics3"),
    "SmolVLM": _made(make_idefics3, "smolvlm"),
    "InternVL": _made(make_internvl),
    "timm": _made(make_timm_vlm),
    "timm, convolutions": _made(make_timm_vlm, "test_efficientnet", image_size=128),
}
