"""What each token stands for, to the byte. Serves log-probabilities, whose tokens may be parts of a character."""

import json
import re
from typing import Any

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """The bytes of one tokenizer's tokens.

    Byte-level vocabularies (GPT-2's) write each byte as a letter; those with byte fallback (SentencePiece's) write
    single bytes as `<0x0A>` and a space as `▁`. Special tokens stand for their own names.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
        decoder = json.loads(tokenizer.to_str())["decoder"]
        kinds = {step["type"] for step in _steps(decoder)}
        self._letters = _byte_letters() if "ByteLevel" in kinds else None
        self._has_fallback = "ByteFallback" in kinds
        self._replaced = _replacements(decoder)

    def __getitem__(self, token_id: int) -> bytes:
        """Empty for an id that no token has."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self.tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._letters is not None:
            if all(letter in self._letters for letter in token):
                return bytes(self._letters[letter] for letter in token)
            return token.encode()
        if self._has_fallback and (match := _BYTE.fullmatch(token)):
            return bytes.fromhex(match.group(1))
        for written, meant in self._replaced:
            token = token.replace(written, meant)
        return token.encode()


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The decoder's steps; one that is no sequence is its own only step."""
    if decoder is None:
        return []
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _replacements(decoder: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What the decoder replaces in every token, in order: a space's sign, a word piece's prefix."""
    found = []
    for step in _steps(decoder):
        match step:
            case {"type": "Metaspace", "replacement": str(written)}:
                found.append((written, " "))
            case {"type": "Replace", "pattern": {"String": str(written)}, "content": str(meant)}:
                found.append((written, meant))
    return found


def _byte_letters() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes of Latin-1 stand for themselves, the others for letters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
