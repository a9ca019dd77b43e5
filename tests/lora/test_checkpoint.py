"""An adapter that does not fit is refused by name; none silently does nothing."""

import json

import pytest
import torch
from safetensors.torch import save_file

from vlm_serve.errors import AdapterError
from vlm_serve.lora.checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_adapter

MODULE = "model.layers.0.self_attn.q_proj"
SHAPES = {"decoder.layers.0.self_attn.q_proj": (16, 12)}


def rename(name: str) -> str | None:
    if name.startswith("vision_tower.last."):
        return None
    return "decoder." + name.removeprefix("model.") if name.startswith("model.") else name


def write(folder, tensors=None, **config):
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | config
    (folder / CONFIG_FILE).write_text(json.dumps(settings))
    save_file(tensors or pair(), folder / WEIGHTS_FILE)
    return folder


def pair(module=MODULE, rank=4, width_in=16, width_out=12, side="AB"):
    shapes = {"A": (rank, width_in), "B": (width_out, rank)}
    return {f"base_model.model.{module}.lora_{one}.weight": torch.ones(shapes[one]) for one in side}


def read(folder, max_rank=64):
    return read_adapter(folder, "digest", rename, SHAPES, max_rank)


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, 2.0),
        ({"lora_alpha": 4}, 1.0),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"q_proj": 16}}, 4.0),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 2}}, 0.5),
        ({"alpha_pattern": {"proj": 16}}, 2.0),
    ],
)
def test_the_scaling_is_pefts(tmp_path, config, scaling):
    a, b = read(write(tmp_path / "x", **config)).modules["decoder.layers.0.self_attn.q_proj"]
    assert torch.equal(a, torch.ones(4, 16))
    assert torch.equal(b, torch.full((12, 4), scaling))


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        (pair("model.layers.9.self_attn.q_proj"), {}, "model.layers.9.self_attn.q_proj matches nothing"),
        (pair("vision_tower.q_proj"), {}, "vision_tower.q_proj matches nothing"),
        (pair(width_in=8), {}, "another base model"),
        (pair(width_out=13), {}, "another base model"),
        (pair(rank=65), {}, "--max-adapter-rank"),
        (pair(side="A"), {}, "one of lora_A and lora_B"),
        ({"base_model.model.lm_head.weight": torch.ones(2, 2)}, {}, "is no LoRA matrix"),
        (
            {"base_model.model.tower.patch_embed.lora_A.weight": torch.ones(4, 3, 2, 2)},
            {},
            "tower.patch_embed.lora_A.weight, of shape (4, 3, 2, 2), is no LoRA matrix of a linear layer",
        ),
        (pair("vision_tower.last.q_proj"), {}, "holds no LoRA matrices"),
        (None, {"use_dora": True}, "use_dora"),
        (None, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (None, {"bias": "all"}, "bias"),
        (None, {"peft_type": "IA3"}, "IA3"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, tensors, config, says):
    """Row 11 of engines.md: an adapter silently does nothing."""
    with pytest.raises(AdapterError, match="Adapter cardiology") as raised:
        read(write(tmp_path / "cardiology", tensors, **config))
    assert says in str(raised.value)


def test_what_the_base_does_not_use_is_passed_over(tmp_path):
    read_one = read(write(tmp_path / "x", pair() | pair("vision_tower.last.q_proj", width_in=3)))
    assert read_one.modules.keys() == SHAPES.keys()


def test_pickled_weights_are_not_opened(tmp_path):
    folder = write(tmp_path / "x")
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="safetensors"):
        read(folder)


def test_damaged_weights_are_refused(tmp_path):
    folder = write(tmp_path / "x")
    (folder / WEIGHTS_FILE).write_bytes(b"\xff" * 100)
    with pytest.raises(AdapterError, match="damaged"):
        read(folder)
