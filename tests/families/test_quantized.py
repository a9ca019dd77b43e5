"""Quantized checkpoints as they are served: the matrices are those that their steps stand for, and the loss is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.harness import Harness
from tests.families.parity import Parity, Record, record_row
from tests.families.text_checkpoints import make_text
from tests.quantize import Packed, pack_awq, pack_compressed, pack_fp8, pack_gptq, pack_int8
from vlm_serve.errors import CheckpointError
from vlm_serve.families import load_family

CPU = torch.device("cpu")

KINDS: dict[str, tuple[str, Callable[[torch.Tensor], Packed]]] = {
    "gptq": ("Qwen2", pack_gptq),
    "gptq, merged": ("Phi-3", lambda weight: pack_gptq(weight, order=True)),
    "awq": ("Llama 2", pack_awq),
    "int4": ("Qwen3", pack_compressed),
    "int8": ("Mistral", lambda weight: pack_int8(weight, "channel")),
    "fp8": ("Mixtral", lambda weight: pack_fp8(weight, "channel")),
}


def make_quantized(folder: Path, row: str, pack: Callable[[torch.Tensor], Packed]) -> Any:
    """A text checkpoint whose layers' matrices are packed; returns transformers' model with what they stand for."""
    model = make_text(folder, row, (4, 2), hidden_size=64, intermediate_size=48)
    file = folder / "model.safetensors"
    packed_tensors: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    config: dict[str, Any] = {}
    for name, tensor in load_file(file).items():
        expected[name] = packed_tensors[name] = tensor
        if ".layers." in name and tensor.dim() == 2:
            packed = pack(tensor.float())
            config.update(packed.config)
            expected[name] = packed.expected
            del packed_tensors[name]
            module = name.removesuffix(".weight")
            packed_tensors |= {f"{module}.{part}": piece for part, piece in packed.tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, file, {"format": "pt"})
    served = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    save_file({name: tensor.contiguous() for name, tensor in packed_tensors.items()}, file, {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    return served


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_checkpoint_computes_what_its_steps_stand_for(
    tmp_path: Path, kind: str, record_property: Record
) -> None:
    row, pack = KINDS[kind]
    model = make_quantized(tmp_path, row, pack)
    parity = Parity(tmp_path, model, pictures=())
    for content in parity.conversations.values():
        parity.check(content)
    record_row(record_property, row, parity.harness.family)
    record_property("quantization", kind)
    record_property("largest_logit_error", f"{parity.largest_error:.1e}")


def test_the_loss_is_told(tmp_path: Path) -> None:
    make_quantized(tmp_path, "Llama 2", pack_awq)
    told: list[str] = []
    load_family(tmp_path).build(torch.float32, CPU, told.append)
    (last,) = told
    assert last.startswith("awq, 4 bits, expanded: rounding has changed the weights by about ")
    assert 3 < float(last.split()[-1].removesuffix("%")) < 15


def test_zero_biases_that_the_model_lacks_are_left_out_and_others_are_told(tmp_path: Path) -> None:
    make_quantized(tmp_path, "Llama 2", pack_gptq)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.down_proj.bias"
    save_file(tensors | {name: torch.zeros(64)}, file)
    Harness(tmp_path)
    save_file(tensors | {name: torch.ones(64)}, file)
    with pytest.raises(CheckpointError, match=f"not in the model: {name}"):
        Harness(tmp_path)


def test_a_matrix_without_one_of_its_parts_is_named(tmp_path: Path) -> None:
    make_quantized(tmp_path, "Llama 2", pack_gptq)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.q_proj.scales"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.q_proj lacks its 'scales'"):
        Harness(tmp_path)


def test_parts_of_other_sizes_are_told_with_their_shapes(tmp_path: Path) -> None:
    make_quantized(tmp_path, "Llama 2", pack_awq)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"]["group_size"] = 8
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"groups of 8\): .*scales \(4, "):
        Harness(tmp_path)


@pytest.mark.parametrize(
    ("part", "damage", "named"),
    [
        ("scales", lambda scales: scales * float("nan"), "up_proj has numbers that are infinite or none"),
        ("scales", lambda scales: scales[:, :-1], "up_proj do not fit"),
        ("scales", lambda scales: scales[:-1], "up_proj do not fit"),
        ("scales", lambda scales: torch.cat((scales, scales)), "up_proj do not fit"),
        ("qweight", lambda words: words[:-1], "up_proj do not fit"),
        ("qweight", lambda words: words[:, :1], "up_proj do not fit"),
        ("qweight", lambda words: words.float(), r"qweight \(8, 48\) of float32"),
        ("qzeros", lambda words: words[:, :1], "up_proj do not fit"),
        ("g_idx", lambda groups: groups + 1, "up_proj do not fit"),
        ("g_idx", lambda groups: groups - 1, "up_proj do not fit"),
        ("g_idx", lambda groups: groups[:-1], "up_proj do not fit"),
    ],
)
def test_a_damaged_part_is_told(
    tmp_path: Path, part: str, damage: Callable[[torch.Tensor], torch.Tensor], named: str
) -> None:
    make_quantized(tmp_path, "Llama 2", pack_gptq)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.1.mlp.up_proj.{part}"
    save_file(tensors | {name: damage(tensors[name]).contiguous()}, file)
    with pytest.raises(CheckpointError, match=named):
        load_family(tmp_path).build(torch.float32, CPU)


def test_matrices_in_smaller_groups_than_the_config_says_are_told(tmp_path: Path) -> None:
    make_quantized(tmp_path, "Llama 2", pack_awq)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"]["group_size"] *= 2
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="do not fit its quantization_config"):
        load_family(tmp_path).build(torch.float32, CPU)


@pytest.mark.parametrize("bits", [2, 8])
def test_another_number_of_bits_than_was_packed_is_told(tmp_path: Path, bits: int) -> None:
    make_quantized(tmp_path, "Llama 2", pack_gptq)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"]["bits"] = bits
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=rf"do not fit its quantization_config \(gptq, {bits} bits"):
        load_family(tmp_path).build(torch.float32, CPU)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "bitsandbytes"}, "method bitsandbytes.*Known: GPTQ, AWQ and compressed-tensors"),
        ({"bits": 4}, "method None"),
        (["gptq"], "must be an object"),
        ({"quant_method": "gptq", "bits": "four", "group_size": 128}, "field .*four"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "number of bits 3"),
        ({"quant_method": "gptq", "group_size": 128}, "field 'bits'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"up": {"bits": 8}}}, "field dynamic"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
        ({"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {}}}}, "transform"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "gemv, 4 bits"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 4}}},
            },
            "format nvfp4-pack-quantized",
        ),
    ],
)
def test_a_form_that_is_not_known_is_named_before_anything_is_read(tmp_path: Path, settings: Any, named: str) -> None:
    make_text(tmp_path, "Llama 2")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(CheckpointError, match=named):
        load_family(tmp_path)
