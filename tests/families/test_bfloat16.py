"""bfloat16: our likeliest token differs from transformers' in bfloat16 no more often than that from its own float32.

A model that is as near to float32 but rounds at other places has about the same rate, so it takes many tokens of
several random models to tell the two.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.checkpoints import VOCAB_SIZE, WORDS
from tests.engine.harness import Harness, picture
from tests.families.gemma_checkpoints import make_gemma3
from tests.families.parity import Content, Parity, Record, record_row
from tests.families.qwen_checkpoints import make_qwen_vl
from tests.families.text_checkpoints import ROWS, make_text
from vlm_serve.families.base import ModelFamily, Prompt

# isort: split
from transformers import PreTrainedModel

LENGTH, PROMPTS, MODELS = 120, 64, 3
"""Tokens of a prompt, prompts of a model, models of a row."""

CONVERSATIONS, NUM_WORDS = 8, 80
"""With pictures, of a model, and words after each picture."""


class Rates:
    """How often transformers' likeliest token in bfloat16 is not ours, and not its own in float32."""

    def __init__(self) -> None:
        self.tokens = self.from_ours = self.from_exact = 0

    def add(self, ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
        """Logits `[..., vocab]` of the same positions: the engine's, transformers', and transformers' in float32."""
        likeliest = theirs.argmax(-1)
        self.tokens += likeliest.numel()
        self.from_ours += int((likeliest != ours.argmax(-1)).sum())
        self.from_exact += int((likeliest != exact.argmax(-1)).sum())

    def check(self, record_property: Record, row: str, family: ModelFamily) -> None:
        record_row(record_property, row, family)
        ours, exact = self.from_ours / self.tokens, self.from_exact / self.tokens
        record_property("bfloat16_disagreement", f"{ours:.2%} ({exact:.2%})")
        assert exact > 0, "nothing was rounded"
        assert ours <= exact


def in_bfloat16(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """The checkpoint as transformers loads it. `model.to` would round the frequencies of its positions, too."""
    implementation = model.config._attn_implementation
    loaded = type(model).from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=implementation)
    assert isinstance(loaded, PreTrainedModel)
    return loaded.eval()


@pytest.mark.parametrize("row", ROWS)
def test_the_likeliest_token_in_bfloat16(tmp_path: Path, row: str, record_property: Record) -> None:
    rates = Rates()
    for seed in range(MODELS):
        folder = tmp_path / str(seed)
        model = make_text(folder, row, seed=seed)
        ids = np.random.default_rng(seed).integers(6, VOCAB_SIZE, (PROMPTS, LENGTH))
        harness = Harness(folder, dtype="bfloat16", kv_blocks=2048, enable_prefix_caching=False)
        runs = harness.run(*(Prompt(tuple(prompt.tolist()), ()) for prompt in ids), max_tokens=1, prompt_logprobs=True)
        ours = torch.stack([torch.stack([run.logits[position] for position in range(LENGTH)]) for run in runs])
        with torch.inference_mode():
            exact, theirs = (m(torch.from_numpy(ids)).logits for m in (model, in_bfloat16(folder, model)))
        rates.add(ours, theirs, exact)
    rates.check(record_property, row, harness.family)


MakeModel = Callable[[Path, int], PreTrainedModel]

FAMILIES: dict[str, MakeModel] = {
    "Gemma 3": lambda folder, seed: make_gemma3(folder, seed=seed),
    "Qwen2.5-VL": lambda folder, seed: make_qwen_vl(folder, "qwen2_5_vl", seed=seed),
}


def conversation(rng: np.random.Generator) -> Content:
    """Two pictures, and words after each."""
    seeds, words = rng.integers(1 << 30, size=2).tolist(), rng.choice(WORDS.split(), (2, NUM_WORDS)).tolist()
    return picture(seeds[0], 40, 56), " ".join(words[0]), picture(seeds[1]), " ".join(words[1])


@pytest.mark.parametrize("row", FAMILIES)
def test_the_likeliest_token_after_pictures_in_bfloat16(tmp_path: Path, row: str, record_property: Record) -> None:
    rates = Rates()
    for seed in range(MODELS):
        folder = tmp_path / str(seed)
        model = FAMILIES[row](folder, seed)
        parity = Parity(folder, model, dtype="bfloat16", kv_blocks=2048, enable_prefix_caching=False)
        rng = np.random.default_rng(seed)
        contents = [conversation(rng) for _ in range(CONVERSATIONS)]
        runs = parity.run(*(parity.prompt(content) for content in contents), max_tokens=1)
        exact = [parity.expected(content, run) for content, run in zip(contents, runs, strict=True)]
        parity.model = in_bfloat16(folder, model)
        for content, run, logits in zip(contents, runs, exact, strict=True):
            ours = torch.stack([run.logits[position] for position in range(len(logits))])
            rates.add(ours, parity.expected(content, run), logits)
    rates.check(record_property, row, parity.harness.family)
