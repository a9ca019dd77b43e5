"""SentencePiece's `tokenizer.model` as a tokenizer of the `tokenizers` library, for a folder without a tokenizer.json:
Vicuna's, LLaVA-Med's, Llama 2's. The file is read here, so that the same text gives the same tokens everywhere.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from vlm_serve.errors import CheckpointError

SPACE = "▁"
"""What SentencePiece has for a space, and in front of a text."""

BPE = 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Of `sentencepiece_model.proto`: a trainer's `model_type`, and the `type` of a piece."""

LONGEST_PIECE = 256
"""Characters, far above the 16 that a trainer allows by itself: the time for merges grows with their square."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its place there is its id."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What a `tokenizer.model` says. `space_in_front`: a text is taken as if a space were before it."""

    pieces: tuple[Piece, ...]
    byte_fallback: bool
    space_in_front: bool
    bos_id: int
    eos_id: int
    unk_id: int


def sentencepiece_tokenizer(
    file: Path, settings: Mapping[str, Any], added: Mapping[str, int]
) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder's `tokenizer.model`.

    Args:
        file: SentencePiece's, of BPE and without rules of normalization, as those of Llama's kind are.
        settings: of tokenizer_config.json, and what special_tokens_map.json has beside it.
        added: of added_tokens.json, each token's id.

    Raises:
        CheckpointError: the file is another, the added tokens leave a gap, or what is said of a token is none.
    """
    model = _read_model(file)
    tokenizer = build_tokenizer(model, legacy=bool(settings.get("legacy", True)))
    ids = {"bos_token": model.bos_id, "eos_token": model.eos_id, "unk_token": model.unk_id}
    named = {name: model.pieces[index].text for name, index in ids.items() if index in range(len(model.pieces))}
    named |= {name: _content(name, settings[name]) for name in (*ids, "pad_token") if settings.get(name)}
    declared = _declared(settings.get("added_tokens_decoder") or {})
    for text, index in added.items():
        if type(index) is not int:
            raise _refusal(f"The id of {text!r} in added_tokens.json", index, "a whole number")
        declared.setdefault(index, AddedToken(text, normalized=False, special=text in named.values()))
    for index, token in sorted(declared.items()):
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != index:
            raise CheckpointError(f"The added tokens beside {file} have ids out of order. Copy the folder again.")
    further = settings.get("additional_special_tokens") or []
    if not isinstance(further, list):
        raise _refusal("additional_special_tokens", further, "a list")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        add_bos_token=settings.get("add_bos_token", True),
        add_eos_token=settings.get("add_eos_token", False),
        additional_special_tokens=[_content("additional_special_tokens", token) for token in further],
        chat_template=settings.get("chat_template"),
        clean_up_tokenization_spaces=False,
        **named,
    )


def _content(field: str, token: object) -> str:
    content = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(content, str):
        raise _refusal(field, token, "a token's text, or an object with it as content")
    return content


def _declared(tokens: object) -> dict[int, AddedToken]:
    """`added_tokens_decoder`, by the ids."""
    field = "added_tokens_decoder"
    if not isinstance(tokens, Mapping):
        raise _refusal(field, tokens, "an object of tokens by their ids")
    declared = {}
    for index, token in tokens.items():
        if not index.isdecimal():
            raise _refusal(f"An id in {field}", index, "a whole number")
        flags = {"normalized": False, "special": True}
        if isinstance(token, Mapping):
            names = ("lstrip", "rstrip", "single_word", "normalized", "special")
            flags = {name: bool(token.get(name, False)) for name in names}
        declared[int(index)] = AddedToken(_content(field, token), **flags)
    return declared


def _refusal(what: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{what}, of the tokenizer, is {repr(value)[:80]}; it must be {wanted}. Take the tokenizer's files from one "
        "checkpoint."
    )


def build_tokenizer(model: SentencePieceModel, *, legacy: bool) -> Tokenizer:
    """The tokenizer of such a model, whichever file it is from.

    Args:
        legacy: whether text behind a special token begins with a space, too, as that at the front does.
    """
    vocab = {piece.text: index for index, piece in enumerate(model.pieces)}
    unknown = model.pieces[model.unk_id].text if model.unk_id in range(len(model.pieces)) else None
    bpe = models.BPE(vocab, _merges(model), unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback)
    tokenizer = Tokenizer(bpe)
    parts: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.space_in_front:
        parts.append(decoders.Strip(" ", 1, 0))
    if model.space_in_front and not legacy:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    else:
        rules: list[Any] = [normalizers.Prepend(SPACE)] if model.space_in_front else []
        tokenizer.normalizer = normalizers.Sequence([*rules, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(parts)
    special = [piece.text for piece in model.pieces if piece.kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    symbols = [piece.text for piece in model.pieces if piece.kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in symbols])
    return tokenizer


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Pairs of pieces that make a third, the one with the best score first: SentencePiece joins those of the highest
    score (`bpe_model.cc`), `tokenizers` those of the first rank.
    """
    scores = {piece.text: piece.score for piece in model.pieces if piece.kind == NORMAL}
    if (longest := max(map(len, scores), default=0)) > LONGEST_PIECE:
        raise CheckpointError(
            f"A piece of the SentencePiece vocabulary has {longest} characters; at most {LONGEST_PIECE} are read. Save "
            "the tokenizer as tokenizer.json with transformers."
        )
    pairs = [
        (score, end, text)
        for text, score in scores.items()
        for end in range(1, len(text))
        if text[:end] in scores and text[end:] in scores
    ]
    pairs.sort(key=lambda pair: pair[:2], reverse=True)
    return [(text[:end], text[end:]) for _, end, text in pairs]


def _read_model(file: Path) -> SentencePieceModel:
    try:
        fields = list(_fields(file.read_bytes()))
        pieces = tuple(_piece(value) for number, value in fields if number == 1)
        # Of a message that is there twice the fields add up.
        trainer, normalizer = (dict(_fields(b"".join(v for number, v in fields if number == one))) for one in (2, 3))
        model = SentencePieceModel(
            pieces,
            byte_fallback=bool(trainer.get(35, 0)),
            space_in_front=bool(normalizer.get(3, 1)),
            bos_id=_signed(trainer.get(41, 1)),
            eos_id=_signed(trainer.get(42, 2)),
            unk_id=_signed(trainer.get(40, 0)),
        )
        if not pieces or len({piece.text for piece in pieces}) < len(pieces):
            raise ValueError("no vocabulary")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, struct.error):
        raise CheckpointError(
            f"{file} is no SentencePiece model. Save the tokenizer as tokenizer.json with transformers."
        ) from None
    for told, is_so in (
        ("is not of BPE", trainer.get(3, 1) != BPE),
        ("has rules of normalization", normalizer.get(2)),
        ("takes surplus spaces out", normalizer.get(4, 1)),
        ("puts spaces behind words", trainer.get(24, 0)),
    ):
        if is_so:
            raise CheckpointError(
                f"{file} {told}; of SentencePiece's models those of Llama's kind are read. Save the tokenizer as "
                "tokenizer.json with transformers, where sentencepiece and protobuf are installed, and put it there."
            )
    return model


def _piece(message: bytes) -> Piece:
    fields = dict(_fields(message))
    (score,) = struct.unpack("<f", fields.get(2, b"\0\0\0\0"))
    return Piece(fields[1].decode(), score, fields.get(3, NORMAL))


def _signed(number: int) -> int:
    """A negative number, which stands for none, is stored as its 64 bits."""
    return number - (1 << 64) if number >> 63 else number


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: an int, or the bytes of whatever else it is.

    Raises:
        IndexError, TypeError, ValueError: it is none.
    """
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(message, position)
            yield key >> 3, value
            continue
        if kind == 2:
            size, position = _varint(message, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"no field is of kind {kind}")
        if position + size > len(message):
            raise ValueError("cut short")
        yield key >> 3, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """A number of seven bits a byte, the last ones first, and the place behind it."""
    number = 0
    for shift in range(0, 64, 7):
        byte = message[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position
    raise ValueError("a number of more than 64 bits")
