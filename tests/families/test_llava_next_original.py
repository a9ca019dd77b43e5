"""LLaVA 1.6 (NeXT) in its authors' form is what transformers makes of the same weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.engine.harness import picture
from tests.families.parity import Record
from tests.families.test_llava_original import OriginalParity
from tests.families.tile_checkpoints import make_llava_next
from vlm_serve.errors import CheckpointError
from vlm_serve.families import load_family
from vlm_serve.families.llava_original import TOWERS
from vlm_serve.types import ImageInputs

# isort: split
from transformers import AutoProcessor

PICTURES = (picture(1, 20, 16), picture(2, 9, 26), picture(3, 40, 14))
THEIRS = {
    "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "image_newline": "model.image_newline",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
RESOLUTIONS = [[12, 24], [36, 12], [24, 24]]
"""Heights and widths, as transformers has them: the widest is no tallest."""


def make(
    root: Path, monkeypatch: pytest.MonkeyPatch, kind: str = "llava_mistral", *, as_text: bool = False, **changes: Any
) -> tuple[Path, Any, Any]:
    """Writes a checkpoint in LLaVA's own form, and returns its folder, transformers' model and its processor.

    Args:
        as_text: whether the resolutions stand in the config as the text of a list of tuples.
    """
    model = make_llava_next(root / "hf", heads=(3, 1), model_type="mistral" if kind == "llava_mistral" else "llama")
    model.config.image_grid_pinpoints = RESOLUTIONS
    processor = AutoProcessor.from_pretrained(root / "hf")
    processor.image_processor.image_grid_pinpoints = RESOLUTIONS
    processor.save_pretrained(root / "hf")
    monkeypatch.setitem(TOWERS, "tiny-clip", model.config.vision_config.to_dict())
    folder = root / "ours"
    processor.tokenizer.chat_template = processor.chat_template
    processor.tokenizer.save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(root / "hf" / "model.safetensors").items():
        prefix = next(prefix for prefix in THEIRS if name.startswith(prefix))
        tensors[THEIRS[prefix] + name.removeprefix(prefix)] = tensor
    save_file(tensors, folder / "model.safetensors")
    pinpoints = [(width, height) for height, width in RESOLUTIONS]
    theirs = {
        "model_type": kind,
        "mm_vision_tower": "someone/tiny-clip",
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": str(pinpoints) if as_text else pinpoints,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
    }
    (folder / "config.json").write_text(json.dumps(model.config.text_config.to_dict() | theirs | changes))
    return folder, model, processor


@pytest.mark.parametrize(("kind", "as_text"), [("llava_mistral", False), ("llava_llama", True)])
def test_parity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record, kind: str, as_text: bool
) -> None:
    folder, model, _ = make(tmp_path, monkeypatch, kind, as_text=as_text)
    row = f"LLaVA-NeXT, its authors' form, {kind}"
    OriginalParity(folder, model, pictures=PICTURES).check_everything(row, record_property)


def test_another_newline_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model, _ = make(tmp_path, monkeypatch)
    parity = OriginalParity(folder, model, pictures=PICTURES)
    parity.check(parity.conversations["text"])
    projector: Any = parity.harness.engine.runner.model.projector
    projector.image_newline.zero_()
    with pytest.raises(AssertionError, match="logits differ"):
        parity.check(parity.conversations["one image"])


def test_pixels_equal_those_of_transformers_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _, processor = make(tmp_path, monkeypatch)
    family = load_family(folder)
    for height, width in ((12, 12), (90, 4), (31, 32), (5, 7), (10, 30)):
        image = picture(0, height, width)
        (inputs,) = family.process_image(image)
        assert isinstance(inputs, ImageInputs)
        made = processor.image_processor(image.pixels, input_data_format="channels_last", return_tensors="np")
        np.testing.assert_array_equal(inputs.tensors["pixel_values"], made["pixel_values"][0])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type is 'flat'"),
        (
            {"image_grid_pinpoints": "(1x1),...,(6x6)"},
            r"image_grid_pinpoints is '\(1x1\),...,\(6x6\)'; it must be a list",
        ),
        ({"image_grid_pinpoints": None}, "image_grid_pinpoints is None; it must be a list"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio is 'anyres_max_9'"),
        ({"image_aspect_ratio": "pad"}, "mm_patch_merge_type is 'spatial_unpad'"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], told: str
) -> None:
    folder, _, _ = make(tmp_path, monkeypatch, **changes)
    with pytest.raises(CheckpointError, match=told):
        load_family(folder)
