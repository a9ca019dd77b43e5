"""A LLaVA checkpoint is read as transformers reads it: names, towers, images, prompts, embeddings."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm_serve.errors import CheckpointError
from vlm_serve.families import load_family
from vlm_serve.families.llava import LlavaFamily
from vlm_serve.types import ChatInput, ChatMessage, ImagePart, TextPart

# isort: split
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tests.checkpoints import make_llava
from tests.families.pictures import picture, whole

CPU = torch.device("cpu")
IMAGE = ImagePart(b"", "image/png")


def transformers_features(model: LlavaForConditionalGeneration, pixels: list[np.ndarray]) -> torch.Tensor:
    with torch.inference_mode():
        features = model.get_image_features(torch.from_numpy(np.stack(pixels)))
    return torch.stack(list(features.pooler_output))


@pytest.mark.parametrize("names", ["saved", "hub", "in_memory"])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_image_embeddings_equal_transformers_whatever_the_names_of_the_weights(
    tmp_path: Path, vision: str, names: Literal["saved", "hub", "in_memory"]
) -> None:
    reference = make_llava(tmp_path, vision, names=names, sharded=names != "saved")
    family = load_family(tmp_path)
    model = family.build(torch.float32, CPU)
    images = [whole(family, picture(seed=seed)) for seed in range(3)]
    expected = transformers_features(reference, [inputs.tensors["pixel_values"] for inputs in images])
    embeddings = model.encode_images(images)
    torch.testing.assert_close(torch.stack(embeddings), expected, atol=1e-5, rtol=1e-5)
    assert [len(tokens) for tokens in embeddings] == [inputs.num_tokens for inputs in images]


@pytest.mark.parametrize("names", ["saved", "hub", "in_memory"])
def test_every_weight_of_the_decoder_comes_to_its_place(
    tmp_path: Path, names: Literal["saved", "hub", "in_memory"]
) -> None:
    reference = make_llava(tmp_path, names=names).state_dict()
    decoder = load_family(tmp_path).build(torch.float32, CPU).decoder
    attention, mlp = decoder.layers[1].self_attn, decoder.layers[1].mlp
    prefix = "model.language_model.layers.1"
    queries_keys_values = [reference[f"{prefix}.self_attn.{name}_proj.weight"] for name in "qkv"]
    gate_up = [reference[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(attention.qkv_proj.weight, torch.cat(queries_keys_values))
    assert torch.equal(mlp.gate_up_proj.weight, torch.cat(gate_up))
    assert torch.equal(decoder.lm_head.weight, reference["lm_head.weight"])
    assert torch.equal(decoder.embed_tokens.weight, reference["model.language_model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("vision", "layer", "strategy", "tokens"),
    [
        ("clip", -2, "default", 16),
        ("clip", -2, "full", 17),
        ("clip", [-3, -1], "default", 16),
        ("clip", [1, 3], "full", 17),
        ("siglip", -1, "full", 16),
        ("siglip", -1, "default", 15),
    ],
)
def test_layers_and_strategies_give_transformers_features_and_their_count(
    tmp_path: Path, vision: str, layer: int | list[int], strategy: str, tokens: int
) -> None:
    reference = make_llava(tmp_path, vision, feature_layer=layer, strategy=strategy)
    family = load_family(tmp_path)
    inputs = whole(family, picture())
    (embeddings,) = family.build(torch.float32, CPU).encode_images([inputs])
    expected = transformers_features(reference, [inputs.tensors["pixel_values"]])[0]
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=1e-5)
    assert inputs.num_tokens == family.max_tokens_per_image == tokens == len(embeddings)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_prompt_and_pixels_equal_those_of_transformers_processor(tmp_path: Path, vision: str) -> None:
    make_llava(tmp_path, vision)
    family = load_family(tmp_path)
    pictures = [picture(40, 60), picture(90, 30, seed=1), picture(28, 28, seed=2)]
    images = [whole(family, image) for image in pictures]
    chat = ChatInput(
        (
            ChatMessage("system", (TextPart("Be brief."),)),
            ChatMessage("user", (IMAGE, TextPart("Is there an effusion? 12 mm"), IMAGE)),
            ChatMessage("assistant", (TextPart("No effusion."),)),
            ChatMessage("user", (TextPart("And in this?"), IMAGE)),
        )
    )
    source = iter(pictures)
    messages: list[dict[str, Any]] = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": "image", "image": next(source).pixels}
                for part in message.content
            ],
        }
        for message in chat.messages
    ]
    processor = AutoProcessor.from_pretrained(tmp_path)
    expected = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np"
    )
    assert (
        list(family.render_chat(chat, [(inputs,) for inputs in images]).token_ids) == expected["input_ids"][0].tolist()
    )
    pixels = np.stack([inputs.tensors["pixel_values"] for inputs in images])
    np.testing.assert_array_equal(pixels, expected["pixel_values"])
    assert pixels.dtype == np.float32


def test_an_image_three_pixels_high_is_not_taken_for_channels_first(tmp_path: Path) -> None:
    make_llava(tmp_path, "siglip")
    image = picture(3, 50)
    image.pixels[:] = (255, 0, 102)
    pixels = whole(load_family(tmp_path), image).tensors["pixel_values"]
    expected = np.broadcast_to(np.array([1, -1, -0.2], np.float32)[:, None, None], (3, 28, 28))
    np.testing.assert_allclose(pixels, expected, atol=1e-6)


def test_a_checkpoint_without_a_template_speaks_as_llava_was_tuned(tmp_path: Path) -> None:
    make_llava(tmp_path, chat_template=None)
    family = load_family(tmp_path)
    turns = (("system", (TextPart("Be brief."),)), ("user", (TextPart("What?"), IMAGE)))
    answered = (*turns, ("assistant", (TextPart("Lungs."),)), ("user", (TextPart("And?"),)))
    pieces = family.process_image(picture())
    prompt = family.render_chat(ChatInput(tuple(ChatMessage(*turn) for turn in answered)), [pieces])
    text = family.tokenizer.decode(
        [t for i, t in enumerate(prompt.token_ids) if i not in range(prompt.images[0].offset, prompt.images[0].end)]
    )
    assert text == "<s>Be brief. USER: \nWhat? ASSISTANT: Lungs.</s>USER: And? ASSISTANT:"
    plain = family.render_chat(ChatInput((ChatMessage("user", (TextPart("What?"),)),)), [])
    assert family.tokenizer.decode(plain.token_ids) == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: What? ASSISTANT:"
    )


def test_tied_word_embeddings_follow_the_outer_config(tmp_path: Path) -> None:
    make_llava(tmp_path, tie_word_embeddings=True)
    family = load_family(tmp_path)
    assert family.decoder_config.tie_word_embeddings
    decoder = family.build(torch.float32, CPU).decoder
    assert decoder.lm_head.weight is decoder.embed_tokens.weight


def test_buffers_that_old_checkpoints_carry_are_left_out(tmp_path: Path) -> None:
    make_llava(tmp_path, names="hub")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors")
    load_family(tmp_path).build(torch.float32, CPU)


def test_weights_that_are_missing_or_unknown_are_named(tmp_path: Path) -> None:
    make_llava(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["vision_tower.surprise"] = tensors.pop("multi_modal_projector.linear_2.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"projector\.linear_2\.weight.*vision_tower\.surprise"):
        load_family(tmp_path).build(torch.float32, CPU)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": 9}, "has 3 layers"),
        ({"vision_config": {"model_type": "dinov2"}}, "'dinov2' are not known"),
        ({"text_config": {"model_type": "gpt2"}}, "'gpt2' are not known"),
        ({"text_config": {"model_type": "no-such"}}, "cannot read .*no-such"),
        ({"model_type": "instructblip"}, "'instructblip' are not served"),
    ],
    ids=["layer", "tower", "decoder", "garbled", "family"],
)
def test_what_is_not_served_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make_llava(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_family(tmp_path)


def test_a_processor_of_another_size_than_the_tower_is_refused(tmp_path: Path) -> None:
    make_llava(tmp_path, "siglip")
    processor = json.loads((tmp_path / "processor_config.json").read_text())
    processor["image_processor"]["size"] = {"height": 42, "width": 42}
    (tmp_path / "processor_config.json").write_text(json.dumps(processor))
    with pytest.raises(CheckpointError, match="image processor"):
        load_family(tmp_path).process_image(picture())


def test_a_tokenizer_larger_than_the_decoder_is_refused(tmp_path: Path) -> None:
    make_llava(tmp_path, vocab_size=300)
    with pytest.raises(CheckpointError, match="vocabulary ends at 299"):
        _ = load_family(tmp_path).prompts


def test_the_end_of_an_answer_is_what_any_file_of_the_checkpoint_says(tmp_path: Path) -> None:
    make_llava(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    assert load_family(tmp_path).eos_token_ids == (2, 5)


def test_an_adapters_module_names_lead_to_the_decoder(tmp_path: Path) -> None:
    make_llava(tmp_path)
    family = load_family(tmp_path)
    assert isinstance(family, LlavaFamily)
    for name in ("model.language_model", "language_model.model"):
        renamed = family.rename(f"{name}.layers.0.self_attn.q_proj.weight")
        assert renamed == "decoder.layers.0.self_attn.q_proj.weight"


def test_the_identity_of_a_model_follows_its_files(tmp_path: Path) -> None:
    make_llava(tmp_path / "one")
    make_llava(tmp_path / "two")
    make_llava(tmp_path / "three", seed=1)
    one, two, three = (load_family(tmp_path / name).model_digest for name in ("one", "two", "three"))
    assert one == two != three
