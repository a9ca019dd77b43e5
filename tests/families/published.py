"""A checkpoint as the hub has it, of one that this transformers has saved: older names, few fields in its config."""

import json
from pathlib import Path
from typing import Any

import vlm_serve.encoders  # noqa: F401 - before transformers: it mends torchvision

# isort: split
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

NEWER = ("rope_parameters", "layer_types", "use_bidirectional_attention")
"""Fields of a text config that the published ones do not know."""


def publish(model: PreTrainedModel, folder: Path) -> None:
    """Gives the weights and the config of a folder, which has been saved from `model`, their published form."""
    # transformers leaves the towers' inner `vision_model.` out unless it knows that the model was loaded with it.
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    config = json.loads((folder / "config.json").read_text())
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(published_config(config)))


def published_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the fields of transformers 4, and without those that its classes fill in."""
    kind = config["model_type"]
    parts = {name: config[name] for name in ("text_config", "vision_config")}
    whole = {name: value for name, value in config.items() if name not in (*parts, "tie_word_embeddings")}
    text, vision = (_unlike_defaults(part) for part in parts.values())
    whole |= {"torch_dtype": whole.pop("dtype"), "vision_config": vision}
    if config["tie_word_embeddings"]:  # that they are not, transformers 4 did not write
        whole["tie_word_embeddings"] = True
    text = _older_positions(parts["text_config"], text)
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        vision["model_type"] = kind
        return text | whole
    if kind in ("idefics3", "smolvlm"):
        vision["model_type"] = "idefics3"
    return whole | {"text_config": text}


def _unlike_defaults(part: dict[str, Any]) -> dict[str, Any]:
    defaults = AutoConfig.for_model(part["model_type"]).to_dict()
    return {
        name: value
        for name, value in part.items()
        if name == "model_type" or (name != "dtype" and (name not in defaults or value != defaults[name]))
    }


def _older_positions(whole: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """With `rope_theta` and `rope_scaling` for `rope_parameters`, and a pattern for Gemma3's kinds of layers."""
    rope = dict(whole["rope_parameters"])
    text = {name: value for name, value in text.items() if name not in NEWER}
    if "full_attention" in rope:
        full, sliding = dict(rope["full_attention"]), rope["sliding_attention"]
        text |= {"rope_theta": full.pop("rope_theta"), "rope_local_base_freq": sliding["rope_theta"]}
        pattern = 1 + whole["layer_types"].index("full_attention")
        return text | {"rope_scaling": full, "sliding_window_pattern": pattern}
    kind = "mrope" if "mrope_section" in rope else rope.pop("rope_type")
    text["rope_theta"] = rope.pop("rope_theta")
    rope.pop("rope_type", None)
    return text | ({"rope_scaling": {"type": kind} | rope} if rope else {})
