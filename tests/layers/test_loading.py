"""Loading: what it takes of a machine's memory, and what it says while it lasts."""

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import make_tokenizer
from tests.quantize import compressed_config
from vlm_serve.config import EngineConfig, ModelConfig
from vlm_serve.engine.engine import Engine
from vlm_serve.errors import CheckpointError
from vlm_serve.families import load_family
from vlm_serve.layers import loading

# isort: split
from transformers import LlamaConfig, LlamaForCausalLM

LOAD = """
import os
import sys
from pathlib import Path

import torch

from tests.memory import Peak
from vlm_serve.families import load_family
from vlm_serve.kernels import dispatch
from vlm_serve.layers.loading import pack_linears


def load(folder, dtype):
    dispatch.prepare(torch.device("cpu"))
    family = load_family(Path(folder))
    peak = Peak()
    model = family.build(getattr(torch, dtype), torch.device("cpu"))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    pack_linears(model)
    return peak.bytes() / weights


for case in sys.argv[1:]:
    if child := os.fork():  # each in a process of its own, the imports once for all
        assert os.waitpid(child, 0)[1] == 0
    else:
        small, folder, dtype = case.split("=")
        load(small, dtype)  # what the first use of a library takes is not the model's
        print(load(folder, dtype), flush=True)
        os._exit(0)
"""
"""Prints the peak of memory to the weights for each `small=folder=dtype`: a small checkpoint of the same kind, and the
one that counts.
"""

CASES = {"whole": "bfloat16", "whole, as float32": "float32", "gptq": "bfloat16", "float-quantized": "bfloat16"}


def empty_model(layers: int = 17) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=16_000 if layers > 1 else 320,
        hidden_size=768 if layers > 1 else 128,
        intermediate_size=2304 if layers > 1 else 128,
        num_hidden_layers=layers,
        num_attention_heads=6 if layers > 1 else 1,
        num_key_value_heads=3 if layers > 1 else 1,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 300 MB of weights in bfloat16, in four files."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_whole(folder, empty_model())
    return folder


def write_whole(folder: Path, model: LlamaForCausalLM) -> None:
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.1, 0.1)
    model.save_pretrained(folder, max_shard_size="90MB")
    make_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def peaks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The peak of memory to the weights of each of `CASES`."""
    cases = []
    for name, dtype in CASES.items():
        large = folder if name.startswith("whole") else tmp_path_factory.mktemp("large")
        small = tmp_path_factory.mktemp("small")
        if name.startswith("whole"):
            write_whole(small, empty_model(layers=1))
        else:
            write_quantized(small, empty_model(layers=1), name)
            write_quantized(large, empty_model(), name)
        cases.append(f"{small}={large}={dtype}")
    done = subprocess.run([sys.executable, "-c", LOAD, *cases], capture_output=True, text=True, check=True)
    return dict(zip(CASES, map(float, done.stdout.split()), strict=True))


def write_quantized(folder: Path, model: LlamaForCausalLM, form: str) -> None:
    """Its matrices have numbers that no one rounded."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        module, (rows, columns) = name.removesuffix(".weight"), (*parameter.shape, 1)[:2]
        if "_proj" not in name:
            tensors[name] = torch.ones(parameter.shape, dtype=torch.bfloat16)
        elif form == "gptq":
            words = ((columns // 8, rows), (columns // 128, rows // 8))
            for part, shape in zip(("qweight", "qzeros"), words, strict=True):
                tensors[f"{module}.{part}"] = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)
            tensors[f"{module}.scales"] = torch.ones(columns // 128, rows, dtype=torch.float16)
        else:
            tensors[name] = torch.ones(rows, columns, dtype=torch.float8_e4m3fn)
            tensors[f"{module}.weight_scale"] = torch.ones(rows, 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings: dict[str, Any] = {"quant_method": form, "bits": 4, "group_size": 128}
    if form != "gptq":
        settings = compressed_config(form, 8, "float", "channel")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | {"quantization_config": settings}))


@pytest.mark.parametrize("case", CASES)
def test_loading_never_needs_more_than_a_fifth_beside_the_weights(
    folder: Path, peaks: dict[str, float], case: str, record_property: Callable[[str, object], None]
) -> None:
    files = list(folder.glob("*.safetensors"))
    assert len(files) >= 3
    assert sum(file.stat().st_size for file in files) > 280e6
    record_property("peak_of_memory_to_weights", f"{peaks[case]:.2f}")
    assert 1 <= peaks[case] <= 1.2


def test_the_start_up_tells_how_far_the_weights_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "TELL_EVERY", 0.0)
    told: list[str] = []
    load_family(folder).build(torch.bfloat16, torch.device("cpu"), told.append)
    amounts = [float(what.split()[0]) for what in told]
    assert amounts == sorted(amounts)
    assert told[-1] == "0.3 of 0.3 GB"


def test_a_phase_says_how_much_was_read(folder: Path) -> None:
    phases: list[str] = []
    Engine.build(
        load_family(folder),
        ModelConfig(str(folder), None, "bfloat16", "cpu"),
        EngineConfig(kv_cache_memory=1 << 26, max_model_len=512),
        on_phase=lambda name, seconds: phases.append(name),
    )
    assert "weights (bfloat16, cpu, 0.29 GB)" in phases


def test_a_modules_tensors_come_together_the_largest_first_in_stretches_no_longer_than_allowed(folder: Path) -> None:
    for file in loading.weight_files(folder):
        sizes = loading._sizes(file)
        stretches = list(loading._stretches(sizes))
        names = [name for stretch in stretches for name in stretch]
        assert sorted(names) == sorted(sizes)
        modules = [name.rpartition(".")[0] for name in names]
        whole = [
            sum(sizes[name] for name in names if name.startswith(f"{module}.")) for module in dict.fromkeys(modules)
        ]
        assert whole == sorted(whole, reverse=True)
        assert len(list(itertools.groupby(modules))) == len(set(modules))
        for stretch in stretches:
            assert len(stretch) == 1 or sum(sizes[name] for name in stretch) <= loading.STRETCH


def test_every_tensor_is_read_once(folder: Path) -> None:
    expected = dict(empty_model().named_parameters())
    read = [(name, tensor.shape) for name, tensor in loading.read_tensors(folder)]
    assert len(read) == len(expected)
    assert dict(read) == {name: parameter.shape for name, parameter in expected.items()}
    sizes = {name: size for file in loading.weight_files(folder) for name, size in loading._sizes(file).items()}
    assert sizes == {name: parameter.numel() * 2 for name, parameter in expected.items()}


def test_the_parts_of_a_quantized_matrix_come_together() -> None:
    sizes = {"a.qweight": 90, "b.qweight": 95, "a.scales": 30, "b.scales": 5, "c.weight": 110}
    (stretch,) = loading._stretches(sizes)
    assert [name[0] for name in stretch] == ["a", "a", "c", "b", "b"]


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"weight_map": {"a": 3}}', "names 3: only .safetensors"),
        ('{"weight_map": {"a": "../weights.safetensors"}}', r"names \.\./weights\.safetensors: only"),
        ('{"weight_map": {"a": "/weights.safetensors"}}', "names /weights.safetensors: only"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', r"names pytorch_model\.bin: only"),
        (
            '{"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors"}}',
            r"lacks model-1.*, model-2.*index",
        ),
    ],
)
def test_an_index_that_cannot_be_followed_is_told(tmp_path: Path, index: str, named: str) -> None:
    outside = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(1)}, outside)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(index)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=named):
        loading.weight_files(folder)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    touched = tmp_path / "touched"

    class Opened:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return _touch, (str(touched),)

    for name in ("pytorch_model.bin", "model.pt", "model.safetensors"):
        torch.save({"weight": Opened()}, tmp_path / name)
        with pytest.raises(CheckpointError, match=r"no \.safetensors file|is damaged"):
            list(loading.read_tensors(tmp_path))
    assert not touched.exists()
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert touched.exists()  # so it would have shown


def _touch(path: str) -> None:
    Path(path).touch()


def test_one_whole_file_stands_for_itself_whatever_lies_beside_it(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    assert [name for name, _ in loading.read_tensors(tmp_path)] == ["a"]


@pytest.mark.parametrize("left", [0.0, 0.001, 0.5, 0.999])
def test_a_damaged_file_is_named(tmp_path: Path, left: float) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, file)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * left)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged .* Copy it again"):
        list(loading.read_tensors(tmp_path))


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        list(loading.read_tensors(tmp_path))


def test_all_that_is_missing_extra_or_misshapen_is_listed(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    tensors = dict(loading.read_tensors(folder))
    layers = "model.layers"
    for layer in range(12):
        del tensors[f"{layers}.{layer}.self_attn.q_proj.weight"], tensors[f"{layers}.{layer}.input_layernorm.weight"]
    for layer in range(3):
        tensors[f"{layers}.{layer}.mlp.another.weight"] = torch.ones(1)
        tensors[f"{layers}.{layer}.mlp.down_proj.weight"] = tensors[f"{layers}.{layer}.mlp.up_proj.weight"].clone()
    tensors["model.norm.weight"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as raised:
        load_family(tmp_path).build(torch.bfloat16, torch.device("cpu"))
    told = str(raised.value)
    for layer in range(12):
        assert f"decoder.layers.{layer}.self_attn.q_proj.weight" in told
        assert f"decoder.layers.{layer}.input_layernorm.weight" in told
    for layer in range(3):
        assert f"{layers}.{layer}.mlp.another.weight" in told
        assert f"{layers}.{layer}.mlp.down_proj.weight ((2304, 768) instead of (768, 2304))" in told
    assert "model.norm.weight ((1,) instead of (768,))" in told


def test_a_tensor_that_is_there_under_two_names_is_told(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    tensors = dict(loading.read_tensors(folder))
    tensors["decoder.norm.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"there twice: (model|decoder)\.norm\.weight"):
        load_family(tmp_path).build(torch.bfloat16, torch.device("cpu"))
