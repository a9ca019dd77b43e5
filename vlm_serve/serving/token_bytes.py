"""What each token stands for, to the byte. Serves log-probabilities, whose tokens may be parts of a character, and the
detokenizer, which may begin inside of one.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CONTINUATION = re.compile(rb"[\x80-\xbf]")
_UNFINISHED = re.compile(rb"([\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z")


class TokenBytes:
    """The bytes of one tokenizer's tokens.

    Byte-level vocabularies (GPT-2's) write each byte as a letter; those with byte fallback (SentencePiece's) write
    single bytes as `<0x0A>` and a space as `▁`. Special tokens stand for their own names.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
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

    def texts(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as text by itself, with U+FFFD for bytes that are no whole character."""
        found = {token_id: self[token_id].decode("utf-8", "replace") for token_id in set(token_ids)}
        return [found[token_id] for token_id in token_ids]


def begins_inside_a_character(piece: bytes) -> bool:
    """Whether the first byte goes on with a character of UTF-8."""
    return bool(_CONTINUATION.match(piece))


def num_unfinished(pieces: Sequence[bytes]) -> int:
    """How many of a text's last tokens, given as bytes, hold a character of UTF-8 whose last bytes are not there."""
    data = b""
    for count, piece in enumerate(reversed(pieces[-3:]), 1):
        data = piece + data
        if not begins_inside_a_character(data):
            return count if _UNFINISHED.search(data) else 0
    return 0


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
