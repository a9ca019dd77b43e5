"""Tiny GGUF files, written with the package of the format's authors, beside transformers' models of their weights."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import SentencePieceBPETokenizer

from tests.checkpoints import SPECIAL_TOKENS, WORDS, make_tokenizer
from tests.families.text_checkpoints import make_text

# isort: split
from transformers import PreTrainedModel

Kind = gguf.GGMLQuantizationType
Choose = Callable[[str], Kind]
"""The kind of a matrix, by its name in the file."""

BLOCKS = {Kind.Q4_K: 144, Kind.Q5_K: 176, Kind.Q6_K: 210}
"""Bytes of a block of 256 numbers in the kinds that the package reads and does not write."""


def pack(values: np.ndarray, kind: Kind, rng: np.random.Generator) -> np.ndarray:
    """Blocks of the kind; of those that the package does not write, blocks of random bits and small scales."""
    if kind not in BLOCKS:
        return gguf.quantize(values, kind)
    blocks = rng.integers(0, 256, (values.size // 256, BLOCKS[kind]), dtype=np.uint8)
    scales = rng.uniform(1e-4, 3e-4, (len(blocks), 2)).astype(np.float16)
    if kind == Kind.Q6_K:  # scales of -128 to 127, then one for all of them
        blocks[:, -2:] = (scales[:, :1] / 8).view(np.uint8)
    else:
        scales[:, 1] *= 7  # the minimum, so that numbers lie on both sides of zero
        blocks[:, :4] = scales.view(np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


def q4_k_m(name: str) -> Kind:
    """What llama.cpp's Q4_K_M takes for each matrix."""
    if name in ("output.weight", "token_embd.weight"):
        return Kind.Q6_K
    if name.startswith("blk.0.") and name.split(".")[2] in ("attn_v", "ffn_down"):
        return Kind.Q6_K
    return Kind.Q5_K if name == "blk.1.attn_v.weight" else Kind.Q4_K


def write_gguf(
    file: Path,
    row: str = "Llama 2",
    choose: Choose = lambda name: Kind.F16,
    *,
    fields: Mapping[str, str | int | float | bool] | None = None,
    factors: Mapping[str, np.ndarray] | None = None,
    sentencepiece: bool = False,
    **changes: Any,
) -> PreTrainedModel:
    """Writes a model of `text_checkpoints.ROWS` and returns transformers' with the weights that its blocks stand for.

    Args:
        choose: the kind of each matrix.
        fields: what the file says besides, or instead.
        factors: tensors of the rotary embedding.
        sentencepiece: its tokenizer is one of that kind, see `pieces`.
        changes: fields of the config that differ.
    """
    tokens, kinds, scores = pieces(in_order=row.startswith("Gemma")) if sentencepiece else byte_level()
    model = make_text(file.parent / "source", row, vocab_size=len(tokens), **changes)
    architecture = str(model.config.model_type).removesuffix("_text").replace("_", "")
    writer = gguf.GGUFWriter(file, architecture)
    said = _settings(architecture, model.config) | {
        "tokenizer.ggml.model": "llama" if sentencepiece else "gpt2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 5,
    }
    for name, value in (said | dict(fields or {})).items():
        kind = {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        kind[type(value)](name, value)  # type: ignore[arg-type]
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if sentencepiece:
        # Those in Gemma's files do not follow the order of its merges.
        writer.add_token_scores([-score for score in scores] if architecture.startswith("gemma") else scores)
    else:
        merges = json.loads(make_tokenizer().backend_tokenizer.model.__getstate__())["merges"]
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_chat_template(str(make_tokenizer().chat_template))
    for name, values in (factors or {}).items():
        writer.add_tensor(name, values)
    _write_tensors(writer, model, architecture, choose)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _settings(architecture: str, config: Any) -> dict[str, str | int | float | bool]:
    rope = config.rope_parameters
    whole = rope.get("full_attention", rope)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    own = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": float(whole["rope_theta"]),
    }
    if architecture in ("llama", "phi3"):
        own["rope.dimension_count"] = int(head_dim * (rope.get("partial_rotary_factor") or 1.0))
    if architecture in ("gemma2", "gemma3", "phi3") and config.sliding_window is not None:
        own["attention.sliding_window"] = config.sliding_window
    if whole["rope_type"] == "linear":
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(whole["factor"])}
    if architecture == "gemma2":
        own["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        own["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if architecture == "qwen3moe":
        own["expert_count"] = config.num_experts
        own["expert_used_count"] = config.num_experts_per_tok
        own["expert_feed_forward_length"] = config.moe_intermediate_size
    return {f"{architecture}.{name}": value for name, value in own.items()}


def _write_tensors(writer: gguf.GGUFWriter, model: PreTrainedModel, architecture: str, choose: Choose) -> None:
    """Each parameter as llama.cpp lays it out; it then is what its blocks stand for."""
    config: Any = model.config
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    rng = np.random.default_rng(0)

    def write(theirs: str, values: np.ndarray) -> np.ndarray:
        kind = Kind.F32 if values.ndim == 1 else choose(theirs)
        packed = pack(np.ascontiguousarray(values), kind, rng)
        writer.add_tensor(theirs, packed, raw_dtype=kind)
        made = gguf.dequantize(packed, kind)
        return made if kind in (Kind.F32, Kind.BF16) else made.astype(np.float16).astype(np.float32)

    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        module, _, end = name.rpartition(".")
        if end == "gate_up_proj":
            block = f"blk.{name.split('.')[2]}"
            halves = np.split(values, 2, axis=1)
            made = np.concatenate(
                [write(f"{block}.{part}.weight", half) for part, half in zip(EXPERTS, halves, strict=True)], axis=1
            )
        elif end == "down_proj":
            made = write(f"blk.{name.split('.')[2]}.ffn_down_exps.weight", values)
        else:
            base = str(names.get_name(module))
            part = base.rpartition(".")[2]
            if architecture == "llama" and part in heads:
                made = from_pairs(write(f"{base}.{end}", to_pairs(values, heads[part])), heads[part])
            elif architecture.startswith("gemma") and values.ndim == 1:
                made = write(f"{base}.{end}", values + 1) - 1
            else:
                made = write(f"{base}.{end}", values)
        parameter.data = torch.from_numpy(np.array(made))


EXPERTS = ("ffn_gate_exps", "ffn_up_exps")


def to_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows as GGUF keeps them: those that rotary embedding turns together lie side by side."""
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def from_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def byte_level() -> tuple[list[str], list[int], list[float]]:
    """Tokens, kinds and scores of the tokenizer of the other tests, and one more that is special."""
    vocabulary = make_tokenizer().get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), "<|endoftext|>"]
    return tokens, [3 if token in (*SPECIAL_TOKENS, "<|endoftext|>") else 1 for token in tokens], []


def pieces(*, in_order: bool = False) -> tuple[list[str], list[int], list[float]]:
    """Those of one of SentencePiece's, trained here: special tokens, a run of blanks, the 256 bytes, pieces.

    Args:
        in_order: the pieces lie in the order of their merges, as Gemma's do.
    """
    trained = SentencePieceBPETokenizer()
    trained.train_from_iterator([WORDS], vocab_size=130, special_tokens=[], show_progress=False)
    rank = trained.get_vocab()
    learned = sorted(rank, key=rank.__getitem__, reverse=not in_order)
    tokens = [*SPECIAL_TOKENS, "   ", *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    kinds = [2, *[3] * (len(SPECIAL_TOKENS) - 1), 4, *[6] * 256, *[1] * len(learned)]
    return tokens, kinds, [0.0] * (len(SPECIAL_TOKENS) + 257) + [-float(rank[piece]) for piece in learned]
