"""Text comes out token by token exactly as if it were decoded at once, and stops where it should."""

import time

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.serving.sentencepiece import DECODERS, sentencepiece_like
from vlm_serve.serving.detokenizer import Detokenizer, TextDelta
from vlm_serve.serving.token_bytes import TokenBytes
from vlm_serve.types import FinishReason, SamplingParams

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


def detokenizer(tokenizer: Tokenizer, stop: str | list[str] = (), **sampling) -> Detokenizer:
    return Detokenizer(TokenBytes(tokenizer), SamplingParams(max_tokens=100, stop=stop, **sampling))


def deltas(tokenizer: Tokenizer, text: str, stop=(), chunk: int = 1, **sampling) -> list[TextDelta]:
    """The answer `text`, `chunk` tokens a step, up to its end."""
    ids = tokenizer.encode(text).ids
    one, given = detokenizer(tokenizer, stop, **sampling), []
    for start in range(0, len(ids), chunk):
        ends = start + chunk >= len(ids)
        given.append(one.add(ids[start : start + chunk], FinishReason.LENGTH if ends else None))
        if given[-1].finish_reason:
            return given
    raise AssertionError("it never ended")


def whole(given: list[TextDelta]) -> str:
    return "".join(delta.text for delta in given)


def counted(given: list[TextDelta]) -> int:
    return sum(len(delta.token_ids) for delta in given)


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("text", ["The heart is of normal size.", "Größe 3 µm → 漢字 🫀 fin", "a\n\n b  "])
def test_the_pieces_make_up_the_whole(tokenizer, text, chunk):
    given = deltas(tokenizer, text, [], chunk)
    assert whole(given) == text
    assert counted(given) == len(tokenizer.encode(text).ids)
    assert given[-1].finish_reason is FinishReason.LENGTH
    assert all("�" not in delta.text for delta in given)


def test_an_answer_cut_inside_a_character_ends_as_decode_has_it(tokenizer):
    ids = tokenizer.encode("a🫀").ids[:-1]
    one = detokenizer(tokenizer)
    text = "".join(one.add([i], FinishReason.LENGTH if n == len(ids) - 1 else None).text for n, i in enumerate(ids))
    assert text == tokenizer.decode(ids)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_a_stop_string_across_token_borders_ends_the_answer_and_drops_the_surplus(tokenizer, chunk):
    given = deltas(tokenizer, "Findings: none. Impression: normal", ["Summary", "Impression"], chunk)
    assert whole(given) == "Findings: none. "
    assert (given[-1].finish_reason, given[-1].stop_reason) == (FinishReason.STOP, "Impression")
    assert counted(given) == len("Findings: none. Impression")
    assert all(delta.stop_reason is None for delta in given[:-1])


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_a_stop_string_may_be_kept_and_is_then_the_last_of_the_text(tokenizer, chunk):
    given = deltas(tokenizer, "Findings: none. Impression", "none", chunk, include_stop_str_in_output=True)
    assert whole(given) == "Findings: none"
    assert given[-1].stop_reason == "none"


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_decided(tokenizer):
    given = deltas(tokenizer, "abcabd!", ["abd"])
    assert [delta.text for delta in given] == ["", "", "abc", "", "", ""]


def test_held_text_that_became_no_stop_string_is_given_out_at_the_end(tokenizer):
    given = deltas(tokenizer, "no stop he", ["here"])
    assert (whole(given), given[-1].finish_reason) == ("no stop he", FinishReason.LENGTH)
    assert given[-1].stop_reason is None


def test_the_earliest_of_several_stop_strings_cuts(tokenizer):
    given = deltas(tokenizer, "one two three", ["three", "two"], chunk=100)
    assert (whole(given), given[-1].stop_reason) == ("one ", "two")


@pytest.mark.parametrize("chunk", [1, 100])
@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        (["cdef", "de"], "abc", "de"),  # complete first, though it begins later
        (["e", "cde"], "ab", "cde"),  # complete together: the longer one
        (["cd", "cde"], "ab", "cd"),
    ],
)
def test_which_stop_string_it_was_does_not_hang_on_how_the_text_is_cut_into_tokens(
    tokenizer, stop, text, reason, chunk
):
    whole_word = Tokenizer(models.WordLevel({"abcdefg": 0, "?": 1}, "?"))
    for given in (
        deltas(tokenizer, "abcdefg", stop, chunk),
        deltas(tokenizer, "abcdefg", list(reversed(stop)), chunk),
        deltas(whole_word, "abcdefg", stop, chunk),
    ):
        assert (whole(given), given[-1].stop_reason) == (text, reason)


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize(
    ("stop", "least", "text", "tokens"),
    [
        ([".cd", ".ef"], 0, "ab", 5),  # `.cd` is complete with the fifth token, `.ef` with the eighth
        ([".cd", ".ef"], 4, "ab", 5),
        ([".cd", ".ef"], 5, "ab.cd", 8),
        ([".cd", ".ef"], 8, "ab.cd.ef.gh", 11),
        (["ef.gh", ".ef"], 9, "ab.cd.", 11),  # begins among the first nine and ends beyond them
    ],
)
def test_no_stop_string_that_the_first_tokens_complete_ends_an_answer(tokenizer, stop, least, text, tokens, chunk):
    given = deltas(tokenizer, "ab.cd.ef.gh", stop, chunk, min_tokens=least)
    assert (whole(given), counted(given)) == (text, tokens)
    assert counted(given) > least


def test_text_of_the_first_tokens_that_may_begin_a_stop_string_is_still_held_back(tokenizer):
    given = deltas(tokenizer, "xabz!", ["xabz", "ab"], min_tokens=3)
    assert [delta.text for delta in given] == ["", "", "", ""]
    assert given[-1].stop_reason == "xabz"
    given = deltas(tokenizer, "xaby!", ["xabz", "ab"], min_tokens=3)
    assert (whole(given), given[-1].finish_reason) == ("xaby!", FinishReason.LENGTH)


def test_the_end_token_counts_and_has_no_text(tokenizer):
    assert detokenizer(tokenizer).add([EOS], FinishReason.STOP, EOS) == TextDelta("", (EOS,), FinishReason.STOP)
    seen = detokenizer(tokenizer, skip_special_tokens=False)
    assert seen.add([EOS], FinishReason.STOP, EOS).text == ""


def test_a_stop_token_counts_is_named_and_has_no_text_unless_it_is_asked_for(tokenizer):
    a, b, c = tokenizer.encode("abc").ids
    given = detokenizer(tokenizer, stop_token_ids=[c]).add([a, b, c], FinishReason.STOP, c)
    assert given == TextDelta("ab", (a, b, c), FinishReason.STOP, c)
    asked = detokenizer(tokenizer, stop_token_ids=[c], include_stop_str_in_output=True)
    assert asked.add([a, b, c], FinishReason.STOP, c).text == "abc"


def test_special_tokens_are_text_only_if_they_are_asked_for(tokenizer):
    a, b = tokenizer.encode("ab").ids
    for skips, text in ((True, "ab"), (False, "a<eos>b")):
        one = detokenizer(tokenizer, skip_special_tokens=skips)
        assert one.add([a, EOS, b], FinishReason.LENGTH).text == text


def test_bytes_that_undo_a_character_already_given_out_end_no_answer():
    """Byte fallback decodes a run of bytes as a whole: one that is no UTF-8 turns all of it into replacements."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate([*names, "z"])}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    ids = [ord("A"), 0xE5, ord("B"), 256, ord("C"), 256]
    one = detokenizer(tokenizer)
    given = [one.add([token], FinishReason.LENGTH if n == len(ids) - 1 else None) for n, token in enumerate(ids)]
    text = whole(given)
    assert (text[0], text[-3:], counted(given)) == ("A", "zCz", 6)


def continued(tokenizer, before, answer, **sampling) -> str:
    """The text of an answer that goes on with the tokens before it, one token a step."""
    one = Detokenizer(TokenBytes(tokenizer), SamplingParams(max_tokens=100, **sampling), before)
    ends = [*[None] * (len(answer) - 1), FinishReason.LENGTH]
    return whole([one.add([token], end) for token, end in zip(answer, ends, strict=True)])


TEXT = "The lungs are clear. Größe 3 µm → 漢字 🫀 no mass " + "漢字" * 5


@pytest.mark.parametrize("kind", [*DECODERS, "bytes"])
def test_an_answer_goes_on_with_its_prompt_wherever_it_begins(tokenizer, kind):
    """Inside a word, before a space, inside a character: together they are the whole text."""
    tokenizer = tokenizer if kind == "bytes" else sentencepiece_like(kind)
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    pieces = [TokenBytes(tokenizer)[token] for token in ids]
    for cut in range(1, len(ids)):
        prompt = b"".join(pieces[:cut]).decode(errors="ignore").lstrip(" ")  # the answer finishes a character
        assert prompt + continued(tokenizer, ids[:cut], ids[cut:]) == TEXT


@pytest.mark.parametrize("kind", DECODERS)
def test_an_answer_that_is_a_text_of_its_own_is_as_decode_has_it(kind):
    tokenizer = sentencepiece_like(kind)
    ids = tokenizer.encode(" clear and no mass", add_special_tokens=False).ids
    assert continued(tokenizer, (), ids) == tokenizer.decode(ids)
    clear = tokenizer.token_to_id("▁clear")
    assert continued(tokenizer, (), [clear, clear]) == "clear clear"


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("specials", [0, 1, 7, 8, 100])
def test_special_tokens_at_the_end_of_a_prompt_hide_nothing_of_it(kind, specials):
    tokenizer = sentencepiece_like(kind)
    end, lungs, clear = map(tokenizer.token_to_id, ("</s>", "▁lungs", "▁clear"))
    assert continued(tokenizer, [lungs, *[end] * specials], [clear, clear]) == " clear clear"
    assert continued(tokenizer, [end] * specials, [clear, clear]) == "clear clear"


@pytest.mark.parametrize("kind", DECODERS)
def test_a_stop_string_that_begins_with_a_space_is_found_on_the_first_word(kind):
    tokenizer = sentencepiece_like(kind)
    lungs, clear = map(tokenizer.token_to_id, ("▁lungs", "▁clear"))
    one = Detokenizer(TokenBytes(tokenizer), SamplingParams(max_tokens=9, stop=" clear"), [lungs])
    assert one.add([clear], None) == TextDelta("", (clear,), FinishReason.STOP, " clear")


@pytest.mark.parametrize("kind", DECODERS)
def test_the_replacement_character_at_the_end_of_a_prompt_is_the_prompts(kind):
    tokenizer = sentencepiece_like(kind)
    ids = tokenizer.encode("lungs \ufffd", add_special_tokens=False).ids
    assert continued(tokenizer, ids, tokenizer.encode("x no", add_special_tokens=False).ids[-2:]).endswith(" no")
    assert "\ufffd" not in continued(tokenizer, ids, [tokenizer.token_to_id("▁clear")])


@pytest.mark.parametrize("kind", DECODERS)
def test_a_word_behind_a_long_text_in_single_bytes_keeps_its_space(kind):
    tokenizer = sentencepiece_like(kind)
    ids = tokenizer.encode("漢字" * 120, add_special_tokens=False).ids
    assert continued(tokenizer, ids, [tokenizer.token_to_id("▁clear")]) == " clear"


@pytest.mark.parametrize("kind", DECODERS)
def test_a_long_prompt_of_bytes_that_are_no_text_costs_next_to_nothing(kind):
    tokenizer = sentencepiece_like(kind)
    before = [tokenizer.token_to_id("<0xFF>")] * 10_000
    token_bytes, began = TokenBytes(tokenizer), time.thread_time()
    Detokenizer(token_bytes, SamplingParams(), before)
    assert time.thread_time() - began < 0.5  # 0.002 s; a minute if each end of it were decoded


@pytest.mark.parametrize("kind", DECODERS)
def test_bytes_that_are_no_character_take_no_space_from_the_word_behind_them(kind):
    tokenizer = sentencepiece_like(kind)
    names = ("▁lungs", "<0xE5>", "<0x42>", "▁clear", "▁clear")
    ids = [tokenizer.token_to_id(name) for name in names]
    assert continued(tokenizer, (), ids) == tokenizer.decode(ids)
