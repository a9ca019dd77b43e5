"""InternVL: what the engine computes is what transformers computes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.harness import picture
from tests.families.parity import Parity, Record
from tests.families.tile_checkpoints import make_internvl
from vlm_serve.errors import CheckpointError
from vlm_serve.families import load_family
from vlm_serve.types import ImageInputs

# isort: split
from transformers import AutoProcessor

# transformers' own processor before 5.23: it sums a tensor by numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")

HEADS = [(4, 4), (3, 1), (8, 2), (7, 1)]
PICTURES = (picture(1, 28, 28), picture(2, 12, 24), picture(3, 40, 14))


def test_parity(tmp_path: Path, record_property: Record) -> None:
    parity = Parity(tmp_path, make_internvl(tmp_path, heads=(3, 1)), pictures=PICTURES)
    parity.check_everything("InternVL", record_property)


@pytest.mark.parametrize("heads", HEADS, ids=[f"GQA{queries // keys}-H{queries}" for queries, keys in HEADS])
def test_parity_whatever_the_count_of_heads(tmp_path: Path, heads: tuple[int, int]) -> None:
    """With the large towers' RMS norms, and norms of queries and keys."""
    large = {"norm_type": "rms_norm", "use_qk_norm": True, "use_mean_pooling": False, "attention_bias": True}
    model = make_internvl(
        tmp_path,
        heads=heads,
        vision_heads=3,
        vision_changes=large,
        names_in_memory=True,
        tie_word_embeddings=True,
    )
    parity = Parity(tmp_path, model, pictures=PICTURES)
    for content in parity.conversations.values():
        parity.check(content)
    parity.check_batch(*parity.conversations)


def test_parity_with_a_llama(tmp_path: Path) -> None:
    parity = Parity(tmp_path, make_internvl(tmp_path, model_type="llama"), pictures=PICTURES)
    parity.check(parity.conversations["images and text"])


def test_another_theta_is_seen(tmp_path: Path) -> None:
    model = make_internvl(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 9e3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    parity = Parity(tmp_path, model, pictures=PICTURES)
    with pytest.raises(AssertionError, match="logits differ"):
        parity.check(parity.conversations["text"])


def test_a_missing_norm_of_the_projector_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parity = Parity(tmp_path, make_internvl(tmp_path), pictures=PICTURES)
    projector: Any = parity.harness.engine.runner.model.projector
    monkeypatch.setattr(projector.layer_norm, "forward", torch.Tensor.contiguous)
    parity.check(parity.conversations["text"])
    with pytest.raises(AssertionError, match="logits differ"):
        parity.check(parity.conversations["one image"])


def test_tiles_equal_those_of_transformers_processor(tmp_path: Path) -> None:
    """Bit for bit, and never more of them than the family tells."""
    make_internvl(tmp_path)
    family = load_family(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path).image_processor
    options = {"input_data_format": "channels_last", "return_tensors": "np", "crop_to_patches": True}
    counts = set()
    for height, width in ((16, 16), (1, 90), (90, 1), (31, 32), (200, 200), (5, 7)):
        image = picture(0, height, width)
        tiles = [piece for piece in family.process_image(image) if isinstance(piece, ImageInputs)]
        expected = processor(image.pixels.copy(), **options)["pixel_values"]
        np.testing.assert_array_equal(np.stack([tile.tensors["pixel_values"] for tile in tiles]), expected)
        counts.add(sum(tile.num_tokens for tile in tiles))
    assert max(counts) == family.max_tokens_per_image == 5 * 4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"vision_feature_layer": -2}, "vision_feature_layer is -2"),
        ({"vision_feature_select_strategy": "full"}, "only those with -1 and 'default' are served"),
        ({"downsample_ratio": 1 / 3}, "3 by 3 patches of 4 pixels"),
    ],
)
def test_a_config_that_cannot_be_is_told(tmp_path: Path, changes: dict[str, object], told: str) -> None:
    make_internvl(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=told):
        load_family(tmp_path)
