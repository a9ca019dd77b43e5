"""LLaVA in its authors' form is what transformers makes of the same weights."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import VOCAB_SIZE, make_llava, make_tokenizer
from tests.engine.harness import picture
from tests.families.parity import Parity, Record
from vlm_serve.errors import CheckpointError, ImageLimitError
from vlm_serve.families import load_family
from vlm_serve.families.llava_original import TOWERS, as_square
from vlm_serve.types import ChatInput, ChatMessage, ImageInputs, ImagePart, TextPart

# isort: split
from transformers import AutoProcessor, LlavaForConditionalGeneration

KINDS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
HEADS = [(4, 4), (3, 1), (8, 2), (7, 1)]
THEIRS = {
    "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}


def make_original_llava(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str = "llava",
    *,
    template: bool = True,
    heads: tuple[int, int] = (4, 2),
    **changes: Any,
) -> tuple[Path, LlavaForConditionalGeneration]:
    """Writes a checkpoint in LLaVA's own form to `ours`, whose folder it returns; the same in transformers' to `hf`.

    Args:
        monkeypatch: for as long as the name of its tower has to be known.
        heads: of queries, and of keys and values; each is 16 wide.
        changes: fields of config.json that differ.
    """
    queries, keys = heads
    shape = {"num_attention_heads": queries, "num_key_value_heads": keys, "hidden_size": 16 * queries}
    model = make_llava(root / "hf", model_type=KINDS[kind], **shape)
    vision = model.config.vision_config.to_dict()
    monkeypatch.setitem(TOWERS, "tiny-clip", vision)
    folder = root / "ours"
    tokenizer = make_tokenizer() if template else make_tokenizer(None)
    tokenizer.save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(root / "hf" / "model.safetensors").items():
        prefix = next(prefix for prefix in THEIRS if name.startswith(prefix))
        tensors[THEIRS[prefix] + name.removeprefix(prefix)] = tensor
    save_file(tensors, folder / "model.safetensors")
    theirs = {
        "model_type": kind,
        "mm_vision_tower": "tiny-clip",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": 32,
    }
    config = model.config.text_config.to_dict() | theirs | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder, model


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Path, LlavaForConditionalGeneration]]:
    return partial(make_original_llava, tmp_path, monkeypatch)


class OriginalParity(Parity):
    """The reference is in transformers' form; adapters have the names of LLaVA's own code."""

    def __init__(self, folder: Path, model: Any, **options: Any) -> None:
        super().__init__(folder, model, processor=AutoProcessor.from_pretrained(folder.parent / "hf"), **options)

    def make_adapter(self, folder: Path) -> Any:
        adapted = super().make_adapter(folder)
        file = folder / "adapter_model.safetensors"
        save_file({name.replace("language_model.", ""): tensor for name, tensor in load_file(file).items()}, file)
        return adapted


@pytest.mark.parametrize("kind", KINDS)
def test_parity(make: Any, record_property: Record, kind: str) -> None:
    OriginalParity(*make(kind)).check_everything(f"LLaVA, its authors' form, {kind}", record_property)


@pytest.mark.parametrize("heads", HEADS, ids=[f"GQA{queries // keys}-H{queries}" for queries, keys in HEADS])
def test_parity_whatever_the_count_of_heads(make: Any, heads: tuple[int, int]) -> None:
    parity = OriginalParity(*make("llava", heads=heads))
    parity.check_batch(*parity.conversations)


def test_another_activation_of_the_projector_is_seen(make: Any) -> None:
    parity = OriginalParity(*make("llava"))
    projector: Any = parity.harness.engine.runner.model.projector
    projector.activation = torch.nn.ReLU()
    with pytest.raises(AssertionError, match="logits differ"):
        parity.check(parity.conversations["one image"])


def test_a_tokenizer_without_a_placeholder_is_given_one_past_the_vocabulary(make: Any) -> None:
    folder, model = make("llava")
    for file in folder.glob("tokenizer*.json"):
        file.write_text(file.read_text().replace("<image>", "<other>"))
    parity = OriginalParity(folder, model)
    family = parity.harness.family
    assert family.image_token_id == family.decoder_config.vocab_size == VOCAB_SIZE
    contents = [parity.conversations[kind] for kind in ("images and text", "one image")]
    runs = parity.run(*(parity.prompt(content) for content in contents))
    for content, run in zip(contents, runs, strict=True):
        parity.compare(run, parity.expected(content, run))


def test_an_image_is_made_square_with_bars_of_the_mean_colour(make: Any) -> None:
    folder, _ = make("llava", image_aspect_ratio="pad")
    with pytest.raises(ImageLimitError, match="201 by 1 pixels"):  # its square would take gigabytes
        load_family(folder).process_image(picture(0, 1, 201))
    (inputs,) = load_family(folder).process_image(picture(0, 14, 28))
    assert isinstance(inputs, ImageInputs)
    pixels = inputs.tensors["pixel_values"]
    assert np.abs(pixels[:, :5]).max() < 0.03 > np.abs(pixels[:, -5:]).max()
    assert np.abs(pixels[:, 10:18]).max() > 1
    square = as_square(picture(0, 3, 6).pixels, [1, 2, 3])
    np.testing.assert_array_equal(square[1:4], picture(0, 3, 6).pixels)
    assert square[[0, 4, 5]].reshape(-1, 3).tolist() == [[1, 2, 3]] * 18


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("llava", "Be brief. USER: \nWhat? ASSISTANT: Lungs.</s>USER: And? ASSISTANT:"),
        ("llava_mistral", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n\nWhat? [/INST] Lungs. </s>[INST] And? [/INST]"),
    ],
)
def test_a_checkpoint_without_a_template_speaks_as_it_was_tuned(make: Any, kind: str, text: str) -> None:
    folder, _ = make(kind, template=False)
    family = load_family(folder)
    chat = ChatInput(
        (
            ChatMessage("system", (TextPart("Be brief."),)),
            ChatMessage("user", (TextPart("What?"), ImagePart(b"", "image/png"))),
            ChatMessage("assistant", (TextPart("Lungs."),)),
            ChatMessage("user", (TextPart("And?"),)),
        )
    )
    prompt = family.render_chat(chat, [family.process_image(picture(0))])
    (span,) = prompt.images
    rest = [*prompt.token_ids[: span.offset], *prompt.token_ids[span.end :]]
    assert family.tokenizer.decode(rest) == "<s>" + text


@pytest.mark.parametrize(
    "changes",
    [
        {"mm_vision_tower": "biomedclip"},
        {"mm_projector_type": "linear"},
        {"image_aspect_ratio": "anyres_max_9"},
        {"mm_patch_merge_type": "spatial_unpad"},
        {"mm_vision_select_feature": "cls"},
    ],
)
def test_what_is_not_served_is_refused_by_name(make: Any, changes: dict[str, str]) -> None:
    folder, _ = make("llava", **changes)
    ((field, value),) = changes.items()
    with pytest.raises(CheckpointError, match=f"{field} is '{value}'"):
        load_family(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mm_vision_tower", ["a"]),
        ("mm_vision_tower_config", 5),
        *(("mm_vision_select_feature", value) for value in ([], {}, None)),
        *(("mm_vision_select_layer", value) for value in ("x", None, 1.5, True, [], [-2, -3])),
        ("mm_projector_type", {}),
        ("rms_norm_eps", "x"),
        ("tie_word_embeddings", None),
    ],
)
def test_a_field_that_cannot_be_is_refused_by_its_name(make: Any, field: str, value: object) -> None:
    folder, _ = make("llava", **{field: value})
    with pytest.raises(CheckpointError, match=field):
        load_family(folder)


def test_a_checkpoint_that_names_no_tower_is_refused_with_the_field(make: Any) -> None:
    folder, _ = make("llava_mistral")
    config = json.loads((folder / "config.json").read_text())
    del config["mm_vision_tower"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="mm_vision_tower is None"):
        load_family(folder)
