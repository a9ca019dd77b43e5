"""The decoder that is trained is the one that is served, and what is saved of it is served as it was trained."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_llava, make_timm_vlm
from tests.engine.harness import LOGIT_TOLERANCE, Harness, assert_parity, picture
from vlm_serve.errors import CheckpointError
from vlm_serve.families import load_family
from vlm_serve.training.decoder import TARGET_MODULES, add_lora, load_decoder, save_adapter


def make_contradictory_llava(folder: Path) -> Any:
    """Its text config says that the head is not tied; the outer config, which decides, that it is."""
    model = make_llava(folder, tie_word_embeddings=True)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    return model


CHECKPOINTS: dict[str, Callable[[Path], Any]] = {
    "timm": make_timm_vlm,
    "timm, tied": lambda folder: make_timm_vlm(folder, tie_word_embeddings=True),
    "llava": make_llava,
    "llava, hub": lambda folder: make_llava(folder, names="hub", sharded=True),
    "llava, in memory, tied": lambda folder: make_llava(folder, names="in_memory", tie_word_embeddings=True),
    "llava, contradictory": make_contradictory_llava,
    "llava, biases": lambda folder: make_llava(folder, attention_bias=True, mlp_bias=True),
}


@pytest.fixture(params=CHECKPOINTS, scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, CHECKPOINTS[request.param](folder)


def trained(folder: Path, adapters: Path) -> PeftModel:
    """An adapter as training leaves it, but for matrices that are random: saved under `adapters/ward`."""
    family = load_family(folder)
    model = add_lora(load_decoder(family), rank=4, alpha=8, dropout=0.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, family, adapters / "ward", "a base model")
    return model


@torch.inference_mode()
def test_the_loaded_decoder_is_transformers_own(checkpoint: tuple[Path, Any]) -> None:
    folder, model = checkpoint
    ids = torch.tensor([[1, 7, 30, 100, 5, 8, 9]])
    torch.testing.assert_close(load_decoder(load_family(folder))(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_fresh_adapter_changes_nothing(checkpoint: tuple[Path, Any]) -> None:
    folder, _ = checkpoint
    decoder = load_decoder(load_family(folder))
    ids = torch.tensor([[1, 7, 30]])
    before = decoder(ids).logits
    assert torch.equal(add_lora(decoder, rank=4, alpha=8, dropout=0.0, seed=0)(ids).logits, before)


def test_peft_and_the_engine_say_the_same_with_a_saved_adapter(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = checkpoint
    trained(folder, tmp_path)
    harness = Harness(folder, adapters=tmp_path)
    pefts = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ward").eval()
    (run,) = harness.run(harness.chat("What does the image show?"), adapters=["ward"])
    assert_parity(pefts, run)
    if "llava" in model.config.model_type:
        (run,) = harness.run(harness.chat(picture(1), "What does the image show?"), adapters=["ward"])
        assert_parity(pefts.get_base_model(), run)


def test_the_saved_adapter_is_the_trained_one(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = checkpoint
    model = trained(folder, tmp_path)
    harness = Harness(folder, adapters=tmp_path)
    (run,) = harness.run(harness.chat("What does the image show?"), adapters=["ward"], prompt_logprobs=True)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # as they are saved
            parameter.data = parameter.data.bfloat16().float()
    with torch.inference_mode():
        expected = model(torch.tensor([run.prompt.token_ids])).logits[0]
    found = torch.stack([run.logits[position] for position in range(len(expected))])
    assert float((found - expected).abs().max()) <= LOGIT_TOLERANCE


def test_a_saved_adapter_is_bfloat16_of_every_linear_layer_and_names_no_path(
    checkpoint: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, _ = checkpoint
    trained(folder, tmp_path)
    tensors = load_file(tmp_path / "ward" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert len(tensors) == 2 * 2 * len(TARGET_MODULES)  # layers, A and B
    text = (tmp_path / "ward" / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == "a base model"
    assert str(folder) not in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_weights_that_do_not_fit_are_named(tmp_path: Path, change: str) -> None:
    make_timm_vlm(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensor = tensors.pop("model.layers.1.mlp.up_proj.weight")
    if change == "misshapen":
        tensors["model.layers.1.mlp.up_proj.weight"] = tensor[1:].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_decoder(load_family(tmp_path))


def test_a_checkpoint_whose_config_is_not_transformers_is_refused(tmp_path: Path) -> None:
    """Such as LLaVA's own: what is not in a `text_config` would be guessed."""
    make_timm_vlm(tmp_path)
    family = load_family(tmp_path)
    family.config = {name: value for name, value in family.config.items() if name != "text_config"}
    with pytest.raises(CheckpointError, match="text_config"):
        load_decoder(family)


def test_a_head_of_its_own_is_not_tied(tmp_path: Path) -> None:
    """Whatever the config says; as where it is served."""
    make_timm_vlm(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embeddings + 1}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    decoder = load_decoder(load_family(tmp_path))
    assert torch.equal(decoder.lm_head.weight, embeddings.float() + 1)
    assert torch.equal(decoder.model.embed_tokens.weight, embeddings.float())
