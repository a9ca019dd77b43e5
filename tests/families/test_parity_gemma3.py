"""Gemma3 and MedGemma answer as transformers does, whatever the engine does with their conversations."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.harness import picture
from tests.families.gemma_checkpoints import make_gemma3
from tests.families.parity import Parity, Record
from vlm_serve.errors import CheckpointError
from vlm_serve.families import gemma3, load_family
from vlm_serve.types import ImageInputs

Change = Callable[[dict[str, Any]], dict[str, Any]]


def test_parity(tmp_path: Path, record_property: Record) -> None:
    model = make_gemma3(tmp_path)
    Parity(tmp_path, model).check_everything("Gemma 3", record_property)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "changes"),
    [
        (3, 1, {"final_logit_softcapping": 20.0}),
        (3, 3, {"tied": False, "sliding_window": 4}),
        (7, 1, {"head_dim": 8, "attention_bias": True}),
        (4, 2, {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ],
    ids=["GQA 3", "three heads, window of an image", "GQA 7", "full first"],
)
def test_parity_of_other_shapes(tmp_path: Path, heads: int, kv_heads: int, changes: dict[str, Any]) -> None:
    parity = Parity(tmp_path, make_gemma3(tmp_path, heads=heads, kv_heads=kv_heads, **changes))
    parity.check_batch("text", "three images")


def test_parity_with_pan_and_scan(tmp_path: Path) -> None:
    """Crops of what is long, each a span of its own; a picture that is near a square has none."""
    model = make_gemma3(tmp_path, pan_and_scan=True, in_memory=True)
    pictures = (picture(1, 40, 44), picture(2, 30, 90), picture(3, 56, 24))
    options = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20}
    parity = Parity(tmp_path, model, pictures=pictures, processor_options=options)
    runs = [parity.check(content) for content in parity.conversations.values()]
    assert [len(run.prompt.images) for run in runs] == [0, 1, 1 + 4 + 3, 4 + 1]
    parity.check_chunked("one image")
    assert parity.harness.family.max_tokens_per_image == 4 * (1 + 4)
    pieces = parity.harness.family.process_image(pictures[1])
    made = parity.inputs((pictures[1],))["pixel_values"]
    own = [torch.from_numpy(piece.tensors["pixel_values"]) for piece in pieces if isinstance(piece, ImageInputs)]
    assert torch.equal(torch.stack(own), made), "bit for bit"


def swapped_thetas(text: dict[str, Any]) -> dict[str, Any]:
    rope = text["rope_parameters"]
    full = rope["full_attention"] | {"rope_theta": rope["sliding_attention"]["rope_theta"]}
    sliding = rope["sliding_attention"] | {"rope_theta": rope["full_attention"]["rope_theta"]}
    return text | {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


FAULTS: dict[str, Change] = {
    "swapped thetas": swapped_thetas,
    "no stretched positions": lambda text: (
        text | {"rope_parameters": text["rope_parameters"] | {"full_attention": {"rope_theta": 1_000_000.0}}}
    ),
    "another scale of scores": lambda text: text | {"query_pre_attn_scalar": 16},
    "a wider window": lambda text: text | {"sliding_window": 17},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_decoder_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    model = make_gemma3(tmp_path)
    read = gemma3.text_settings
    monkeypatch.setattr(gemma3, "text_settings", lambda config: FAULTS[fault](read(config)))
    parity = Parity(tmp_path, model)
    with pytest.raises(AssertionError, match="logits differ"):
        parity.check(parity.conversations["three images"])


def test_image_tokens_that_attend_one_way_are_seen(tmp_path: Path) -> None:
    parity = Parity(tmp_path, make_gemma3(tmp_path))
    content = parity.conversations["one image"]
    prompt = parity.prompt(content)
    causal = [replace(span, inputs=replace(span.inputs, attends_both_ways=False)) for span in prompt.images]
    (run,) = parity.run(replace(prompt, images=tuple(causal)))
    with pytest.raises(AssertionError, match="logits differ"):
        parity.compare(run, parity.expected(content, run))


def test_an_image_longer_than_the_window_is_refused(tmp_path: Path) -> None:
    make_gemma3(tmp_path, sliding_window=3)
    with pytest.raises(CheckpointError, match="sliding_window is 3"):
        load_family(tmp_path)
