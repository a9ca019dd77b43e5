"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: what the engine computes is what transformers computes."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.families.parity import Parity, Record
from tests.families.qwen_checkpoints import KINDS, make_qwen_vl
from vlm_serve.families.qwen_vl import QwenVlFamily

NAMES = {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}
HEADS = [(4, 4), (3, 1), (8, 2), (7, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_parity(tmp_path: Path, record_property: Record, kind: str) -> None:
    Parity(tmp_path, make_qwen_vl(tmp_path, kind, heads=(3, 1))).check_everything(NAMES[kind], record_property)


@pytest.mark.parametrize("heads", HEADS, ids=[f"GQA{queries // keys}-H{queries}" for queries, keys in HEADS])
@pytest.mark.parametrize("kind", KINDS)
def test_parity_whatever_the_count_of_heads(tmp_path: Path, kind: str, heads: tuple[int, int]) -> None:
    parity = Parity(tmp_path, make_qwen_vl(tmp_path, kind, heads=heads, vision_heads=3, tie_word_embeddings=True))
    for content in parity.conversations.values():
        parity.check(content)
    parity.check_batch(*parity.conversations)


FAULTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "another theta": ("qwen2_vl", "text_config", {"rope_parameters": {"rope_theta": 9e3, "mrope_section": [2, 3, 3]}}),
    "a row for a column": (
        "qwen3_vl",
        "text_config",
        {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [4, 3, 1]}},
    ),
    "windows in another layer": ("qwen2_5_vl", "vision_config", {"fullatt_block_indexes": [2]}),
    "deepstack from another layer": ("qwen3_vl", "vision_config", {"deepstack_visual_indexes": [0, 1]}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_config_is_seen(tmp_path: Path, fault: str) -> None:
    kind, part, changes = FAULTS[fault]
    model = make_qwen_vl(tmp_path, kind)
    config = json.loads((tmp_path / "config.json").read_text())
    config[part] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    parity = Parity(tmp_path, model)
    with pytest.raises(AssertionError, match="logits differ"):
        parity.check(parity.conversations["images and text"])


@pytest.mark.parametrize("kind", KINDS)
def test_positions_in_one_axis_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(QwenVlFamily, "rope_positions", lambda *_: None)
    parity = Parity(tmp_path, make_qwen_vl(tmp_path, kind))
    parity.check(parity.conversations["text"])
    with pytest.raises(AssertionError, match="logits differ"):
        parity.check(parity.conversations["one image"])
