"""Text comes out token by token exactly as if it were decoded at once, and stops where it should."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from vlm_serve.serving.detokenizer import Detokenizer
from vlm_serve.types import FinishReason

EOS = 256


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token a byte, as the fallback of every byte-level BPE."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    assert tokenizer.token_to_id("<eos>") == EOS
    return tokenizer


def run(tokenizer: Tokenizer, text: str, stop: list[str], chunk: int = 1) -> tuple[str, list[str], int, FinishReason]:
    ids = tokenizer.encode(text).ids
    detokenizer, pieces, counted = Detokenizer(tokenizer, stop), [], 0
    for start in range(0, len(ids), chunk):
        step = ids[start : start + chunk]
        delta = detokenizer.add(step, FinishReason.LENGTH if start + chunk >= len(ids) else None)
        pieces.append(delta.text)
        counted += len(delta.token_ids)
        if delta.finish_reason:
            return "".join(pieces), pieces, counted, delta.finish_reason
    raise AssertionError("it never ended")


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("text", ["The heart is of normal size.", "Größe 3 µm → 漢字 🫀 fin", "a\n\n b  "])
def test_the_pieces_make_up_the_whole(tokenizer, text, chunk):
    whole, pieces, counted, reason = run(tokenizer, text, [], chunk)
    assert whole == text
    assert counted == len(tokenizer.encode(text).ids)
    assert reason is FinishReason.LENGTH
    assert all("�" not in piece for piece in pieces)


def test_an_answer_cut_inside_a_character_ends_as_decode_has_it(tokenizer):
    ids = tokenizer.encode("a🫀").ids[:-1]
    detokenizer = Detokenizer(tokenizer, [])
    text = "".join(
        detokenizer.add([i], FinishReason.LENGTH if n == len(ids) - 1 else None).text for n, i in enumerate(ids)
    )
    assert text == tokenizer.decode(ids)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_a_stop_string_across_token_borders_ends_the_answer_and_drops_the_surplus(tokenizer, chunk):
    whole, _pieces, counted, reason = run(tokenizer, "Findings: none. Impression: normal", ["Impression"], chunk)
    assert whole == "Findings: none. "
    assert reason is FinishReason.STOP
    assert counted == len("Findings: none. Impression")


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_decided(tokenizer):
    _, pieces, _, _ = run(tokenizer, "abcabd!", ["abd"])
    assert pieces == ["", "", "abc", "", "", ""]


def test_held_text_that_became_no_stop_string_is_given_out_at_the_end(tokenizer):
    whole, _, _, reason = run(tokenizer, "no stop he", ["here"])
    assert (whole, reason) == ("no stop he", FinishReason.LENGTH)


def test_the_earliest_of_several_stop_strings_cuts(tokenizer):
    assert run(tokenizer, "one two three", ["three", "two"], chunk=100)[0] == "one "


def test_the_end_token_counts_and_has_no_text(tokenizer):
    delta = Detokenizer(tokenizer, []).add([EOS], FinishReason.STOP)
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("", (EOS,), FinishReason.STOP)
