"""What a request says in texts becomes token ids, and a prompt is cut without losing an image."""

import json

import pytest

from tests.engine.harness import picture
from vlm_serve.config import IngestConfig
from vlm_serve.errors import InvalidRequestError
from vlm_serve.families import load_family
from vlm_serve.families.prompt import Prompt
from vlm_serve.serving.ingest import Ingest, PreparedPrompt, bad_word_ids, truncated
from vlm_serve.types import ChatInput, ChatMessage, ImagePart, SamplingParams, StructuredOutputs, TextPart


@pytest.fixture(scope="module")
def family(served):
    return load_family(served.folder)


@pytest.fixture(scope="module")
def ingest(family):
    ingest = Ingest(family, IngestConfig(workers=1))
    yield ingest
    ingest.close()


@pytest.fixture(scope="module")
def prompt(family) -> Prompt:
    """Text, an image of 16 tokens, text."""
    parts = (TextPart("Compare "), ImagePart(b"-", "image/png"), TextPart(" with the study of 2019."))
    return family.render_chat(ChatInput((ChatMessage("user", parts),)), [family.process_image(picture(1))])


def test_a_cut_prompt_keeps_its_last_tokens_and_its_image_its_place(prompt):
    (span,) = prompt.images
    for cut in range(1, span.offset + 1):
        kept = truncated(prompt, len(prompt.token_ids) - cut)
        assert kept.token_ids == prompt.token_ids[cut:]
        assert kept.images[0].offset == span.offset - cut
        assert kept.images[0].inputs is span.inputs


def test_a_cut_that_would_lose_an_image_or_a_part_of_one_is_refused(prompt):
    (span,) = prompt.images
    for cut in range(span.offset + 1, len(prompt.token_ids)):
        with pytest.raises(InvalidRequestError, match=f"at least {len(prompt.token_ids) - span.offset}") as raised:
            truncated(prompt, len(prompt.token_ids) - cut)
        assert raised.value.param == "truncate_prompt_tokens"


def test_a_prompt_that_is_short_enough_is_not_cut(prompt):
    assert truncated(prompt, len(prompt.token_ids)) is prompt
    assert truncated(prompt, None) is prompt


def test_a_bad_word_is_kept_from_the_start_of_a_text_and_from_after_a_space(family):
    tokenizer = family.backend_tokenizer
    found = bad_word_ids(tokenizer, ["mass", " mass", "fracture"])
    assert len(found) == 4
    assert [tokenizer.decode(list(ids)) for ids in found] == ["mass", " mass", "fracture", " fracture"]
    for text in ("a mass", "mass", "no fracture here"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert any(tuple(ids[start : start + len(bad)]) == bad for bad in found for start in range(len(ids))), text


def test_a_request_carries_what_the_parameters_say(ingest, family, prompt):
    sampling = SamplingParams(
        bad_words=["mass"], structured_outputs=StructuredOutputs(choice=["yes", "no"]), truncate_prompt_tokens=42
    )
    request = ingest.request(
        PreparedPrompt(prompt), sampling, request_id="r", adapter="d", cache_salt="s", tenant="t", priority=-1
    )
    assert request.token_ids == prompt.token_ids[-42:]
    assert len(request.images) == 1
    assert request.bad_word_ids == bad_word_ids(family.backend_tokenizer, ["mass"])
    assert request.grammar
    assert request.eos_token_ids == family.eos_token_ids
    assert (request.adapter, request.cache_salt, request.tenant, request.priority) == ("d", "s", "t", -1)
    assert not request.pooling


def test_a_bad_schema_is_refused(ingest, prompt):
    sampling = SamplingParams(structured_outputs=StructuredOutputs(json=json.dumps({"type": "no such type"})))
    with pytest.raises(InvalidRequestError):
        ingest.request(PreparedPrompt(prompt), sampling, request_id="r")


@pytest.mark.parametrize("field", ["logit_bias", "allowed_token_ids", "stop_token_ids"])
def test_a_token_id_beyond_the_vocabulary_is_refused_by_name(ingest, family, prompt, field):
    beyond = family.decoder_config.vocab_size
    sampling = SamplingParams(**{field: {beyond: 1.0} if field == "logit_bias" else [beyond]})
    with pytest.raises(InvalidRequestError) as raised:
        ingest.request(PreparedPrompt(prompt), sampling, request_id="r")
    assert raised.value.param == field


def test_a_prompt_of_token_ids_is_taken_as_it_is_but_for_placeholders(ingest, family):
    assert ingest.prepare_text([5, 6, 7]).prompt.token_ids == (5, 6, 7)
    for bad in ([], [-1], [family.decoder_config.vocab_size], [5, family.image_token_id]):
        with pytest.raises(InvalidRequestError) as raised:
            ingest.prepare_text(bad)
        assert raised.value.param == "prompt"


def test_token_ids_become_their_text_with_special_tokens(ingest, family):
    ids = family.encode_text("No effusion.").token_ids
    assert ingest.decode_text(ids) == "<s>No effusion."
    with pytest.raises(InvalidRequestError):
        ingest.decode_text([-1])
