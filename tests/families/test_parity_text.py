"""Models of text alone answer as transformers does, whatever the engine does with their conversations."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import VOCAB_SIZE
from tests.engine.harness import LOGIT_TOLERANCE, Harness, Run, assert_parity, picture
from tests.families.parity import QUESTION, Parity, Record, record_row
from tests.families.text_checkpoints import ROWS, SHAPES, make_text
from vlm_serve.decoders.hf_config import READERS
from vlm_serve.errors import InvalidRequestError
from vlm_serve.families.base import Prompt

LONG = "Compare with the study of 2019-04-30. "


@pytest.mark.parametrize("row", ROWS)
def test_parity(tmp_path: Path, record_property: Record, row: str) -> None:
    Parity(tmp_path, make_text(tmp_path, row), pictures=()).check_everything(row, record_property)


@pytest.mark.parametrize("heads", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("row", ROWS)
def test_parity_of_other_shapes(tmp_path: Path, row: str, heads: tuple[int, int]) -> None:
    Parity(tmp_path, make_text(tmp_path, row, heads), pictures=()).check_batch("text", "more text")


@pytest.mark.parametrize("row", ROWS)
def test_a_fault_in_the_decoder_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str) -> None:
    model, kind = make_text(tmp_path, row), ROWS[row]
    read = READERS[kind.model_type]
    monkeypatch.setitem(READERS, kind.model_type, lambda config: read(config) | kind.fault)
    parity = Parity(tmp_path, model, pictures=())
    with pytest.raises(AssertionError, match="logits differ"):
        parity.check(parity.conversations["more text"])


@pytest.mark.parametrize("row", ["Llama 3", "Phi-3", "Gemma 2", "OPT", "Falcon 40B", "Mixtral", "Qwen3-MoE"])
def test_weights_are_found_by_the_names_that_they_have_in_memory(tmp_path: Path, row: str) -> None:
    Parity(tmp_path, make_text(tmp_path, row, in_memory=True), pictures=()).check_batch("text")


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
    "yarn of two mscales": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "mscale": 1.2,
        "mscale_all_dim": 0.8,
        "beta_fast": 4.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_parity_of_scaled_positions(tmp_path: Path, kind: str) -> None:
    model = make_text(tmp_path, "Llama 2", rope_parameters={"rope_theta": 1000.0} | SCALINGS[kind])
    parity = Parity(tmp_path, model, pictures=())
    parity.check_batch("text", "more text")
    parity.check_chunked("text")


@pytest.mark.parametrize("heads", [16, 32])
def test_parity_of_alibi_in_many_heads_and_past_256_tokens(tmp_path: Path, heads: int) -> None:
    """Its slopes are powers of two, for which bfloat16 rounds no product, only in up to eight heads; and it has every
    position only up to 256.
    """
    shape = {"hidden_size": 4 * heads, "max_position_embeddings": 1024}
    parity = Parity(tmp_path, make_text(tmp_path, "Falcon RW", (heads, heads), **shape), pictures=())
    assert len(parity.check((LONG,)).prompt.token_ids) < 64
    parity.harness.set(max_num_batched_tokens=150)
    run = parity.check((LONG * 24,))
    assert run.chunks[:3] == [(0, 150), (150, 300), (300, 450)]


class LongRope:
    """Phi-3 with a set of frequencies for sequences of up to 64 tokens, and one for longer ones; its answers are of the
    first `vocabulary` tokens.
    """

    ORIGINAL = 64

    def __init__(self, folder: Path, vocabulary: int = VOCAB_SIZE, **settings: Any) -> None:
        self.vocabulary = vocabulary
        rope = {
            "rope_type": "longrope",
            "rope_theta": 1000.0,
            "short_factor": [1.0, 1.5, 2.0, 3.0],
            "long_factor": [2.0, 4.0, 8.0, 16.0],
        }
        self.model = make_text(folder, "Phi-3", rope_parameters=rope, original_max_position_embeddings=self.ORIGINAL)
        self.harness = Harness(folder, **settings)

    def run(self, *prompts: Prompt, **options: Any) -> list[Run]:
        bias = dict.fromkeys(range(self.vocabulary, VOCAB_SIZE), -100.0)
        return self.harness.run(*prompts, logit_bias=bias, **options)

    @torch.inference_mode()
    def assert_parity(self, run: Run) -> None:
        """Each token is drawn as if the whole sequence before it were computed anew, which is what transformers does
        when a sequence outgrows the first set.
        """
        ids = torch.tensor([[*run.prompt.token_ids, *run.token_ids]])
        prompt_len, total = len(run.prompt.token_ids), ids.shape[1]
        for length in range(prompt_len, total):
            allowed = self.model(ids[:, :length]).logits[0, -1, : self.vocabulary]
            assert allowed.argmax() == ids[0, length]
        assert run.logits.keys() >= set(range(prompt_len - 1, total - 1))
        for position, logits in run.logits.items():
            expected = self.model(ids[:, : position + 1]).logits[0, position]
            assert float((logits - expected).abs().max()) <= LOGIT_TOLERANCE


def test_parity_of_long_and_short_sequences_in_one_batch(tmp_path: Path) -> None:
    long = LongRope(tmp_path)
    prompts = [long.harness.chat(LONG * count, QUESTION) for count in (0, 4, 1)]
    runs = long.run(*prompts)
    assert [len(run.prompt.token_ids) > long.ORIGINAL for run in runs] == [False, True, False]
    for run in runs:
        long.assert_parity(run)


@pytest.mark.parametrize("speculative_tokens", [0, 3])
def test_a_sequence_that_becomes_long_is_computed_again(tmp_path: Path, speculative_tokens: int) -> None:
    """So that a later one that begins alike finds the blocks of its own length alone."""
    long = LongRope(tmp_path, vocabulary=6, speculative_tokens=speculative_tokens)
    prompt = long.harness.chat(LONG, QUESTION)
    length = len(prompt.token_ids)
    assert length < long.ORIGINAL
    (run,) = long.run(prompt, max_tokens=long.ORIGINAL - length + 12)
    assert bool(long.harness.engine.stats.spec_accepted_tokens) == bool(speculative_tokens)
    again = [begin for begin, _ in run.chunks[1:]].index(0) + 1
    assert run.chunks[again - 1][1] == long.ORIGINAL
    assert run.chunks[again][1] >= long.ORIGINAL + 1
    long.assert_parity(run)
    (cold,) = long.run(prompt, max_tokens=4, salt="another tenant")
    long.assert_parity(cold)
    (warm,) = long.run(prompt, max_tokens=4)
    assert warm.cached_tokens == (length - 1) // 4 * 4
    long.assert_parity(warm)


def test_a_long_prompt_finds_nothing_that_a_short_one_left(tmp_path: Path) -> None:
    long = LongRope(tmp_path)
    short, longer = (long.harness.chat(LONG * count) for count in (1, 4))
    long.run(short)
    (first,) = long.run(longer)
    (second,) = long.run(longer)
    assert first.cached_tokens == 0
    assert second.cached_tokens > long.ORIGINAL
    long.assert_parity(first)
    long.assert_parity(second)


def test_an_adapter_of_an_expert_changes_the_tokens_that_go_through_it(tmp_path: Path, record_property: Record) -> None:
    """In the form that PEFT saved before transformers merged the experts; the reference has it in its weights."""
    model = make_text(tmp_path / "model", "Mixtral")
    changed = copy.deepcopy(model)
    experts, tensors = changed.model.layers[0].mlp.experts, {}
    halves = {"w1": experts.gate_up_proj[1, :48], "w3": experts.gate_up_proj[1, 48:], "w2": experts.down_proj[1]}
    for part, weight in halves.items():
        b, a = torch.randn(weight.shape[0], 2), torch.randn(2, weight.shape[1])
        weight.data += b @ a / 10
        name = f"base_model.model.model.layers.0.block_sparse_moe.experts.1.{part}"
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    adapter = tmp_path / "adapters" / "one"
    adapter.mkdir(parents=True)
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 0.2, "target_modules": list(halves)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    harness = Harness(tmp_path / "model", adapters=adapter.parent)
    runs = harness.run(*[harness.chat(LONG, QUESTION)] * 3, adapters=["one", None, "one"])
    for run, reference in zip(runs, [changed, model, changed], strict=True):
        assert_parity(reference, run)
    assert runs[0].token_ids != runs[1].token_ids
    record_row(record_property, "Mixtral", harness.family)
    record_property("lora", "experts")


def test_an_image_for_a_model_of_text_is_refused_by_its_kind(tmp_path: Path) -> None:
    make_text(tmp_path, "Qwen2")
    with pytest.raises(InvalidRequestError, match="qwen2"):
        Harness(tmp_path).chat(picture(1), QUESTION)
