"""A tokenizer as SentencePiece's are in `tokenizers`: a word's first letter is its space, and the decoder takes the
space off a text's first word.
"""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tests.checkpoints import SPECIAL_TOKENS

WORDS = ("▁the", "▁The", "▁lungs", "▁are", "▁clear", "▁no", "▁mass", ".")
DECODERS = {
    "Llama's": lambda: decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "Metaspace": lambda: decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", "always", True)]),
}


def sentencepiece_like(kind: str = "Llama's") -> Tokenizer:
    """Words, `▁`, and every byte; special tokens at the ids that the tiny checkpoints have them."""
    names = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    vocab = {name: token_id for token_id, name in enumerate(names)}
    merges = []
    for word in WORDS:
        for letter in word:
            vocab.setdefault(letter, len(vocab))
        for end in range(2, len(word) + 1):
            vocab.setdefault(word[:end], len(vocab))
            if (word[: end - 1], word[end - 1]) not in merges:
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    if kind == "Metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", True)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = DECODERS[kind]()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer
