"""A `tokenizer.model` gives the tokens that SentencePiece's own algorithm gives, and serves as any tokenizer does."""

import contextlib
import json
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoints import tiny_text_config
from tests.families.pictures import picture
from tests.families.rad_checkpoints import CONFIG, OPEN_CLIP
from tests.serving.test_detokenizer import detokenizer
from vlm_serve.errors import CheckpointError
from vlm_serve.families import load_family
from vlm_serve.families.base import read_tokenizer
from vlm_serve.types import ChatInput, ChatMessage, FinishReason, ImagePart, TextPart

# isort: split
from transformers import PreTrainedTokenizerFast

WORDS = "▁the ▁The ▁lungs ▁are ▁clear ▁no ▁mass ▁▁ ▁▁▁▁ ass lung USER ASSISTANT 漢字".split()
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def field(number: int, value: int | bytes | float) -> bytes:
    """One of a protobuf message's: a number, bytes, or a float."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value % (1 << 64))
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def pieces_like_llamas() -> dict[str, tuple[float, int]]:
    """Score and kind of each piece, in the order of their ids: control, bytes, what is merged, letters."""
    pieces: dict[str, tuple[float, int]] = {"<unk>": (0.0, UNKNOWN), "<s>": (0.0, CONTROL), "</s>": (0.0, CONTROL)}
    pieces |= {f"<0x{byte:02X}>": (0.0, BYTE) for byte in range(256)}
    for word in WORDS:
        for end in range(2, len(word) + 1):
            pieces.setdefault(word[:end], (-float(len(pieces) - 259), NORMAL))
    for letter in sorted({letter for word in WORDS for letter in word}):
        pieces.setdefault(letter, (-float(len(pieces) - 259), NORMAL))
    return pieces


PIECES = pieces_like_llamas()
IDS = {text: index for index, text in enumerate(PIECES)}


def write_model(
    folder: Path,
    *,
    pieces: dict[str, tuple[float, int]] = PIECES,
    trainer: dict[int, int] | None = None,
    normalizer: dict[int, int | bytes] | None = None,
    **settings: Any,
) -> Path:
    """A folder with a `tokenizer.model` as Llama's are, and what else there may be told of it in its config.

    Args:
        trainer, normalizer: fields that differ.
        settings: tokenizer_config.json.
    """
    message = b"".join(
        field(1, field(1, text.encode()) + field(2, score) + (field(3, kind) if kind != NORMAL else b""))
        for text, (score, kind) in pieces.items()
    )
    trained = {3: 2, 35: 1, 40: 0, 41: 1, 42: 2, 43: -1} | (trainer or {})
    normal: dict[int, int | bytes] = {1: b"identity", 3: 1, 4: 0} | (normalizer or {})
    message += field(2, b"".join(field(number, value) for number, value in trained.items()))
    message += field(3, b"".join(field(number, value) for number, value in normal.items()))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(message)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | settings))
    return folder


def sentencepiece(text: str) -> list[int]:
    """Byte-pair encoding as SentencePiece's does it, on a text whose spaces are `▁` already: of all neighbours, those
    whose piece has the highest score are joined, the leftmost first; what is in no piece falls into its bytes.
    """
    parts = list(text)
    while True:
        joined = [
            (PIECES[one + two][0], -place)
            for place, (one, two) in enumerate(pairwise(parts))
            if PIECES.get(one + two, (0, 0))[1] == NORMAL
        ]
        if not joined:
            break
        place = -max(joined)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    found: list[int] = []
    for part in parts:
        found += [IDS[part]] if part in IDS else [IDS[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


@pytest.fixture(scope="module")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """As those before transformers 4.33 are, LLaVA-Med's too: their config says it, or nothing."""
    return read_tokenizer(PreTrainedTokenizerFast, write_model(tmp_path_factory.mktemp("legacy")))


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """As Vicuna's."""
    return read_tokenizer(PreTrainedTokenizerFast, write_model(tmp_path_factory.mktemp("newer"), legacy=False))


TEXTS = st.lists(st.sampled_from([*"the clarumsg.,Xé漢\n", " ", "  ", "the", " lungs", "mass", "🫀", "▁"])).map("".join)


@given(text=TEXTS)
def test_a_text_has_the_tokens_of_sentencepieces_algorithm(legacy: Any, text: str) -> None:
    expected = sentencepiece(f"▁{text.replace(' ', '▁')}") if text else []
    assert legacy.encode(text, add_special_tokens=False) == expected
    assert legacy.encode(text) == [1, *expected]


@given(text=TEXTS.filter(lambda text: not text.startswith((" ", "▁"))))
def test_so_has_that_of_a_newer_one(newer: Any, text: str) -> None:
    expected = sentencepiece(f"▁{text.replace(' ', '▁')}") if text else []
    assert newer.encode(text, add_special_tokens=False) == expected


@given(text=TEXTS.filter(lambda text: "▁" not in text))
def test_tokens_give_their_text(legacy: Any, text: str) -> None:
    assert legacy.decode(legacy.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize(("kind", "prefix"), [("legacy", "▁"), ("newer", "")])
def test_behind_a_special_token_an_older_one_puts_a_space(
    request: pytest.FixtureRequest, kind: str, prefix: str
) -> None:
    tokenizer = request.getfixturevalue(kind)
    expected = [*sentencepiece("▁the"), 2, *sentencepiece(f"{prefix}USER")]
    assert tokenizer.encode("the</s>USER", add_special_tokens=False) == expected


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("text", ["The lungs are clear.", "Größe 3 µm → 漢字 🫀", " two  spaces\n\nand lines"])
def test_an_answer_streams_as_it_is_decoded_at_once(legacy: Any, text: str, chunk: int) -> None:
    ids = legacy.encode(text, add_special_tokens=False)
    one, streamed = detokenizer(legacy.backend_tokenizer), ""
    for start in range(0, len(ids), chunk):
        ends = start + chunk >= len(ids)
        streamed += one.add(ids[start : start + chunk], FinishReason.LENGTH if ends else None).text
    assert streamed.lstrip() == text.lstrip()
    assert "�" not in streamed


def test_named_and_added_tokens_are_those_of_the_folder(tmp_path: Path) -> None:
    last = len(PIECES)
    write_model(tmp_path, pad_token={"content": "<pad>"}, chat_template="{{ messages }}", add_bos_token=False)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<mark>": last + 2, "<end>": last + 1, "<pad>": last}))
    tokenizer = read_tokenizer(PreTrainedTokenizerFast, tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, last + 1, last)
    assert tokenizer.encode("<mark>the<pad>") == [last + 2, *sentencepiece("▁the"), last]
    assert tokenizer.decode([last + 2, last, last + 1], skip_special_tokens=True) == "<mark>"
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.backend_tokenizer.get_vocab_size() == last + 3


def test_tokens_that_the_config_declares_keep_their_flags(tmp_path: Path) -> None:
    last = len(PIECES)
    declared = {str(last): {"content": "<turn>", "special": True}, str(last + 1): {"content": "mm", "special": False}}
    tokenizer = read_tokenizer(PreTrainedTokenizerFast, write_model(tmp_path, added_tokens_decoder=declared))
    assert tokenizer.encode("<turn>mm") == [1, last, last + 1]
    assert tokenizer.decode([last, last + 1], skip_special_tokens=True) == "mm"


def test_symbols_that_the_model_defines_are_never_parted(tmp_path: Path) -> None:
    pieces = PIECES | {"▁thelungs": (0.0, USER_DEFINED)}
    tokenizer = read_tokenizer(PreTrainedTokenizerFast, write_model(tmp_path, pieces=pieces))
    assert tokenizer.encode("a▁thelungs") == [1, *sentencepiece("▁a"), len(PIECES)]


def test_a_control_token_that_nothing_names_is_a_special_one(tmp_path: Path) -> None:
    pieces = PIECES | {"<turn>": (0.0, CONTROL)}
    tokenizer = read_tokenizer(PreTrainedTokenizerFast, write_model(tmp_path, pieces=pieces))
    assert tokenizer.encode("<turn>") == [1, len(PIECES)]
    assert tokenizer.decode([len(PIECES)], skip_special_tokens=True) == ""


def test_a_model_without_a_space_in_front_gets_none(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(PreTrainedTokenizerFast, write_model(tmp_path, normalizer={3: 0}))
    assert tokenizer.encode("lung mass") == [1, *sentencepiece("lung▁mass")]
    assert tokenizer.decode(tokenizer.encode(" the"), skip_special_tokens=True) == " the"


def files_that_are_none() -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "tiktoken's", b"IQ== 0\nIg== 1\nIw== 2\n" * 40
    yield "no piece", field(2, field(3, 2))
    yield "cut short", field(1, field(1, b"<unk>"))[:-2]
    yield "no text", field(1, field(1, b"\xff\xfe"))
    yield "no message", field(1, 7)
    yield "an endless number", b"\xff" * 40
    yield "a piece's text a number", field(1, field(1, 7))
    yield "a piece twice", field(1, field(1, b"a")) * 2 + field(2, field(3, 2))


@pytest.mark.parametrize(
    "content", [one for _, one in files_that_are_none()], ids=[n for n, _ in files_that_are_none()]
)
def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path: Path, content: bytes) -> None:
    write_model(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is no SentencePiece model.*as tokenizer\.json"):
        read_tokenizer(PreTrainedTokenizerFast, tmp_path)


@given(place=st.integers(0, 2000), junk=st.binary(max_size=12))
def test_no_damage_is_another_error_than_that(
    tmp_path_factory: pytest.TempPathFactory, place: int, junk: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    pieces = {text: PIECES[text] for text in ("<unk>", "<s>", "</s>", "▁the", "▁th", "▁t", "▁", "t", "h", "e")}
    content = bytearray((write_model(folder, pieces=pieces) / "tokenizer.model").read_bytes())
    place %= len(content)
    content[place : place + len(junk)] = junk
    (folder / "tokenizer.model").write_bytes(content)
    with contextlib.suppress(CheckpointError):
        read_tokenizer(PreTrainedTokenizerFast, folder).encode("the")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"trainer": {3: 1}}, "is not of BPE"),
        ({"normalizer": {2: b"rules"}}, "has rules of normalization"),
        ({"normalizer": {4: 1}}, "takes surplus spaces out"),
        ({"trainer": {24: 1}}, "puts spaces behind words"),
        ({"added_tokens_decoder": {"9999": {"content": "<far>"}}}, "ids out of order"),
    ],
)
def test_a_model_of_another_kind_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        read_tokenizer(PreTrainedTokenizerFast, write_model(tmp_path, **changes))


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        *(("tokenizer_config.json", "added_tokens_decoder", value) for value in ([1], {"x": "a"}, {"7": {}})),
        ("tokenizer_config.json", "added_tokens_decoder", {"7": 5}),
        *(("tokenizer_config.json", "bos_token", value) for value in ({"a": 1}, 5)),
        *(("special_tokens_map.json", "additional_special_tokens", value) for value in (5, "<a>", [5])),
        *(("added_tokens.json", "<x>", value) for value in ("9", None, True)),
    ],
)
def test_what_is_no_token_is_refused_by_its_field(tmp_path: Path, file: str, field: str, value: object) -> None:
    (write_model(tmp_path) / file).write_text(json.dumps({field: value}))
    with pytest.raises(CheckpointError, match=field):
        read_tokenizer(PreTrainedTokenizerFast, tmp_path)


def test_a_piece_that_would_take_hours_is_refused(tmp_path: Path) -> None:
    """Each of the places where a long one may be cut is looked at, and each costs its length."""
    for length in (256, 257):
        write_model(tmp_path / str(length), pieces=PIECES | {"a" * length: (-1e9, NORMAL)})
    read_tokenizer(PreTrainedTokenizerFast, tmp_path / "256")
    with pytest.raises(CheckpointError, match="has 257 characters; at most 256"):
        read_tokenizer(PreTrainedTokenizerFast, tmp_path / "257")


def test_a_tokenizer_json_beside_it_is_the_one_that_is_read(tmp_path: Path, newer: Any) -> None:
    write_model(tmp_path)
    newer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(PreTrainedTokenizerFast, tmp_path)
    assert tokenizer.encode("</s>USER", add_special_tokens=False) == [2, *sentencepiece("USER")]


@pytest.mark.parametrize("is_legacy", [True, False])
def test_a_llava_folder_with_it_alone_prompts_as_its_authors_code_does(tmp_path: Path, is_legacy: bool) -> None:
    """Which makes tokens of the texts before and behind an image one by one, with a space in front of each."""
    write_model(tmp_path, legacy=is_legacy)
    config = tiny_text_config(vocab_size=len(PIECES)).to_dict() | CONFIG
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "biomedclipcxr_518.json").write_text(json.dumps(OPEN_CLIP))
    family = load_family(tmp_path)
    assert family.image_token_id == len(PIECES)
    chat = ChatInput((ChatMessage("user", (ImagePart(b"", "image/png"), TextPart("Is the mass clear?"))),))
    prompt = family.render_chat(chat, [family.process_image(picture())])
    (span,) = prompt.images
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: "
    )
    before = [1, *sentencepiece(f"▁{system.replace(' ', '▁')}")]
    behind = sentencepiece("▁\nIs▁the▁mass▁clear?▁ASSISTANT:")
    assert prompt.token_ids == (*before, *[len(PIECES)] * 9, *behind)
    assert span.offset == len(before)
    typed = ChatInput((ChatMessage("user", (TextPart("</s><image><0x0A>"),)),))
    assert not {2, len(PIECES), IDS["<0x0A>"]} & set(family.render_chat(typed, []).token_ids)


def test_it_is_what_the_library_makes_of_a_model_that_it_trained(tmp_path: Path) -> None:
    library = pytest.importorskip("sentencepiece")
    (tmp_path / "words.txt").write_text("\n".join(["The lungs are clear. No mass, no effusion."] * 20))
    library.SentencePieceTrainer.train(
        input=str(tmp_path / "words.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
    )
    theirs = library.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = read_tokenizer(PreTrainedTokenizerFast, tmp_path)
    for text in ("The lungs are clear.", "  no mass\n in 漢字", "effusions, clearly"):
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text)
