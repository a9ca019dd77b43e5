"""A folder as downloaded, one that a newer transformers saves, and one with the modules' own names are one model."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_llava
from tests.engine.harness import Harness, picture
from tests.families.gemma_checkpoints import make_gemma3, make_paligemma
from tests.families.published import publish
from tests.families.qwen_checkpoints import make_qwen_vl
from tests.families.tile_checkpoints import make_idefics3, make_internvl, make_llava_next
from vlm_serve.errors import CheckpointError
from vlm_serve.layers.loading import read_tensors

# isort: split
from transformers import PreTrainedModel

Names = tuple[str, ...]

LAYER = "layers.1.self_attn.q_proj.weight"
VISION = "encoder.layers.0.self_attn.q_proj.weight"

CASES: dict[str, tuple[Callable[[Path], PreTrainedModel], Names]] = {
    "LLaVA, CLIP": (
        make_llava,
        (f"language_model.model.{LAYER}", f"vision_tower.vision_model.{VISION}", "language_model.lm_head.weight"),
    ),
    "LLaVA, SigLIP": (partial(make_llava, vision="siglip"), (f"vision_tower.vision_model.{VISION}",)),
    "LLaVA-NeXT": (
        make_llava_next,
        (
            f"language_model.model.{LAYER}",
            f"vision_tower.vision_model.{VISION}",
            "multi_modal_projector.linear_1.bias",
            "image_newline",
        ),
    ),
    "Gemma3": (
        make_gemma3,
        (
            f"language_model.model.{LAYER}",
            f"vision_tower.vision_model.{VISION}",
            "multi_modal_projector.mm_input_projection_weight",
        ),
    ),
    "PaliGemma": (
        partial(make_paligemma, text="gemma"),
        (f"language_model.model.{LAYER}", f"vision_tower.vision_model.{VISION}", "multi_modal_projector.linear.weight"),
    ),
    "PaliGemma 2": (make_paligemma, (f"language_model.model.{LAYER}",)),
    "Qwen2-VL": (
        partial(make_qwen_vl, kind="qwen2_vl"),
        (f"model.{LAYER}", "visual.blocks.0.attn.qkv.weight", "visual.merger.ln_q.weight", "lm_head.weight"),
    ),
    "Qwen2.5-VL": (
        partial(make_qwen_vl, kind="qwen2_5_vl", tie_word_embeddings=True),
        (f"model.{LAYER}", "visual.blocks.0.mlp.gate_proj.weight"),
    ),
    "Qwen3-VL": (
        partial(make_qwen_vl, kind="qwen3_vl", tie_word_embeddings=True),
        (f"model.language_model.{LAYER}", "model.visual.deepstack_merger_list.0.linear_fc1.weight"),
    ),
    "Idefics3": (
        partial(make_idefics3, kind="idefics3"),
        (
            f"model.text_model.{LAYER}",
            f"model.vision_model.{VISION}",
            "model.connector.modality_projection.proj.weight",
            "lm_head.weight",
        ),
    ),
    "SmolVLM": (
        partial(make_idefics3, kind="smolvlm", tie_word_embeddings=True),
        (f"model.text_model.{LAYER}", f"model.vision_model.{VISION}"),
    ),
    "InternVL": (
        make_internvl,
        (
            f"language_model.model.{LAYER}",
            "vision_tower.encoder.layer.0.attention.q_proj.weight",
            "multi_modal_projector.layer_norm.weight",
            "language_model.lm_head.weight",
        ),
    ),
}
"""What makes a checkpoint, and some names of tensors that the published ones have."""


def logits_of(folder: Path) -> torch.Tensor:
    """`[tokens, vocab]` of a prompt with an image, and of an answer."""
    harness = Harness(folder)
    (run,) = harness.run(harness.chat(picture(1, 20, 16), "Is it?"), max_tokens=3, prompt_logprobs=True)
    return torch.stack([run.logits[position] for position in sorted(run.logits)])


@pytest.mark.parametrize("case", CASES)
def test_the_names_and_the_config_of_the_hub_give_the_very_same_logits(tmp_path: Path, case: str) -> None:
    make, published_names = CASES[case]
    model = make(tmp_path)
    saved = logits_of(tmp_path)
    model.save_pretrained(tmp_path, save_original_format=False)
    assert torch.equal(logits_of(tmp_path), saved)
    publish(model, tmp_path)
    assert {name for name, _ in read_tensors(tmp_path)} >= {*published_names}
    assert "rope_parameters" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits_of(tmp_path), saved)


LEFTOVERS: dict[str, Names] = {
    "Gemma3": (
        "language_model.lm_head.weight",
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq",
        "vision_tower.vision_model.embeddings.position_ids",
        "vision_tower.vision_model.head.probe",
    ),
    "LLaVA-NeXT": (
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq",
        "vision_tower.vision_model.embeddings.position_ids",
        "vision_tower.vision_model.post_layernorm.weight",
    ),
    "Qwen2.5-VL": ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    "SmolVLM": ("lm_head.weight", "model.vision_model.embeddings.position_ids"),
}


@pytest.mark.parametrize("case", LEFTOVERS)
def test_what_older_checkpoints_have_besides_is_passed_over(tmp_path: Path, case: str) -> None:
    """Buffers that transformers no longer saves, parts that no feature comes from, and the head of a model whose head
    is its word embeddings.
    """
    publish(CASES[case][0](tmp_path), tmp_path)
    before = logits_of(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embeddings = next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    for name in LEFTOVERS[case]:
        tensors[name] = embeddings.clone() if name.endswith("lm_head.weight") else torch.full((3,), torch.nan)
    save_file(tensors, file)
    assert torch.equal(logits_of(tmp_path), before)


def test_a_tensor_that_is_in_no_form_of_the_model_is_told(tmp_path: Path) -> None:
    publish(make_gemma3(tmp_path), tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"vision_tower.vision_model.extra.weight": torch.zeros(3)}, file)
    with pytest.raises(CheckpointError, match=r"not in the model: vision_tower\.vision_model\.extra\.weight"):
        logits_of(tmp_path)
