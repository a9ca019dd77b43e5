"""The tensors of transformers' image-text models by our own names: tower, projector and decoder."""

from collections.abc import Mapping

from vlm_serve.decoders.names import text_name
from vlm_serve.encoders.open_clip_tower import OpenClipTower
from vlm_serve.encoders.transformers_tower import TransformersTower
from vlm_serve.families.base import replace_prefix

Tower = TransformersTower | OpenClipTower
"""One that is cut off after the layer whose states are used."""

TOWER = "vision.model."

PREFIXES = {
    # as transformers has them in memory
    "model.language_model.": "decoder.",
    "model.vision_tower.": TOWER,
    "model.multi_modal_projector.": "projector.",
    # as it saves them, and as they are published: there the tower lies in a `vision_model`
    "language_model.model.": "decoder.",
    "language_model.lm_head.": "decoder.lm_head.",
    "vision_tower.": TOWER,
    "multi_modal_projector.": "projector.",
    "lm_head.": "decoder.lm_head.",
}


def whole_model_name(
    name: str, text_type: str, tower: Tower | None = None, prefixes: Mapping[str, str] = PREFIXES
) -> str | None:
    """Our name of a tensor that a model of tower, projector and decoder calls `name`; None: it is not needed.

    Args:
        text_type: `model_type` of the decoder.
        tower: as it is cut; None for one that is taken whole.
        prefixes: of the parts, theirs to ours.
    """
    if name.endswith(("rotary_emb.inv_freq", "position_ids")):
        return None
    canonical = replace_prefix(name, prefixes)
    if tower is not None and canonical.startswith(TOWER):
        inner = canonical.removeprefix(TOWER).removeprefix("vision_model.")
        return TOWER + inner if tower.uses(inner) else None
    return text_name(text_type, canonical) if canonical.startswith("decoder.") else canonical
