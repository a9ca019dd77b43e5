"""LLaVA in transformers' form: what the engine computes is what transformers computes."""

import json
from pathlib import Path

import pytest

from tests.checkpoints import make_llava
from tests.families.parity import Parity, Record

HEADS = [(4, 4), (3, 1), (8, 2), (7, 1)]
TOWERS = {"clip": "CLIP", "siglip": "SigLIP"}


@pytest.mark.parametrize("vision", TOWERS)
def test_parity(tmp_path: Path, record_property: Record, vision: str) -> None:
    Parity(tmp_path, make_llava(tmp_path, vision)).check_everything(f"LLaVA, {TOWERS[vision]}", record_property)


@pytest.mark.parametrize("heads", HEADS, ids=[f"GQA{queries // keys}-H{queries}" for queries, keys in HEADS])
def test_parity_whatever_the_count_of_heads(tmp_path: Path, heads: tuple[int, int]) -> None:
    queries, keys = heads
    shape = {"num_attention_heads": queries, "num_key_value_heads": keys, "hidden_size": 16 * queries}
    parity = Parity(tmp_path, make_llava(tmp_path, names="hub", feature_layer=[-3, -1], **shape))
    parity.check_batch(*parity.conversations)


def test_another_layer_of_the_tower_is_seen(tmp_path: Path) -> None:
    model = make_llava(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_feature_layer": -3}))
    parity = Parity(tmp_path, model)
    parity.check(parity.conversations["text"])
    with pytest.raises(AssertionError, match="logits differ"):
        parity.check(parity.conversations["one image"])
