"""GGUF files, written here with the package of its authors: what is served computes what their blocks stand for."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import make_tokenizer
from tests.families.gguf_files import Choose, Kind, pieces, q4_k_m, write_gguf
from tests.families.parity import Parity, Record, record_row
from vlm_serve.errors import CheckpointError, ConfigurationError
from vlm_serve.families import gguf_model, load_family, resolve_model
from vlm_serve.layers import loading

# isort: split
from transformers import AutoModelForCausalLM

KINDS: dict[str, Choose] = {
    "F16": lambda name: Kind.F16,
    "BF16": lambda name: Kind.BF16,
    "Q8_0": lambda name: Kind.Q8_0,
    "Q4_0": lambda name: Kind.Q4_0,
    "Q4_1": lambda name: Kind.Q4_1,
    "Q4_K_M": q4_k_m,
}
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "initializer_range": 0.1}
"""Sizes that blocks of 256 fill."""

ROWS: dict[str, dict[str, Any]] = {
    "Llama 3": {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    "Qwen2": {"use_sliding_window": False},
    "Qwen3": {},
    "Qwen3-MoE": {"mlp_only_layers": [], "norm_topk_prob": True},
    "Phi-3": {"sliding_window": 8},
    "Phi-4 mini": {},
    "Gemma 2": {"query_pre_attn_scalar": 16},
    # transformers' own pattern of layers, whose sixth sees all; the files have no cap of Gemma 3's logits
    "Gemma 3": {
        "query_pre_attn_scalar": 16,
        "num_hidden_layers": 6,
        "layer_types": None,
        "final_logit_softcapping": None,
    },
}
"""Every architecture that is read, and what a file of it cannot say otherwise."""

CONVERT = """
import sys
from pathlib import Path

from tests.memory import Peak
from vlm_serve.families import resolve_model

resolve_model(sys.argv[1])  # what the first use of a library takes is not the model's
peak = Peak()
folder = resolve_model(sys.argv[2])
print(peak.bytes() / (folder / "model.safetensors").stat().st_size)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM_SERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize("name", KINDS)
def test_a_gguf_file_computes_what_its_blocks_stand_for(file: Path, name: str, record_property: Record) -> None:
    model = write_gguf(file, "Llama 2", KINDS[name], **WIDE)
    parity = Parity(resolve_model(str(file)), model, pictures=())
    for content in parity.conversations.values():
        parity.check(content)
    record_row(record_property, "Llama 2", parity.harness.family)
    record_property("quantization", f"GGUF {name}")


@pytest.mark.parametrize("row", ROWS)
def test_every_architecture_that_is_read_computes_what_transformers_does(
    file: Path, row: str, record_property: Record
) -> None:
    model = write_gguf(file, row, **ROWS[row])
    parity = Parity(resolve_model(str(file)), model, pictures=())
    for content in parity.conversations.values():
        parity.check(content)
    record_row(record_property, row, parity.harness.family)
    record_property("quantization", "GGUF F16")
    record_property("largest_logit_error", f"{parity.largest_error:.1e}")


@pytest.mark.parametrize("row", ["Llama 2", "Gemma 2"])
def test_the_weights_are_those_that_transformers_reader_makes(
    file: Path, row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_model, "_PIECE", 5000)  # some rows at a time
    write_gguf(file, row, q4_k_m, **WIDE)
    reader = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    expected = reader.state_dict()
    found = load_file(resolve_model(str(file)) / "model.safetensors")
    assert found.keys() == expected.keys() - ({"lm_head.weight"} if row == "Gemma 2" else set())
    for name, tensor in found.items():
        assert tensor.dtype == (torch.float32 if tensor.dim() == 1 else torch.float16)
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


@pytest.mark.parametrize(("row", "layers"), [("Gemma 2", 46), ("Gemma 3", 62)])
def test_gemmas_27b_scales_its_queries_in_its_own_way(file: Path, row: str, layers: int) -> None:
    write_gguf(file, row, **ROWS[row])
    config = gguf_model.GgufModel(file).config()
    assert config["query_pre_attn_scalar"] == config["head_dim"] == 16
    write_gguf(file, row, fields={f"{row.lower().replace(' ', '')}.block_count": layers}, **ROWS[row])
    config = gguf_model.GgufModel(file).config()
    assert config["query_pre_attn_scalar"] == config["hidden_size"] // config["num_attention_heads"] == 8


@pytest.mark.parametrize(
    ("row", "fields", "named"),
    [
        ("Gemma 3", {"gemma3.attention.sliding_window_pattern": 2}, "sliding_window_pattern 2"),
        ("Gemma 2", {"gemma2.attn_logit_softcapping": 0.0}, "lacks gemma2.attn_logit_softcapping"),
        ("Gemma 2", {"gemma2.attention.sliding_window": 0}, "lacks gemma2.attention.sliding_window"),
    ],
)
def test_another_gemma_is_told(file: Path, row: str, fields: dict[str, Any], named: str) -> None:
    write_gguf(file, row, fields=fields, **ROWS[row])
    with pytest.raises(CheckpointError, match=named):
        gguf_model.GgufModel(file).config()


@pytest.mark.parametrize(
    ("row", "names", "rope"),
    [
        ("Llama 2", ["rope_freqs.weight"], {"attention_factor": 1.0, "original_max_position_embeddings": 256}),
        (
            "Phi-3",
            ["rope_factors_short.weight", "rope_factors_long.weight"],
            {"original_max_position_embeddings": 64},
        ),
    ],
)
def test_the_factors_of_the_rotary_embedding_are_kept(
    file: Path, row: str, names: list[str], rope: dict[str, Any]
) -> None:
    stretches = [np.linspace(1, 4 * (index + 1), 4, dtype=np.float32) for index in range(len(names))]
    short, long = stretches[0].tolist(), stretches[-1].tolist()
    rope |= {"rope_type": "longrope", "rope_theta": 20_000.0, "short_factor": short, "long_factor": long}
    fields = {"phi3.rope.scaling.original_context_length": 64} if row == "Phi-3" else {}
    changes = {"original_max_position_embeddings": 64} if row == "Phi-3" else {}
    model = write_gguf(
        file, row, fields=fields, factors=dict(zip(names, stretches, strict=True)), rope_parameters=rope, **changes
    )
    folder = resolve_model(str(file))
    settings = json.loads((folder / "config.json").read_text())["rope_parameters"]
    said = ("rope_type", "short_factor", "long_factor", "original_max_position_embeddings")
    assert {name: settings[name] for name in said} == {name: rope[name] for name in said}
    parity = Parity(folder, model, pictures=())
    parity.check(parity.conversations["text"])
    long_text = ("What does the image show? " * 12,)
    assert len(parity.prompt(long_text).token_ids) > 64
    parity.check(long_text)


def test_the_file_says_what_ends_an_answer_and_how_a_chat_is_written(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "TELL_EVERY", 0.0)
    write_gguf(file, fields={"tokenizer.ggml.eot_token_id": 3}, **WIDE)
    told: list[str] = []
    folder = resolve_model(str(file), told.append)
    family = load_family(folder)
    tokenizer = family.tokenizer
    assert family.eos_token_ids == (3, 5, tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    assert (folder / "chat_template.jinja").read_text() == make_tokenizer().chat_template
    text = "What does the image show? 2019-04-30"
    assert tokenizer(text)["input_ids"] == make_tokenizer()(text, add_special_tokens=False)["input_ids"]
    for special in ("<|turn|>", "<image>"):
        assert tokenizer(special)["input_ids"] == tokenizer.convert_tokens_to_ids([special])
    assert told[:2] == ["reading tiny.gguf", "converting tiny.gguf to 2 MB of weights"]
    assert told[-1] == "converted 2 of 2 MB"


@pytest.mark.parametrize(
    ("pre", "cut"),
    [("smollm", "1 2 3 4"), ("llama-bpe", "123 4"), ("qwen2", "1 2 3 4"), ("gpt-4o", "123 4"), ("gpt-2", "1234")],
)
def test_text_is_cut_up_as_the_file_says(file: Path, pre: str, cut: str) -> None:
    write_gguf(file, fields={"tokenizer.ggml.pre": pre})
    backend = load_family(resolve_model(str(file))).backend_tokenizer
    assert backend.pre_tokenizer is not None
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("Lobe1234")] == ["Lobe", *cut.split()]
    assert json.loads(backend.to_str())["model"]["ignore_merges"] == (pre == "llama-bpe")
    starts = backend.encode("Lobe").ids[0] == 1
    assert starts == (pre == "llama-bpe")  # whose files do not say that a text begins with <s>


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepieces_tokens_are_merged_by_score(file: Path, prefix: bool) -> None:
    write_gguf(file, fields={"tokenizer.ggml.add_space_prefix": prefix}, sentencepiece=True)
    backend = load_family(resolve_model(str(file))).backend_tokenizer
    syllables = np.random.default_rng(0).choice(list("aefhimort "), (20, 12))
    for text in ("The lungs are clear", "mass  in it?", " 5 µm · ☃\n", "The", *map("".join, syllables)):
        ids = backend.encode(text).ids
        assert ids == [1, *greedy(("▁" if prefix else "") + text.replace(" ", "▁"))]
        assert backend.decode(ids) == text
    after_special = backend.encode("a<|turn|>b", add_special_tokens=False).ids
    blank = "▁" if prefix else ""
    assert after_special == [*greedy(f"{blank}a"), 5, *greedy(f"{blank}b")]
    blanks = pieces()[0].index("   ")
    assert blanks in backend.encode("a   b").ids  # a token of the file's own, never cut up


def greedy(text: str, *, in_order: bool = False) -> list[int]:
    """SentencePiece's rule, as llama.cpp states it: of all neighbours those with the best whole become one, the first
    of equals; what is in no piece becomes its bytes.
    """
    tokens, kinds, scores = pieces(in_order=in_order)
    rank = {token: score for token, kind, score in zip(tokens, kinds, scores, strict=True) if kind == 1}
    parts = list(text)
    while pairs := [(rank[a + b], -at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in rank]:
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    found = []
    for part in parts:
        found += [part] if part in rank else [f"<0x{byte:02X}>" for byte in part.encode()]
    return [tokens.index(token) for token in found]


def test_gemmas_pieces_are_merged_in_their_order_in_the_file(file: Path) -> None:
    fields = {"tokenizer.ggml.add_space_prefix": False}
    write_gguf(file, "Gemma 2", fields=fields, sentencepiece=True, **ROWS["Gemma 2"])
    tokenizer = load_family(resolve_model(str(file))).backend_tokenizer
    for text in ("The lungs are clear", "mass in the left upper lobe"):
        assert tokenizer.encode(text).ids == [1, *greedy(text.replace(" ", "▁"), in_order=True)]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"split.count": 3}, "one part of several"),
        ({"general.architecture": "falcon"}, "type 'falcon', which is not served.*llama, qwen2"),
        ({"llama.expert_count": 8}, "experts 'Mixtral'"),
        ({"llama.rope.scaling.type": "yarn"}, "stretched by 'yarn'"),
        ({"llama.attention.value_length": 12}, "values of another size than keys, 12"),
        ({"llama.attention.scale": 0.5, "llama.logit_scale": 2.0}, "fields 'attention.scale, logit_scale'"),
        ({"llama.attention.causal": False}, "fields 'attention.causal'"),
        ({"llama.attention.sliding_window": 32}, "fields 'attention.sliding_window'"),
        ({"llama.block_count": 0}, "lacks llama.block_count, or has 0"),
        ({"tokenizer.ggml.pre": "viking"}, "'viking'"),
        ({"tokenizer.ggml.model": "bert"}, "'bert'"),
    ],
)
def test_what_is_not_read_from_gguf_is_told(file: Path, cache: Path, fields: dict[str, Any], named: str) -> None:
    write_gguf(file, fields=fields)
    with pytest.raises(CheckpointError, match=named):
        resolve_model(str(file))
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


def test_tensors_of_unknown_names_and_kinds_are_told(file: Path) -> None:
    extra = {f"blk.0.part_{index}.weight": np.ones(8, np.float32) for index in range(30)}
    write_gguf(file, factors=extra)
    with pytest.raises(CheckpointError, match=r"blk\.0\.part_0\.weight, .*blk\.0\.part_29\.weight"):
        resolve_model(str(file))


def test_a_lacking_tensor_is_told(file: Path) -> None:
    write_gguf(file)
    file.write_bytes(file.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.9.ffn_up.weight"))
    with pytest.raises(CheckpointError, match=r"missing: .*layers\.1\.mlp\.up_proj.*not in the model: .*layers\.9"):
        load_family(resolve_model(str(file))).build(torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("left", [0.0, 0.02, 0.5, 0.99])
def test_a_damaged_file_is_told(file: Path, left: float) -> None:
    write_gguf(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * left)] or b"GGUF and nothing more")
    with pytest.raises(CheckpointError, match=r"tiny\.gguf is damaged"):
        resolve_model(str(file))


def test_numbers_that_float16_does_not_hold_are_told(file: Path) -> None:
    write_gguf(file, "Llama 2", KINDS["Q8_0"], **WIDE)
    (tensor,) = (one for one in gguf.GGUFReader(file, "r+").tensors if one.name == "blk.1.ffn_up.weight")
    tensor.data[-1, :2] = np.array([np.inf], np.float16).view(np.uint8)  # the scale of a block
    with pytest.raises(CheckpointError, match=r"1\.mlp\.up_proj\.weight has numbers that float16 does not hold"):
        resolve_model(str(file))


def test_a_folder_is_made_once_for_each_content_whatever_an_earlier_one_left(file: Path, cache: Path) -> None:
    write_gguf(file)
    folder = resolve_model(str(file))
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(str(file)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    write_gguf(file, fields={"general.name": "another"})
    second = resolve_model(str(file))
    assert second != folder
    second.rename(second.with_name(f"{second.name}.draft"))  # as a killed process leaves it
    (second.with_name(f"{second.name}.draft") / "model-00001.safetensors").write_bytes(b"half")
    assert resolve_model(str(file)) == second
    assert not (second / "model-00001.safetensors").exists()


def test_two_starts_at_once_convert_once(file: Path) -> None:
    write_gguf(file)
    told: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: resolve_model(str(file), told.append), range(2))
    assert one == other
    assert sum(what.startswith("converting") for what in told) == 1


def test_a_cache_that_cannot_be_written_is_told(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(file)
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("VLM_SERVE_CACHE", str(tmp_path / "taken"))
    with pytest.raises(ConfigurationError, match="VLM_SERVE_CACHE"):
        resolve_model(str(file))


def test_converting_holds_no_more_than_a_part_of_the_model(
    file: Path, record_property: Callable[[str, object], None]
) -> None:
    write_gguf(file)
    large = file.with_name("large.gguf")
    write_gguf(large, **WIDE | {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 256})
    command = [sys.executable, "-c", CONVERT, file, large]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    record_property("peak_of_memory_to_weights", done.stdout.strip())
    assert float(done.stdout) <= 0.6  # of some 60 MB, and the file is as large
