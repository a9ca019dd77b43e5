"""PaliGemma answers as transformers does: every token of its prompt sees every other."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families.gemma_checkpoints import make_paligemma
from tests.families.parity import Content, Parity, Record
from vlm_serve.errors import InvalidRequestError
from vlm_serve.families import load_family, paligemma
from vlm_serve.types import ChatInput, ChatMessage, TextPart


class PaliGemmaParity(Parity):
    """Its processor has no chat template, and takes no text without an image."""

    def __init__(self, folder: Path, model: Any, **settings: Any) -> None:
        super().__init__(folder, model, answer_marks={"token_type_ids": 1}, **settings)

    def inputs(self, content: Content) -> dict[str, torch.Tensor]:
        images = [part.pixels.copy() for part in content if not isinstance(part, str)]
        text = "".join(part for part in content if isinstance(part, str))
        if images:
            prompt = "<image>" * len(images) + text
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of how it makes its labels
                made = dict(self.processor(images=[images], text=[prompt], return_tensors="pt"))
            del made["labels"]
            return made
        ids = self.processor.tokenizer(f"<s>{text}\n", add_special_tokens=False, return_tensors="pt").input_ids
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


@pytest.mark.parametrize(("row", "text"), [("PaliGemma", "gemma"), ("PaliGemma 2", "gemma2")])
def test_parity(tmp_path: Path, record_property: Record, row: str, text: str) -> None:
    PaliGemmaParity(tmp_path, make_paligemma(tmp_path, text)).check_everything(row, record_property)


@pytest.mark.parametrize(
    ("text", "heads", "kv_heads", "changes"),
    [
        ("gemma", 3, 1, {}),
        ("gemma2", 3, 3, {"attn_logit_softcapping": 5.0, "in_memory": True}),
        ("gemma2", 7, 1, {"head_dim": 8, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ],
    ids=["PaliGemma 1, GQA 3", "three heads", "GQA 7"],
)
def test_parity_of_other_shapes(tmp_path: Path, text: str, heads: int, kv_heads: int, changes: dict[str, Any]) -> None:
    model = make_paligemma(tmp_path, text, heads=heads, kv_heads=kv_heads, **changes)
    parity = PaliGemmaParity(tmp_path, model)
    parity.check(parity.conversations["three images"])
    parity.check_batch("text", "one image")


def test_the_logits_are_capped(tmp_path: Path) -> None:
    parity = PaliGemmaParity(tmp_path, make_paligemma(tmp_path, final_logit_softcapping=5.0))
    content = parity.conversations["one image"]
    (run,) = parity.run(parity.prompt(content), max_tokens=1)
    with torch.inference_mode():
        uncapped = parity.model.lm_head(parity.model.model(**parity.inputs(content)).last_hidden_state[0])
    assert uncapped.abs().max() > 5.0
    parity.compare(run, 5.0 * torch.tanh(uncapped / 5.0))


def test_the_same_image_under_another_question_is_another_prefix(tmp_path: Path) -> None:
    """Keys and values of an image depend on the question after it: nothing of them may be found for another."""
    parity = PaliGemmaParity(tmp_path, make_paligemma(tmp_path))
    (image, *_) = parity.pictures
    for question in ("Is there a mass?", "Is there a fracture?"):
        content = (image, question)
        (run,) = parity.run(parity.prompt(content), every=False)
        assert run.cached_tokens == 0
        parity.compare(run, parity.expected(content, run))


def test_a_preempted_answer_goes_on_as_it_would_have(tmp_path: Path) -> None:
    """One of two gives way and starts again, on a prompt that attends both ways and an answer that does not."""
    parity = PaliGemmaParity(tmp_path, make_paligemma(tmp_path, "gemma"), kv_blocks=20)
    kinds = ("one image", "images and text")
    contents = [parity.conversations[kind] for kind in kinds]
    runs = parity.run(*(parity.prompt(content) for content in contents), max_tokens=24)
    assert parity.harness.engine.stats.num_preemptions > 0
    for content, run in zip(contents, runs, strict=True):
        parity.compare(run, parity.expected(content, run))
    assert max(end - begin for run in runs for begin, end in run.chunks[1:]) > 1


def test_a_bare_prompt_attends_both_ways_as_text_and_as_token_ids(tmp_path: Path) -> None:
    make_paligemma(tmp_path)
    family = load_family(tmp_path)
    bare = family.encode_text("Is there a mass?")
    assert bare == family.encode_text("<s>Is there a mass?") == family.encode_ids(bare.token_ids)
    assert bare.token_ids[0] == family.tokenizer.bos_token_id
    assert bare.both_ways_prefix == len(bare.token_ids)


def test_swapped_layers_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_paligemma(tmp_path)
    read = paligemma.text_settings

    def swapped(config: Any) -> dict[str, Any]:
        settings = read(config)
        return settings | {"layer_types": [*settings["layer_types"][1:], settings["layer_types"][0]]}

    monkeypatch.setattr(paligemma, "text_settings", swapped)
    parity = PaliGemmaParity(tmp_path, model)
    with pytest.raises(AssertionError, match="logits differ"):
        parity.check(parity.conversations["one image"])


@pytest.mark.parametrize("kind", ["text", "one image"])
def test_a_prefix_that_attends_one_way_is_seen(tmp_path: Path, kind: str) -> None:
    parity = PaliGemmaParity(tmp_path, make_paligemma(tmp_path))
    content = parity.conversations[kind]
    (run,) = parity.run(replace(parity.prompt(content), both_ways_prefix=0))
    with pytest.raises(AssertionError, match="logits differ"):
        parity.compare(run, parity.expected(content, run))


def test_a_conversation_is_refused(tmp_path: Path) -> None:
    make_paligemma(tmp_path)
    turns = (("user", "What?"), ("assistant", "Nothing."), ("user", "And now?"))
    chat = ChatInput(tuple(ChatMessage(role, (TextPart(text),)) for role, text in turns))
    with pytest.raises(InvalidRequestError, match="chat template"):
        load_family(tmp_path).render_chat(chat, [])
