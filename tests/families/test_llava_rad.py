"""LLaVA-Rad is what timm's tower, its authors' projector and transformers' decoder make of the same weights."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.engine.harness import picture
from tests.families.parity import Parity, Record
from tests.families.pictures import whole
from tests.families.rad_checkpoints import CONFIG, TOKENS, RadProcessor, make_llava_rad
from vlm_serve.errors import CheckpointError
from vlm_serve.families import load_family

CPU = torch.device("cpu")


def test_parity(tmp_path: Path, record_property: Record) -> None:
    """Also of an adapter as its authors train and publish theirs, on the decoder alone."""
    model = make_llava_rad(tmp_path)
    Parity(tmp_path, model, processor=RadProcessor()).check_everything("LLaVA-Rad", record_property)


@pytest.mark.parametrize("form", ["merged", "beside", "one file"])
@pytest.mark.parametrize("tower", ["test_vit", "test_vit3"])
def test_the_tower_is_read_in_whichever_form_it_lies_there(
    tmp_path: Path, form: Literal["merged", "beside", "one file"], tower: str
) -> None:
    """`test_vit3` scales its layers, as the published tower does."""
    parity = Parity(tmp_path, make_llava_rad(tmp_path, form, tower=tower), processor=RadProcessor())
    parity.check(parity.conversations["images and text"])


def test_a_tower_cut_off_elsewhere_is_seen(tmp_path: Path) -> None:
    parity = Parity(tmp_path, make_llava_rad(tmp_path, mm_vision_select_layer=-1), processor=RadProcessor())
    parity.check(parity.conversations["text"])
    with pytest.raises(AssertionError, match="logits differ"):
        parity.check(parity.conversations["one image"])


@pytest.mark.parametrize(("layer", "feature", "tokens"), [(-6, "patch", TOKENS), (6, "cls_patch", TOKENS + 1)])
def test_the_first_and_the_last_layer_can_be_taken(tmp_path: Path, layer: int, feature: str, tokens: int) -> None:
    model = make_llava_rad(tmp_path, mm_vision_select_layer=layer, mm_vision_select_feature=feature)
    family = load_family(tmp_path)
    inputs = whole(family, picture(1))
    (embeddings,) = family.build(torch.float32, CPU).encode_images([inputs])
    pixels = torch.from_numpy(inputs.tensors["pixel_values"])[None]
    with torch.inference_mode():
        states = model.vit.norm_pre(model.vit._pos_embed(model.vit.patch_embed(pixels)))
        for block in model.vit.blocks[: layer % 7]:
            states = block(states)
        expected = model.mm_projector(states[0, -tokens:])
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=1e-5)
    assert family.max_tokens_per_image == inputs.num_tokens == tokens


@pytest.mark.parametrize("size", [(48, 48), (20, 90), (700, 333), (31, 47)])
def test_pixels_are_those_of_open_clips_transform_bit_for_bit(tmp_path: Path, size: tuple[int, int]) -> None:
    make_llava_rad(tmp_path)
    image = picture(3, *size)
    expected = RadProcessor().transform(Image.fromarray(image.pixels))
    np.testing.assert_array_equal(whole(load_family(tmp_path), image).tensors["pixel_values"], expected.numpy())


def test_the_published_tower_is_known_without_its_config(tmp_path: Path) -> None:
    """DINOv2's ViT-B/14 for 518 pixels, of which the last layer is not used."""
    make_llava_rad(tmp_path)
    (tmp_path / "biomedclipcxr_518.json").unlink()
    family = load_family(tmp_path)
    inputs = whole(family, picture(1, 600, 700))
    assert inputs.tensors["pixel_values"].shape == (3, 518, 518)
    assert (inputs.grid, inputs.num_tokens) == ((37, 37), 1369)
    with torch.device("meta"):
        tower = family.build_vision()
    assert tower is not None
    names = {name for name, _ in tower.named_parameters()}
    assert {"model.blocks.10.ls2.gamma", "model.cls_token", "model.pos_embed"} <= names
    assert not any(name.startswith(("model.blocks.11.", "model.norm.")) for name in names)


def edit(folder: Path, file: str, **changes: Any) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | changes))


def test_the_adapter_as_published_says_what_makes_a_model_of_it(tmp_path: Path) -> None:
    """Its folder holds pickles, which are not opened, and no decoder."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}))
    told = r"adapter of lmsys/vicuna-7b-v1\.5, no whole model.*merge_lora_weights.*mm_projector.*visual\.trunk"
    with pytest.raises(CheckpointError, match=told):
        load_family(tmp_path)


def test_a_tower_that_is_missing_is_told(tmp_path: Path) -> None:
    make_llava_rad(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "vision_tower" not in name}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no weights of its vision tower, 'biomedclip_cxr_518'.*vision_tower"):
        load_family(tmp_path).build(torch.float32, CPU)


def test_a_tower_without_a_layer_is_told_by_its_name(tmp_path: Path) -> None:
    make_llava_rad(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.vision_tower.vision_tower.vit.blocks.4.norm1.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: vision\.model\.blocks\.4\.norm1\.weight"):
        load_family(tmp_path).build(torch.float32, CPU)


@pytest.mark.parametrize(
    ("vision", "told"),
    [
        ({"timm_model_name": "eva02_tiny_patch14_224", "image_size": 224}, "no plain vision transformer"),
        ({"timm_model_name": "no_such", "image_size": 48}, "timm has no model 'no_such'"),
        ({"timm_model_name": "test_vit3", "image_size": [48, 48]}, "image_size as one number"),
        ({"timm_model_name": "test_vit3", "image_size": 10**7}, "image_size as one number from 1 to 131072"),
        ({"timm_model_name": "test_vit3", "image_size": True}, "image_size as one number"),
        ({"timm_model_name": "test_vit3", "image_size": 0}, "image_size as one number"),
        ({"layers": 12, "image_size": 48}, "no timm_model_name"),
        ([1], "no timm_model_name"),
    ],
)
def test_a_tower_that_is_not_served_is_refused(tmp_path: Path, vision: object, told: str) -> None:
    make_llava_rad(tmp_path)
    edit(tmp_path, "biomedclipcxr_518.json", vision_cfg=vision)
    with pytest.raises(CheckpointError, match=told):
        load_family(tmp_path)


def test_a_towers_config_that_is_none_is_refused(tmp_path: Path) -> None:
    make_llava_rad(tmp_path)
    edit(tmp_path, "biomedclipcxr_518.json", model_cfg=[1])
    with pytest.raises(CheckpointError, match="no timm_model_name"):
        load_family(tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mm_vision_select_layer": 7}, "the tower has 6 layers"),
        ({"mm_vision_select_layer": 0}, "the tower has 6 layers"),
        ({"mm_vision_select_layer": [-2, -3]}, r"mm_vision_select_layer in .* one whole number"),
        ({"mm_vision_tower_config": 5}, r"mm_vision_tower_config in .* is 5; it must be a file's name"),
        ({"mm_vision_tower": ["a"]}, r"mm_vision_tower in .* must be a name"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
    ],
)
def test_a_choice_that_cannot_be_is_told(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    make_llava_rad(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=told):
        load_family(tmp_path)


def test_another_open_clip_tower_needs_its_config(tmp_path: Path) -> None:
    make_llava_rad(tmp_path, mm_vision_tower="biomedclip_384", mm_vision_tower_config="x/biomedclip_384.json")
    config = tmp_path / "biomedclipcxr_518.json"
    config.rename(tmp_path / "biomedclip_384.json")
    assert load_family(tmp_path).max_tokens_per_image == TOKENS
    (tmp_path / "biomedclip_384.json").unlink()
    with pytest.raises(CheckpointError, match=r"'biomedclip_384', whose config 'x/biomedclip_384\.json' is not in"):
        load_family(tmp_path)
