"""A config.json with a field that cannot be is refused by the field's name, whatever stands in it."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import make_llava, make_timm_vlm
from tests.families.gemma_checkpoints import make_gemma3, make_paligemma
from tests.families.qwen_checkpoints import make_qwen_vl
from tests.families.text_checkpoints import make_text
from tests.families.tile_checkpoints import make_idefics3, make_internvl, make_llava_next
from vlm_serve.errors import CheckpointError
from vlm_serve.families import load_family
from vlm_serve.families.plausible import ACTIVATIONS, MOST

MAKERS: dict[str, Callable[[Path], object]] = {
    "LLaVA": make_llava,
    "LLaVA-NeXT": make_llava_next,
    "Gemma3": make_gemma3,
    "PaliGemma 2": make_paligemma,
    "Qwen2.5-VL": partial(make_qwen_vl, kind="qwen2_5_vl"),
    "Qwen3-VL": partial(make_qwen_vl, kind="qwen3_vl"),
    "SmolVLM": partial(make_idefics3, kind="smolvlm"),
    "InternVL": make_internvl,
    "timm": make_timm_vlm,
    "Llama 3": partial(make_text, row="Llama 3"),
    "Falcon 40B": partial(make_text, row="Falcon 40B"),
    "OPT": partial(make_text, row="OPT"),
    "Qwen3-MoE": partial(make_text, row="Qwen3-MoE"),
}

ABSURD: tuple[object, ...] = (-1, 0, "x", None, [], {}, 10**9, 0.5)

OTHER_FIELDS = {
    "model_type",
    "rope_parameters",
    "layer_types",
    "sliding_window",
    "rms_norm_eps",
    "tie_word_embeddings",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "downsample_ratio",
    "image_grid_pinpoints",
    "deepstack_visual_indexes",
    "fullatt_block_indexes",
    "text_config",
    "vision_config",
}
"""Those that are changed besides the sizes and the activations."""

OTHER_NAMES = {
    "rope_parameters": ("mrope_section",),
    "vision_config": ("image_grid_pinpoints", "the tower", "A tile of 224 pixels"),
    "model_type": ("model type", "towers of type 'x'", "Decoders of type 'x'", "KeyError: 'x'"),
    "text_config": ("Decoders of type None",),
}
"""What an error may name instead: what does not go with the rest, or with what transformers puts there."""


def absurd_configs(config: dict[str, Any]) -> Iterator[tuple[str, object, dict[str, Any]]]:
    """Each field of a model's parts with each value: the field, the value and the config."""
    for part in ("", "text_config", "vision_config"):
        settings = config.get(part, {}) if part else config
        for name in settings.keys() & (MOST.keys() | set(ACTIVATIONS) | OTHER_FIELDS):
            for value in ABSURD:
                changed = copy.deepcopy(config)
                (changed[part] if part else changed)[name] = value
                if (part, name) != ("", "model_type"):
                    yield name, value, changed


@pytest.mark.filterwarnings("ignore")  # transformers' own, of fields that do not go together
@pytest.mark.parametrize("kind", MAKERS)
def test_an_absurd_field_is_refused_by_its_name(tmp_path: Path, kind: str) -> None:
    MAKERS[kind](tmp_path)
    file = tmp_path / "config.json"
    unnamed, refused = [], 0
    for name, value, config in absurd_configs(json.loads(file.read_text())):
        file.write_text(json.dumps(config))
        try:
            family = load_family(tmp_path)
        except CheckpointError as error:
            refused += 1
            if not any(known in str(error) for known in (name, *OTHER_NAMES.get(name, ()))):
                unnamed.append((name, value, str(error)))
            continue
        assert name not in MOST or value in (None, 0), f"{name}: {value!r} was taken"
        with suppress(CheckpointError):  # the weights do not fit it
            family.build(torch.float32, torch.device("cpu"))
    assert unnamed == []
    assert refused > 50


@pytest.mark.parametrize("kind", MAKERS)
def test_parts_that_are_left_out_are_told(tmp_path: Path, kind: str) -> None:
    MAKERS[kind](tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for part in config.keys() & {"text_config", "vision_config", "vision", "projector"}:
        file.write_text(json.dumps({name: value for name, value in config.items() if name != part}))
        with pytest.raises(CheckpointError):
            load_family(tmp_path).build(torch.float32, torch.device("cpu"))
