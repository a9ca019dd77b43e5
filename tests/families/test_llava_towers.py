"""LLaVA in its authors' form: the towers that it names, with and without their weights, and names at full size."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_tokenizer, tiny_vision_config
from tests.families.pictures import picture, whole
from tests.families.test_llava_original import make_original_llava
from vlm_serve.decoders.decoder import Decoder
from vlm_serve.errors import CheckpointError
from vlm_serve.families import load_family
from vlm_serve.families.base import uninitialized
from vlm_serve.families.llava_original import TOWERS, OriginalLlavaFamily
from vlm_serve.layers import loading

# isort: split
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    MistralConfig,
    SiglipImageProcessor,
    SiglipVisionModel,
)
from transformers.models.clip.configuration_clip import CLIPConfig

CPU, META = torch.device("cpu"), torch.device("meta")

MED = {
    "model_type": "llava_mistral",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_hidden_size": 1024,
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
    "tune_mm_mlp_adapter": False,
    "use_mm_proj": True,
}
"""As LLaVA-Med 1.5 is published, of what it says on images."""

WIDE: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2}
"""Of a decoder as wide as those of the published models, and less deep."""

THEIRS = {
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.language_model.": "model.",
    "model.image_newline": "model.image_newline",
    "lm_head.": "lm_head.",
}


def write(folder: Path, text: Any, **changes: Any) -> Path:
    """A folder without weights."""
    make_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(text.to_dict() | MED | changes))
    return folder


@pytest.mark.parametrize(
    ("name", "tokens", "width", "layer"),
    [
        ("openai/clip-vit-large-patch14", 256, 1024, 23),
        ("openai/clip-vit-large-patch14-336", 576, 1024, 23),
        ("/home/someone/models/clip-vit-large-patch14-336/", 576, 1024, 23),
        ("google/siglip-so400m-patch14-384", 729, 1152, 26),
    ],
)
def test_towers_are_known_by_the_last_part_of_their_names(
    tmp_path: Path, name: str, tokens: int, width: int, layer: int
) -> None:
    """The last layer but one of each, and of SigLIP, which has no class token, every token."""
    family = load_family(write(tmp_path, MistralConfig(**WIDE), mm_vision_tower=name))
    assert type(family) is OriginalLlavaFamily
    inputs = whole(family, picture(100, 60))
    side = family._tower.image_size
    assert inputs.tensors["pixel_values"].shape == (3, side, side)
    assert inputs.num_tokens == family.max_tokens_per_image == tokens
    assert (family._tower.out_features, family._tower.layers) == (width, (layer,))


def test_their_configs_are_those_of_transformers() -> None:
    """Which has the 336 pixels' as LLaVA's default and, less its last layer, SigLIP's as LLaVA-OneVision's."""
    llava: Any = LlavaConfig()
    onevision: Any = LlavaOnevisionConfig()
    clip = llava.vision_config.to_dict()
    siglip = onevision.vision_config.to_dict() | {"num_hidden_layers": 27}
    for name, config in (("clip-vit-large-patch14-336", clip), ("siglip-so400m-patch14-384", siglip)):
        assert TOWERS[name].items() <= config.items()
    assert TOWERS["clip-vit-large-patch14"] == TOWERS["clip-vit-large-patch14-336"] | {"image_size": 224}


@pytest.mark.parametrize("kind", ["LLaVA 1.5", "LLaVA-Med 1.5", "LLaVA 1.6"])
def test_every_tensor_of_a_full_size_checkpoint_has_its_place(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its name and its shape; nothing is allocated."""
    changes: dict[str, Any] = {"image_aspect_ratio": "pad"}
    text: Any = MistralConfig(**WIDE)
    if kind == "LLaVA 1.5":
        text, changes["model_type"] = LlamaConfig(**WIDE | {"intermediate_size": 11008}), "llava_llama"
    with META:
        if kind == "LLaVA 1.6":
            pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
            changes |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
            changes["image_grid_pinpoints"] = pinpoints
            reference: Any = LlavaNextForConditionalGeneration(LlavaNextConfig(text_config=text))
        else:
            reference = LlavaForConditionalGeneration(LlavaConfig(text_config=text))
    family = load_family(write(tmp_path, text, **changes))
    assert family.max_tokens_per_image == (576 + 48 * 49 if kind == "LLaVA 1.6" else 576)
    tensors = {}
    for name, tensor in reference.state_dict().items():
        prefix = next(prefix for prefix in THEIRS if name.startswith(prefix))
        tensors[THEIRS[prefix] + name.removeprefix(prefix)] = tensor

    def read(*arguments: Any) -> Iterator[tuple[str, torch.Tensor]]:
        yield from tensors.items()

    monkeypatch.setattr(loading, "read_weights", read)
    with uninitialized(torch.float32, META):
        model = family.assemble(family.build_vision(), family.build_projector(), Decoder(family.decoder_config))
    loading.load_checkpoint(tmp_path, model, family.rename, family.split)
    tensors["model.mm_projector.3.weight"] = tensors.pop("model.mm_projector.2.weight")
    with pytest.raises(CheckpointError, match=r"missing: projector\.linear_2\.weight; not in the model"):
        loading.load_checkpoint(tmp_path, model, family.rename, family.split)


def without_tower(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[Path, Any]:
    """A checkpoint in LLaVA's own form that holds none of its tower's weights, and transformers' whole model."""
    ours, model = make_original_llava(folder, monkeypatch, **changes)
    tensors = load_file(ours / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "vision_tower" not in name}, ours / "model.safetensors")
    return ours, model


def embeddings_agree(folder: Path, model: Any) -> None:
    family = load_family(folder)
    inputs = [whole(family, picture(40, 60, seed)) for seed in range(2)]
    made = family.build(torch.float32, CPU).encode_images(inputs)
    pixels = torch.from_numpy(np.stack([one.tensors["pixel_values"] for one in inputs]))
    with torch.inference_mode():
        expected = model.get_image_features(pixels).pooler_output
    torch.testing.assert_close(made, list(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("whole_clip", [True, False], ids=["CLIP", "its tower alone"])
@pytest.mark.parametrize("published", [True, False], ids=["published names", "names in memory"])
def test_a_tower_in_a_folder_of_its_own_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: bool, whole_clip: bool
) -> None:
    """Whatever its name; with its own preparation of images, and as a part of the model's identity."""
    folder, model = without_tower(tmp_path, monkeypatch, mm_vision_tower="someone/clip-of-the-house")
    vision = model.config.vision_config
    if whole_clip:
        text = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        clip: Any = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32))
        clip.vision_model.load_state_dict(model.model.vision_tower.state_dict())
    else:
        clip = CLIPVisionModel(vision)
        clip.load_state_dict(model.model.vision_tower.state_dict())
    beside = folder / "vision_tower"
    clip.save_pretrained(beside, save_original_format=published)
    square = {"height": 28, "width": 28}
    mean = [0.1, 0.2, 0.3]
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=square, image_mean=mean).save_pretrained(beside)
    embeddings_agree(folder, model)
    family = load_family(folder)
    grey = picture(28, 28)
    grey.pixels[:] = 102
    first = whole(family, grey).tensors["pixel_values"][:, 0, 0]
    np.testing.assert_allclose(first, (0.4 - np.array(mean)) / CLIPImageProcessor().image_std, atol=1e-6)
    digest = family.model_digest
    tensors = load_file(beside / "model.safetensors")
    name = next(name for name in tensors if name.endswith("class_embedding"))
    save_file(tensors | {name: tensors[name] + 1}, beside / "model.safetensors")
    assert load_family(folder).model_digest != digest


def test_where_a_file_lies_is_part_of_the_identity(tmp_path: Path) -> None:
    family = load_family(write(tmp_path, MistralConfig(**WIDE)))
    (tmp_path / "vision_tower").mkdir()
    (tmp_path / "vision_tower" / "zz.json").write_text("{}")
    digest = family.model_digest
    (tmp_path / "vision_tower" / "zz.json").rename(tmp_path / "zz.json")
    assert load_family(tmp_path).model_digest != digest


def test_a_head_of_its_own_is_read_beside_a_tower_in_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = without_tower(tmp_path, monkeypatch, mm_vision_tower="someone/clip-of-the-house")
    clip: Any = CLIPVisionModel(model.config.vision_config)
    clip.save_pretrained(folder / "vision_tower")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    decoder = load_family(folder).build(torch.float32, CPU).decoder
    torch.testing.assert_close(decoder.lm_head.weight, model.lm_head.weight.detach(), rtol=0, atol=0)


def test_a_checkpoint_without_its_tower_says_what_to_add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = without_tower(tmp_path, monkeypatch)
    told = r"no weights of its vision tower, 'tiny-clip', which .* fetches by that name.*into .*ours/vision_tower\."
    with pytest.raises(CheckpointError, match=told):
        load_family(folder).build(torch.float32, CPU)
    (folder / "vision_tower").mkdir()
    with pytest.raises(CheckpointError, match=r"ours/vision_tower has no \.safetensors file"):
        load_family(folder).build(torch.float32, CPU)


def test_a_checkpoint_in_pickles_says_what_its_safetensors_must_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_original_llava(tmp_path, monkeypatch)
    (folder / "model.safetensors").rename(folder / "pytorch_model-00001-of-00002.bin")
    told = (
        r"no pickle is opened.*model\.layers.*model\.mm_projector\.0.*model\.vision_tower\.vision_tower\.vision_model"
    )
    with pytest.raises(CheckpointError, match=told):
        load_family(folder).build(torch.float32, CPU)


def test_an_unknown_tower_says_where_its_own_folder_goes(tmp_path: Path) -> None:
    write(tmp_path, MistralConfig(**WIDE), mm_vision_tower="someone/else")
    with pytest.raises(CheckpointError, match=r"mm_vision_tower is 'someone/else'.*clip-vit-large.*/vision_tower"):
        load_family(tmp_path)


@pytest.mark.parametrize("published", [True, False], ids=["published names", "names in memory"])
def test_siglip_gives_all_its_tokens_of_the_last_layer_but_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: bool
) -> None:
    """As LLaVA's forks take it, which cut the last layer off; `patch` drops nothing of it."""
    folder, model = without_tower(tmp_path, monkeypatch, mm_vision_tower="tiny-siglip")
    monkeypatch.setitem(TOWERS, "tiny-siglip", tiny_vision_config("siglip").to_dict())
    torch.manual_seed(1)
    vision: Any = tiny_vision_config("siglip")
    siglip: Any = SiglipVisionModel(vision).eval()
    for parameter in siglip.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    siglip.save_pretrained(folder / "vision_tower", save_original_format=published)
    family = load_family(folder)
    image = picture(40, 60)
    inputs = whole(family, image)
    processor = SiglipImageProcessor(size={"height": 28, "width": 28})
    pixels = processor(image.pixels, input_data_format="channels_last", return_tensors="pt").pixel_values
    np.testing.assert_array_equal(inputs.tensors["pixel_values"], pixels[0].numpy())
    with torch.inference_mode():
        states = siglip(pixels, output_hidden_states=True).hidden_states[-2]
        expected = model.model.multi_modal_projector(states)[0]
    (made,) = family.build(torch.float32, CPU).encode_images([inputs])
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)
    assert family.max_tokens_per_image == len(made) == 16
