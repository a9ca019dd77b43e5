"""LLaVA-NeXT: what the engine computes is what transformers computes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.harness import picture
from tests.families.parity import Parity, Record
from tests.families.tile_checkpoints import RESOLUTIONS, make_llava_next
from vlm_serve.errors import CheckpointError, ImageLimitError
from vlm_serve.families import load_family
from vlm_serve.families.llava_next import layout
from vlm_serve.types import ImageInputs

# isort: split
from transformers import AutoProcessor
from transformers.models.llava_next.modeling_llava_next import unpad_image

TOWERS = {"clip": "CLIP", "siglip": "SigLIP"}
HEADS = [(4, 4), (3, 1), (8, 2), (7, 1)]
PICTURES = (picture(1, 20, 16), picture(2, 9, 26), picture(3, 40, 14))


@pytest.mark.parametrize("vision", TOWERS)
def test_parity(tmp_path: Path, record_property: Record, vision: str) -> None:
    parity = Parity(tmp_path, make_llava_next(tmp_path, vision, heads=(3, 1)), pictures=PICTURES)
    parity.check_everything(f"LLaVA-NeXT, {TOWERS[vision]}", record_property)


@pytest.mark.parametrize("heads", HEADS, ids=[f"GQA{queries // keys}-H{queries}" for queries, keys in HEADS])
def test_parity_whatever_the_count_of_heads(tmp_path: Path, heads: tuple[int, int]) -> None:
    model = make_llava_next(tmp_path, heads=heads, feature_layer=[-3, -1], names_in_memory=True)
    parity = Parity(tmp_path, model, pictures=PICTURES)
    for content in parity.conversations.values():
        parity.check(content)
    parity.check_batch(*parity.conversations)


@pytest.mark.parametrize("text_type", ["mistral", "qwen2"])
def test_parity_with_another_decoder(tmp_path: Path, text_type: str) -> None:
    parity = Parity(tmp_path, make_llava_next(tmp_path, model_type=text_type), pictures=PICTURES)
    parity.check(parity.conversations["images and text"])


def test_another_theta_is_seen(tmp_path: Path) -> None:
    model = make_llava_next(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 9e3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    parity = Parity(tmp_path, model, pictures=PICTURES)
    with pytest.raises(AssertionError, match="logits differ"):
        parity.check(parity.conversations["text"])


def test_rows_that_end_in_nothing_are_seen(tmp_path: Path) -> None:
    parity = Parity(tmp_path, make_llava_next(tmp_path), pictures=PICTURES)
    projector: Any = parity.harness.engine.runner.model.projector
    projector.image_newline.zero_()
    parity.check(parity.conversations["text"])
    with pytest.raises(AssertionError, match="logits differ"):
        parity.check(parity.conversations["one image"])


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 5))
@settings(deadline=None)
def test_what_is_left_of_the_padding_is_what_transformers_leaves(height: int, width: int, side: int) -> None:
    resolutions = [(rows, columns) for rows, columns in RESOLUTIONS]
    place = layout(height, width, resolutions, tile=12, side=side)
    assert (place.rows * 12, place.columns * 12) in resolutions
    rows, columns = place.rows * side, place.columns * side
    whole = torch.arange(rows * columns).view(1, rows, columns)
    kept_rows, kept_columns = place.grid(side)
    kept = whole[:, place.top : place.top + kept_rows, place.left : place.left + kept_columns]
    assert torch.equal(kept, unpad_image(whole, (height, width)))


def test_pixels_equal_those_of_transformers_processor(tmp_path: Path) -> None:
    """Bit for bit, and never more tokens than the family tells."""
    make_llava_next(tmp_path)
    family = load_family(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path).image_processor
    counts = set()
    for height, width in ((12, 12), (4, 90), (90, 4), (31, 32), (200, 200), (5, 7), (30, 10)):
        image = picture(0, height, width)
        (inputs,) = family.process_image(image)
        assert isinstance(inputs, ImageInputs)
        made = processor(image.pixels.copy(), input_data_format="channels_last", return_tensors="np")
        np.testing.assert_array_equal(inputs.tensors["pixel_values"], made["pixel_values"][0])
        counts.add(inputs.num_tokens)
    assert max(counts) == family.max_tokens_per_image == 9 + 6 * 7


def test_a_strip_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    """Half of an odd count of rows is padding above it, half below, and one row is left; of an even count none is."""
    make_llava_next(tmp_path / "odd", patch_size=4)
    make_llava_next(tmp_path / "even", patch_size=6)
    strip = picture(0, 3, 400)
    (inputs,) = load_family(tmp_path / "odd").process_image(strip)
    assert isinstance(inputs, ImageInputs)
    assert inputs.num_tokens == 9 + 6 + 1
    with pytest.raises(ImageLimitError, match="400 by 3 pixels: so thin a strip"):
        load_family(tmp_path / "even").process_image(strip)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"image_grid_pinpoints": [[12, 30]]}, "whole tiles of 12 pixels"),
        ({"image_grid_pinpoints": []}, "whole tiles of 12 pixels"),
        ({"vision_feature_select_strategy": "full"}, "keeps the tower's class token"),
    ],
)
def test_a_config_that_cannot_be_is_told(tmp_path: Path, changes: dict[str, object], told: str) -> None:
    make_llava_next(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=told):
        load_family(tmp_path)
