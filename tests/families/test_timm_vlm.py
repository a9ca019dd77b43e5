"""A timm tower before a text model: the whole image in a square, embeddings in order, weights by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.checkpoints import make_timm_vlm
from tests.families.pictures import picture, whole
from vlm_serve.errors import CheckpointError
from vlm_serve.families import load_family, resolve_model
from vlm_serve.families.timm_vlm import letterbox
from vlm_serve.types import ChatInput, ChatMessage, ImageInputs, ImagePart, TextPart

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((40, 80), (16, 48, 0, 64)),
        ((80, 40), (0, 64, 16, 48)),
        ((50, 50), (0, 64, 0, 64)),
        ((1, 4000), (31, 32, 0, 64)),
    ],
)
def test_a_letterboxed_image_is_whole_and_centred_on_black(shape: tuple[int, int], box: tuple[int, ...]) -> None:
    square = letterbox(np.full((*shape, 3), 200, np.uint8), 64)
    top, bottom, left, right = box
    assert square.shape == (64, 64, 3)
    assert (square[top:bottom, left:right] == 200).all()
    assert square.sum() == 200 * 3 * (bottom - top) * (right - left), "the rest is black"


def test_pixels_are_normalised_channels_first(tmp_path: Path) -> None:
    make_timm_vlm(tmp_path)
    image = picture(160, 160)
    inputs = whole(load_family(tmp_path), image)
    expected = image.pixels.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(inputs.tensors["pixel_values"], expected, atol=1e-6)
    assert (inputs.grid, inputs.num_tokens) == ((4, 4), 16)


@pytest.mark.parametrize("vision", ["test_vit", "test_efficientnet"])
def test_a_batch_of_mixed_shapes_gives_each_images_own_embeddings_in_order(tmp_path: Path, vision: str) -> None:
    make_timm_vlm(tmp_path, vision)
    family = load_family(tmp_path)
    model = family.build(torch.float32, CPU)
    images = [whole(family, picture(50 + 10 * seed, 60, seed)) for seed in range(5)]
    if vision == "test_efficientnet":  # it takes any size; every second image is smaller
        images[1::2] = [
            ImageInputs.create({"pixel_values": i.tensors["pixel_values"][:, :128, :128]}, i.grid, i.num_tokens)
            for i in images[1::2]
        ]
    together = model.encode_images(images)
    for inputs, embeddings in zip(images, together, strict=True):
        torch.testing.assert_close(embeddings, model.encode_images([inputs])[0], atol=1e-5, rtol=1e-5)
        assert embeddings.shape == (16, 64)


def test_one_shape_is_one_forward(tmp_path: Path) -> None:
    make_timm_vlm(tmp_path)
    family = load_family(tmp_path)
    model = family.build(torch.float32, CPU)
    sizes: list[int] = []
    model.vision.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    model.encode_images([whole(family, picture(seed=seed)) for seed in range(3)])
    assert sizes == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_built_in_the_dtype_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    make_timm_vlm(tmp_path, "test_efficientnet")
    model = load_family(tmp_path).build(dtype, CPU)
    assert {tensor.dtype for tensor in model.parameters()} == {dtype}
    assert not any(module.training for module in model.modules())
    assert torch.get_default_dtype() == torch.float32


def test_tied_word_embeddings_need_no_second_copy(tmp_path: Path) -> None:
    make_timm_vlm(tmp_path, tie_word_embeddings=True)
    decoder = load_family(tmp_path).build(torch.float32, CPU).decoder
    assert decoder.lm_head.weight is decoder.embed_tokens.weight


def test_an_adapter_of_the_plain_text_model_fits(tmp_path: Path) -> None:
    make_timm_vlm(tmp_path)
    renamed = load_family(tmp_path).rename("model.layers.1.mlp.up_proj.weight")
    assert renamed == "decoder.layers.1.mlp.up_proj.weight"


def test_a_chat_with_an_image_is_rendered(tmp_path: Path) -> None:
    make_timm_vlm(tmp_path)
    family = load_family(tmp_path)
    chat = ChatInput((ChatMessage("user", (ImagePart(b"", "image/png"), TextPart("What?"))),))
    prompt = family.render_chat(chat, [family.process_image(picture())])
    assert prompt.token_ids.count(family.image_token_id) == 16
    assert family.notice == "A tiny model with random weights."


@pytest.mark.parametrize("field", ["text_config", "vision", "image_token_id", "projector"])
def test_a_config_that_lacks_a_field_is_refused_by_its_name(tmp_path: Path, field: str) -> None:
    make_timm_vlm(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config[field]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=field):
        load_family(tmp_path)


def test_what_is_no_checkpoint_folder_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model folder"):
        resolve_model(str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_family(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_family(tmp_path)
    assert resolve_model(str(tmp_path)) == tmp_path
