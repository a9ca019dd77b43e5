"""The tokenizer of a GGUF file, as llama.cpp reads it: byte-level BPE (`gpt2`) or SentencePiece's BPE (`llama`)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from vlm_serve.errors import CheckpointError
from vlm_serve.families.gguf_model import GgufModel
from vlm_serve.families.sentencepiece import (
    CONTROL,
    NORMAL,
    USER_DEFINED,
    Piece,
    SentencePieceModel,
    build_tokenizer,
)

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_LLAMA3 = ("llama3", "llama-v3", "llama-bpe")
_QWEN2 = ("qwen2", "deepseek-r1-qwen")
_PATTERNS = dict.fromkeys(_LLAMA3, _WORDS % "{1,3}") | dict.fromkeys(_QWEN2, _WORDS % "") | {"gpt-4o": _GPT4O}
PRE_TOKENIZERS = ("default", "gpt-2", "smollm", *_PATTERNS)
"""How text is cut up before byte pairs are merged, by `tokenizer.ggml.pre`."""

_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>")
"""Special tokens that end an answer wherever there is one: few files name all of theirs."""


def write_tokenizer(model: GgufModel, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    Raises:
        CheckpointError: it is of a kind that is not known.
    """
    tokens, kinds = _tokens(model)
    form = model.field("tokenizer.ggml.model")
    build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(form)
    if build is None or not tokens:
        raise model.refused("the tokenizer (tokenizer.ggml.model)", form)
    tokenizer = build(model, tokens, kinds)
    roles = {
        f"{role}_token": tokens[token_id]
        for role, name in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
        if isinstance(token_id := model.field(f"tokenizer.ggml.{name}_token_id"), int) and token_id < len(tokens)
    }
    starts = model.field("tokenizer.ggml.add_bos_token")
    if starts is None:  # what llama.cpp takes then
        starts = form == "llama" or model.field("tokenizer.ggml.pre") in _LLAMA3
    if starts and "bos_token" in roles:
        bos = roles["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, tokens.index(bos))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = roles | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.field(f"{model.architecture}.context_length"),
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def end_tokens(model: GgufModel) -> list[int]:
    """The tokens that end an answer: those the file says, and those that it has of the usual ones."""
    said = [model.field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    pairs = zip(*_tokens(model), strict=True)
    usual = {index for index, (token, kind) in enumerate(pairs) if kind == CONTROL and token in _ENDS}
    return sorted(usual | {token_id for token_id in said if token_id is not None})


def _tokens(model: GgufModel) -> tuple[list[str], list[int]]:
    """Every token and its kind, as SentencePiece numbers these."""
    tokens: list[str] = model.field("tokenizer.ggml.tokens") or []
    kinds: list[int] = model.field("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise CheckpointError(f"{model.path.name} has {len(tokens)} tokens and {len(kinds)} types. Copy it again.")
    return tokens, kinds


def _byte_level(model: GgufModel, tokens: Sequence[str], kinds: Sequence[int]) -> Tokenizer:
    pre = model.field("tokenizer.ggml.pre") or "default"
    if pre not in PRE_TOKENIZERS:
        raise model.refused("text cut up (tokenizer.ggml.pre) as", pre)
    merges = [tuple(merge.split(" ", 1)) for merge in model.field("tokenizer.ggml.merges") or ()]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in _LLAMA3))
    cut: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    if pre in _PATTERNS:
        cut.append(pre_tokenizers.Split(Regex(_PATTERNS[pre]), behavior="isolated"))
    cut.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _PATTERNS))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
    if pre in _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    named = list(zip(tokens, kinds, strict=True))
    tokenizer.add_special_tokens([AddedToken(one, normalized=False) for one, kind in named if kind == CONTROL])
    tokenizer.add_tokens([AddedToken(one, normalized=False) for one, kind in named if kind == USER_DEFINED])
    return tokenizer


def _sentencepiece(model: GgufModel, tokens: Sequence[str], kinds: Sequence[int]) -> Tokenizer:
    scores: Sequence[float] = model.field("tokenizer.ggml.scores") or ()
    if model.architecture.startswith("gemma") or not scores:  # Gemma's do not follow the order of its merges
        scores = [-float(index) for index in range(len(tokens))]
    pieces = tuple(Piece(*piece) for piece in zip(tokens, scores, kinds, strict=True))
    ids = [model.field(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "unknown")]
    bos, eos, unknown = (-1 if token_id is None else token_id for token_id in ids)
    space_in_front = model.field("tokenizer.ggml.add_space_prefix") is not False
    return build_tokenizer(SentencePieceModel(pieces, True, space_in_front, bos, eos, unknown), legacy=True)
