"""A Qwen-VL checkpoint is read as transformers reads it: names, towers, images of any size, prompts, positions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.families.pictures import picture, whole
from tests.families.qwen_checkpoints import KINDS, make_qwen_vl
from vlm_serve.errors import CheckpointError, ImageLimitError
from vlm_serve.families import load_family
from vlm_serve.families.qwen_vl import least_tokens, most_tokens
from vlm_serve.types import ChatInput, ChatMessage, ImagePart, TextPart

# isort: split
from transformers import AutoProcessor, PreTrainedModel, Qwen2VLImageProcessor

CPU = torch.device("cpu")
IMAGE = ImagePart(b"", "image/png")
PICTURES = [picture(24, 40), picture(60, 20, seed=1), picture(9, 100, seed=2), picture(500, 500, seed=3)]


def by_transformers(folder: Path, content: list[Any]) -> Any:
    """What its processor makes of one user message of texts and pictures."""
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part.pixels}
        for part in content
    ]
    return AutoProcessor.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def transformers_features(model: PreTrainedModel, made: Any) -> list[torch.Tensor]:
    """Each image's embeddings, with the features of deepstack beside them."""
    with torch.inference_mode():
        encoded = model.model.visual(made["pixel_values"], grid_thw=made["image_grid_thw"], return_dict=True)
    joined = torch.cat([encoded.pooler_output, *getattr(encoded, "deepstack_features", ())], dim=-1)
    return list(joined.split((made["image_grid_thw"].prod(-1) // 4).tolist()))


@pytest.mark.parametrize("names_in_memory", [False, True], ids=["published", "in memory"])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_of_images_of_all_sizes_at_once_equal_transformers(
    tmp_path: Path, kind: str, names_in_memory: bool
) -> None:
    reference = make_qwen_vl(tmp_path, kind, names_in_memory=names_in_memory, vision_heads=3)
    family = load_family(tmp_path)
    model = family.build(torch.float32, CPU)
    images = [whole(family, image) for image in PICTURES]
    expected = transformers_features(reference, by_transformers(tmp_path, PICTURES))
    assert len({inputs.grid for inputs in images}) == len(images)
    for inputs, embeddings, features in zip(images, model.encode_images(images), expected, strict=True):
        torch.testing.assert_close(embeddings, features, atol=1e-5, rtol=1e-5)
        assert len(embeddings) == inputs.num_tokens == inputs.grid[0] * inputs.grid[1]
        alone = model.encode_images([inputs])[0]
        torch.testing.assert_close(alone, embeddings, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("names_in_memory", [False, True], ids=["published", "in memory"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_of_the_decoder_comes_to_its_place(tmp_path: Path, kind: str, names_in_memory: bool) -> None:
    reference = make_qwen_vl(tmp_path, kind, names_in_memory=names_in_memory).state_dict()
    decoder = load_family(tmp_path).build(torch.float32, CPU).decoder
    attention, mlp = decoder.layers[1].self_attn, decoder.layers[1].mlp
    prefix = "model.language_model.layers.1"
    queries_keys_values = [reference[f"{prefix}.self_attn.{name}_proj.weight"] for name in "qkv"]
    gate_up = [reference[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(attention.qkv_proj.weight, torch.cat(queries_keys_values))
    assert torch.equal(mlp.gate_up_proj.weight, torch.cat(gate_up))
    assert torch.equal(decoder.lm_head.weight, reference["lm_head.weight"])
    assert torch.equal(decoder.embed_tokens.weight, reference["model.language_model.embed_tokens.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_pixels_equal_those_of_transformers_processor(tmp_path: Path, kind: str) -> None:
    """Bit for bit: of the two frames that the processor makes of an image, which are alike, one is kept."""
    make_qwen_vl(tmp_path, kind)
    family = load_family(tmp_path)
    images = [family.process_image(image) for image in PICTURES]
    chat = ChatInput(
        (ChatMessage("user", (IMAGE, IMAGE, TextPart("Compare 12 mm "), IMAGE, TextPart(" and "), IMAGE)),)
    )
    prompt = family.render_chat(chat, images)
    made = by_transformers(tmp_path, [*PICTURES[:2], "Compare 12 mm ", PICTURES[2], " and ", PICTURES[3]])
    assert list(prompt.token_ids) == made["input_ids"][0].tolist()
    pixels = np.concatenate([span.inputs.tensors["pixel_values"] for span in prompt.images])
    frames = made["pixel_values"].unflatten(1, (3, 2, 16)).numpy()
    for frame in range(2):
        np.testing.assert_array_equal(pixels.reshape(-1, 3, 16), frames[:, :, frame])
    assert pixels.dtype == np.float32


@pytest.mark.parametrize("kind", KINDS)
def test_positions_equal_those_that_transformers_gives(tmp_path: Path, kind: str) -> None:
    """Of two images in a row, of images between texts, and of the answer."""
    reference = make_qwen_vl(tmp_path, kind)
    family = load_family(tmp_path)
    made = by_transformers(tmp_path, [*PICTURES[:2], "Compare with ", *PICTURES[2:], "please."])
    is_image = made["mm_token_type_ids"][0] == 1
    starts = (is_image & ~is_image.roll(1)).nonzero()[:, 0].tolist()
    grids = [(rows // 2, columns // 2) for _, rows, columns in made["image_grid_thw"].tolist()]
    length = made["input_ids"].shape[1]
    expected, delta = reference.model.get_rope_index(
        made["input_ids"], mm_token_type_ids=made["mm_token_type_ids"], image_grid_thw=made["image_grid_thw"]
    )
    placed = list(zip(starts, grids, strict=True))
    positions = family.rope_positions(length + 3, placed)
    assert positions is not None
    assert positions.dtype == np.int64
    np.testing.assert_array_equal(positions[:, :length], expected[:, 0])
    np.testing.assert_array_equal(positions[:, length:], length + int(delta) + np.array([[0, 1, 2]] * 3))


def test_positions_of_text_alone_are_its_places(tmp_path: Path) -> None:
    make_qwen_vl(tmp_path, "qwen2_vl")
    positions = load_family(tmp_path).rope_positions(5, [])
    np.testing.assert_array_equal(positions, [[0, 1, 2, 3, 4]] * 3)


SIDE = 28
TOKENS = st.integers(1, 2000)


@settings(max_examples=300, deadline=None)
@given(fewest=TOKENS, extra=TOKENS, shorter=st.integers(1, 3000), stretch=st.floats(1, 200), upright=st.booleans())
def test_no_image_takes_more_tokens_than_the_most_or_fewer_than_the_least(
    fewest: int, extra: int, shorter: int, stretch: float, upright: bool
) -> None:
    low, high = fewest * SIDE**2, (fewest + extra) * SIDE**2
    processor = Qwen2VLImageProcessor(size={"shortest_edge": low, "longest_edge": high})
    size = (shorter, int(shorter * stretch))
    patches = processor.get_number_of_image_patches(*(reversed(size) if upright else size))
    assert least_tokens(low, high, SIDE) <= patches // 4 <= most_tokens(low, high, SIDE)


def test_the_most_tokens_follow_the_largest_area_of_the_published_checkpoints() -> None:
    assert most_tokens(56 * 56, 28 * 28 * 16384, 28) == 16384


def test_a_strip_is_refused_with_the_reason(tmp_path: Path) -> None:
    make_qwen_vl(tmp_path, "qwen2_vl")
    family = load_family(tmp_path)
    assert whole(family, picture(2, 400)).num_tokens <= family.max_tokens_per_image
    with pytest.raises(ImageLimitError, match=r"401 by 2 pixels.*200 times the shorter"):
        family.process_image(picture(2, 401))


def test_an_image_three_pixels_high_is_not_taken_for_channels_first(tmp_path: Path) -> None:
    make_qwen_vl(tmp_path, "qwen2_vl")
    image = picture(3, 50)
    image.pixels[:] = (255, 0, 102)
    pixels = whole(load_family(tmp_path), image).tensors["pixel_values"].reshape(-1, 3, 16)
    assert (pixels.std(axis=(0, 2)) < 1e-6).all()


def test_the_limits_of_pixels_are_those_of_the_checkpoint_in_either_form(tmp_path: Path) -> None:
    make_qwen_vl(tmp_path, "qwen2_5_vl")
    (tmp_path / "processor_config.json").unlink()
    common = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "merge_size": 2}
    forms: list[dict[str, Any]] = [
        {"min_pixels": 64 * 4, "max_pixels": 64 * 9},
        {"size": {"shortest_edge": 64 * 4, "longest_edge": 64 * 9}},
    ]
    for form in forms:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(common | form))
        family = load_family(tmp_path)
        assert whole(family, picture(100, 100)).grid == (3, 3)
        assert whole(family, picture(3, 3)).grid == (2, 2)
        assert family.max_tokens_per_image == most_tokens(64 * 4, 64 * 9, 8)


def test_a_processor_of_another_patch_than_the_tower_is_refused(tmp_path: Path) -> None:
    make_qwen_vl(tmp_path, "qwen2_vl")
    processor = json.loads((tmp_path / "processor_config.json").read_text())
    processor["image_processor"]["patch_size"] = 8
    (tmp_path / "processor_config.json").write_text(json.dumps(processor))
    with pytest.raises(CheckpointError, match="image processor"):
        load_family(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_as_published_is_read(tmp_path: Path, kind: str) -> None:
    """The tower is named as the model is; in Qwen2-VL and Qwen2.5-VL the decoder's fields stand beside the model's."""
    make_qwen_vl(tmp_path, kind, tie_word_embeddings=True)
    before = load_family(tmp_path).decoder_config
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["model_type"] = kind
    if kind != "qwen3_vl":
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        rope_scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        config = text | config | {"rope_theta": rope["rope_theta"], "rope_scaling": rope_scaling}
    (tmp_path / "config.json").write_text(json.dumps(config))
    family = load_family(tmp_path)
    assert family.decoder_config == before
    assert before.tie_word_embeddings
    family.build(torch.float32, CPU)


def test_tied_word_embeddings_follow_the_outer_config(tmp_path: Path) -> None:
    make_qwen_vl(tmp_path, "qwen3_vl", tie_word_embeddings=True)
    family = load_family(tmp_path)
    assert family.decoder_config.tie_word_embeddings
    decoder = family.build(torch.float32, CPU).decoder
    assert decoder.lm_head.weight is decoder.embed_tokens.weight


@pytest.mark.parametrize("prefix", ["model", "model.language_model"])
def test_an_adapters_module_names_lead_to_the_decoder(tmp_path: Path, prefix: str) -> None:
    make_qwen_vl(tmp_path, "qwen2_vl")
    renamed = load_family(tmp_path).rename(f"{prefix}.layers.0.self_attn.q_proj.weight")
    assert renamed == "decoder.layers.0.self_attn.q_proj.weight"
