"""Idefics3 and SmolVLM: what the engine computes is what transformers computes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.harness import picture
from tests.families.parity import Parity, Record
from tests.families.tile_checkpoints import IDEFICS3, make_idefics3
from vlm_serve.errors import CheckpointError
from vlm_serve.families import load_family
from vlm_serve.types import ImageInputs

# isort: split
from transformers import Idefics3Processor

NAMES = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}
HEADS = [(4, 4), (3, 1), (8, 2), (7, 1)]
PICTURES = (picture(1, 16, 16), picture(2, 12, 30), picture(3, 40, 15))
"""Cut into two by two tiles, a row of two, and a column of two."""


def change_json(file: Path, part: str | None = None, **changes: Any) -> None:
    """Sets values of a file, or of an object in it."""
    content = json.loads(file.read_text())
    (content[part] if part else content).update(changes)
    file.write_text(json.dumps(content))


def parity_of(folder: Path, model: Any, **settings: Any) -> Parity:
    processor = Idefics3Processor.from_pretrained(folder)
    return Parity(folder, model, processor=processor, pictures=PICTURES, **settings)


@pytest.mark.parametrize("kind", IDEFICS3)
def test_parity(tmp_path: Path, record_property: Record, kind: str) -> None:
    parity_of(tmp_path, make_idefics3(tmp_path, kind, heads=(3, 1))).check_everything(NAMES[kind], record_property)


@pytest.mark.parametrize("heads", HEADS, ids=[f"GQA{queries // keys}-H{queries}" for queries, keys in HEADS])
def test_parity_whatever_the_count_of_heads(tmp_path: Path, heads: tuple[int, int]) -> None:
    model = make_idefics3(tmp_path, "smolvlm", heads=heads, vision_heads=3, tie_word_embeddings=True)
    parity = parity_of(tmp_path, model)
    for content in parity.conversations.values():
        parity.check(content)
    parity.check_batch(*parity.conversations)


@pytest.mark.parametrize("text_type", ["mistral", "qwen2"])
def test_parity_of_images_left_whole_with_another_decoder(tmp_path: Path, text_type: str) -> None:
    model = make_idefics3(tmp_path, "idefics3", splits=False, scale_factor=4, model_type=text_type)
    parity = parity_of(tmp_path, model)
    assert parity.harness.family.max_tokens_per_image == 1
    for content in parity.conversations.values():
        parity.check(content)


def test_another_theta_is_seen(tmp_path: Path) -> None:
    model = make_idefics3(tmp_path, "idefics3")
    change_json(tmp_path / "config.json", "text_config", rope_parameters={"rope_type": "default", "rope_theta": 9e3})
    parity = parity_of(tmp_path, model)
    with pytest.raises(AssertionError, match="logits differ"):
        parity.check(parity.conversations["text"])


def test_a_missing_norm_of_the_tower_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parity = parity_of(tmp_path, make_idefics3(tmp_path, "smolvlm"))
    tower: Any = parity.harness.engine.runner.model.vision
    monkeypatch.setattr(tower.model.post_layernorm, "forward", torch.Tensor.contiguous)
    parity.check(parity.conversations["text"])
    with pytest.raises(AssertionError, match="logits differ"):
        parity.check(parity.conversations["one image"])


@pytest.mark.parametrize("kind", IDEFICS3)
@pytest.mark.parametrize("splits", [True, False], ids=["split", "whole"])
def test_tiles_equal_those_of_transformers_processor(tmp_path: Path, kind: str, splits: bool) -> None:
    """Bit for bit, and never more of them than the family tells."""
    make_idefics3(tmp_path, kind, splits=splits)
    family = load_family(tmp_path)
    processor = Idefics3Processor.from_pretrained(tmp_path)
    counts = set()
    for height, width in ((16, 16), (1, 90), (90, 1), (31, 32), (200, 200), (5, 7)):
        image = picture(0, height, width)
        tiles = [piece for piece in family.process_image(image) if isinstance(piece, ImageInputs)]
        options = {"input_data_format": "channels_last", "return_tensors": "np"}
        expected = processor.image_processor(image.pixels.copy(), **options)["pixel_values"][0]
        np.testing.assert_array_equal(np.stack([tile.tensors["pixel_values"] for tile in tiles]), expected)
        counts.add(sum(tile.num_tokens for tile in tiles))
    assert max(counts) == family.max_tokens_per_image


def test_sizes_that_do_not_fit_are_told(tmp_path: Path) -> None:
    make_idefics3(tmp_path, "smolvlm")
    change_json(tmp_path / "config.json", scale_factor=3)
    with pytest.raises(CheckpointError, match="3 by 3 patches of 4 pixels"):
        load_family(tmp_path)
    change_json(tmp_path / "config.json", scale_factor=2)
    file = next(file for file in tmp_path.glob("*processor_config.json"))
    part = "image_processor" if "image_processor" in json.loads(file.read_text()) else None
    change_json(file, part, max_image_size={"longest_edge": 8})
    with pytest.raises(CheckpointError, match=r"gives \(3, 8, 8\), but the tower takes \(3, 16, 16\)"):
        load_family(tmp_path).process_image(PICTURES[0])
    change_json(file, part, do_resize=False)
    with pytest.raises(CheckpointError, match="Set do_resize"):
        load_family(tmp_path)
