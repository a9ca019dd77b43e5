"""A token's bytes: put together, they are the text, also where a character is cut into several tokens."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from tests.checkpoints import make_tokenizer
from vlm_serve.serving.token_bytes import TokenBytes

TEXT = "Ödem, 3 µm – kein Befund 🫁\n"


def sentencepiece() -> Tokenizer:
    """As a converted SentencePiece model is: single letters, `▁` for a space, bytes for all else."""
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    vocabulary |= {letter: 257 + place for place, letter in enumerate("▁ekin")}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@pytest.mark.parametrize("make", [lambda: make_tokenizer().backend_tokenizer, sentencepiece], ids=["bytes", "fallback"])
def test_the_bytes_of_the_tokens_are_those_of_the_text(make):
    tokenizer = make()
    token_bytes = TokenBytes(tokenizer)
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert b"".join(token_bytes[token_id] for token_id in ids) == TEXT.encode()
    assert any(len(token_bytes[token_id].decode(errors="ignore")) == 0 for token_id in ids)  # a part of a character


def test_a_special_token_stands_for_its_name_and_an_unknown_id_for_nothing():
    token_bytes = TokenBytes(make_tokenizer().backend_tokenizer)
    assert token_bytes[2] == b"</s>"
    assert token_bytes[10**6] == b""
