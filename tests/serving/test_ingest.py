"""What a request says in texts becomes token ids, a prompt is cut without losing an image, and a picture that the
model's processor does not take is an error of its part.
"""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.checkpoints import make_llava
from tests.engine.harness import picture
from vlm_serve.config import IngestConfig
from vlm_serve.errors import (
    CheckpointError,
    ConfigurationError,
    ImageLimitError,
    InvalidRequestError,
    UnsupportedImageError,
)
from vlm_serve.families import load_family
from vlm_serve.families.prompt import Prompt
from vlm_serve.serving.ingest import Ingest, PreparedPrompt, bad_word_ids, truncated
from vlm_serve.types import (
    ChatInput,
    ChatMessage,
    ImageInputs,
    ImagePart,
    SamplingParams,
    StructuredOutputs,
    TextPart,
    image_digest,
)


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
        assert kept.both_ways_prefix == 0
        assert truncated(replace(prompt, both_ways_prefix=40), len(prompt.token_ids) - cut).both_ways_prefix == 40 - cut


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
        PreparedPrompt(replace(prompt, both_ways_prefix=50)),
        sampling,
        request_id="r",
        adapter="d",
        cache_salt="s",
        tenant="t",
        priority=-1,
    )
    assert request.token_ids == prompt.token_ids[-42:]
    assert len(request.images) == 1
    assert request.bad_word_ids == bad_word_ids(family.backend_tokenizer, ["mass"])
    assert request.grammar
    assert request.eos_token_ids == family.eos_token_ids
    assert (request.adapter, request.cache_salt, request.tenant, request.priority) == ("d", "s", "t", -1)
    assert not request.pooling
    assert request.both_ways_prefix == 50 - (len(prompt.token_ids) - 42)


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


def chat_about(rows: int, columns: int) -> ChatInput:
    """A text, then a PNG of that size."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((rows, columns, 3), 7, np.uint8)).save(buffer, format="PNG")
    return ChatInput((ChatMessage("user", (TextPart("Look."), ImagePart(buffer.getvalue(), "image/png"))),))


FAULTS = (ValueError, RuntimeError, ZeroDivisionError, KeyError, AttributeError, CheckpointError)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_picture_that_the_processor_does_not_take_is_an_error_of_its_part(ingest, family, monkeypatch, caplog, fault):
    def refuse(image):
        raise fault("what the file holds of the patient")

    monkeypatch.setattr(family, "process_image", refuse)
    with pytest.raises(UnsupportedImageError, match=r"does not take a picture of 50 by 40 pixels\. Crop it") as raised:
        ingest.prepare(chat_about(40, 50))
    assert raised.value.param == "messages[0].content[1]"
    assert fault.__name__ in caplog.text
    assert "patient" not in caplog.text + str(raised.value)


@pytest.mark.parametrize("fault", [MemoryError, torch.OutOfMemoryError])
def test_a_machine_without_memory_is_no_fault_of_the_picture(ingest, family, monkeypatch, fault):
    def refuse(image):
        raise fault

    monkeypatch.setattr(family, "process_image", refuse)
    with pytest.raises(fault):
        ingest.prepare(chat_about(40, 50))


def test_a_strip_is_refused_before_it_is_blown_up(ingest):
    """By a processor that scales the shorter side up to the tower's, it would take gigabytes."""
    ingest.prepare(chat_about(1, 200))
    with pytest.raises(ImageLimitError, match=r"1 by 201 pixels.*200 times the shorter\. Crop it") as raised:
        ingest.prepare(chat_about(201, 1))
    assert raised.value.param == "messages[0].content[1]"


@pytest.mark.parametrize("count", [0, 17])
def test_a_count_of_tokens_that_no_image_has_is_refused(ingest, family, monkeypatch, count):
    inputs = ImageInputs.create({"pixel_values": np.zeros((3, 28, 28), np.float32)}, (4, 4), count)
    monkeypatch.setattr(family, "process_image", lambda image: (inputs,))
    with pytest.raises(InvalidRequestError, match=f"counts {count} tokens.*has up to 16 for an image") as raised:
        ingest.prepare(chat_about(40, 50))
    assert raised.value.param == "messages[0].content[1]"


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"height": 42, "width": 42}},
        {"size": []},
        {"image_mean": []},
        {"image_std": [0, "x"]},
        {"resample": -1},
        {"rescale_factor": "x"},
        {"image_processor_type": 5},
    ],
)
def test_a_processor_that_does_not_suit_the_tower_keeps_the_server_from_starting(tmp_path, change):
    make_llava(tmp_path, "siglip")
    path = tmp_path / "processor_config.json"
    processor = json.loads(path.read_text())
    processor["image_processor"] |= change
    path.write_text(json.dumps(processor))
    with pytest.raises(CheckpointError, match="image processor"):
        Ingest(load_family(tmp_path), IngestConfig(workers=1))


def test_an_image_in_tiles_has_one_digest_which_follows_each_of_them():
    one, two = (ImageInputs.create({"pixel_values": np.full(3, value)}, (1,), 1) for value in (1, 2))
    assert image_digest(("<img>", one)) == one.digest
    tiled = [image_digest(pieces) for pieces in ((one, two), (two, one), (one, one))]
    assert len({*tiled, one.digest, two.digest}) == 5
    assert {len(digest) for digest in tiled} == {64}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_pixels_cannot_be_processed_on_a_gpu_that_is_not_there(family):
    with pytest.raises(ConfigurationError, match=r"torch sees 0 GPUs.*Use cpu"):
        Ingest(family, IngestConfig(workers=1, image_processor_device="cuda"))
