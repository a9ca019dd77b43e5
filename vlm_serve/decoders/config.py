"""What a decoder is made of, read once from a checkpoint's config.

The kinds of norm, position, attention and MLP are named here, so that another architecture is a row in
the decoder's tables and not another decoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from vlm_serve.decoders.layer_groups import LayerGroup, group_layers
from vlm_serve.errors import CheckpointError
from vlm_serve.layers.rotary import RopeScaling


class NormKind(StrEnum):
    RMS = "rms_norm"
    RMS_PLUS_ONE = "rms_norm_plus_one"
    LAYER = "layer_norm"


class PositionKind(StrEnum):
    ROPE = "rope"
    MROPE = "m_rope"
    LEARNED = "learned"
    ALIBI = "alibi"


class AttentionKind(StrEnum):
    """As checkpoints name them in `layer_types`."""

    FULL = "full_attention"
    SLIDING = "sliding_attention"


class MlpKind(StrEnum):
    GATED = "gated"
    PLAIN = "plain"
    EXPERTS = "experts"


KNOWN = ("llama", "mistral", "qwen2")
"""`model_type` of the text configs that can be read."""


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """One decoder. Sizes are counts of features, heads, layers or tokens.

    `layer_types` has the kind of each layer; empty: all see the whole context. Those that slide see the last
    `sliding_window` positions, their own among them. `attention_bias` is of queries, keys and values.
    `logit_softcap` and `attention_softcap` None: no cap. What a field names and the decoder has no part for yet is
    refused when it is built.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    norm: NormKind = NormKind.RMS
    position: PositionKind = PositionKind.ROPE
    mlp: MlpKind = MlpKind.GATED
    activation: str = "silu"
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: tuple[AttentionKind, ...] = ()
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    tie_word_embeddings: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Reads a text config of transformers, with its defaults filled in (`AutoConfig(...).to_dict()`).

        Raises:
            CheckpointError: the architecture, or something in it, is not known here.
        """
        architecture = config.get("model_type")
        if architecture not in KNOWN:
            raise CheckpointError(
                f"Decoders of type {architecture!r} are not known. Known: {', '.join(map(repr, KNOWN))}."
            )
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        theta, scaling = _rope(config)
        window, layer_types = _attention_kinds(architecture, config)
        bias = bool(config.get("attention_bias", False))
        return cls(
            architecture=architecture,
            vocab_size=config["vocab_size"],
            hidden_size=hidden,
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            intermediate_size=config["intermediate_size"],
            max_positions=config["max_position_embeddings"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=theta,
            rope_scaling=scaling,
            activation=config.get("hidden_act", "silu"),
            attention_bias=bias or architecture == "qwen2",
            attention_output_bias=bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            sliding_window=window,
            layer_types=layer_types,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many positions each layer sees; None: all."""
        kinds = self.layer_types or (AttentionKind.FULL,) * self.num_layers
        return tuple(self.sliding_window if kind is AttentionKind.SLIDING else None for kind in kinds)

    @property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """The layers by how they page their keys and values."""
        return group_layers(self.windows)

    @property
    def layers_per_group(self) -> int:
        return max(len(group.layers) for group in self.layer_groups)

    def place_of(self, layer: int) -> tuple[int, int]:
        """The group of a layer and its index in it."""
        return next(
            (index, group.layers.index(layer)) for index, group in enumerate(self.layer_groups) if layer in group.layers
        )


def _attention_kinds(architecture: str, config: Mapping[str, Any]) -> tuple[int | None, tuple[AttentionKind, ...]]:
    """The window and the kind of each layer, as transformers' model of that architecture reads them."""
    window, count = config.get("sliding_window"), config["num_hidden_layers"]
    if architecture == "llama" or window is None or config.get("use_sliding_window") is False:
        return None, ()
    if not isinstance(window, int) or window < 1:
        raise CheckpointError(f"sliding_window is {window!r}; it must be a count of positions.")
    if architecture == "mistral":
        return window, (AttentionKind.SLIDING,) * count
    names = config.get("layer_types") or ()
    if len(names) != count or not set(names) <= set(AttentionKind):
        raise CheckpointError(
            f"layer_types must name {', '.join(AttentionKind)} for each of {count} layers; it is {list(names)}."
        )
    kinds = tuple(AttentionKind(name) for name in names)
    return (window, kinds) if AttentionKind.SLIDING in kinds else (None, ())


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from transformers 5's `rope_parameters` or the older pair of fields."""
    rope = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10_000.0),
        **(config.get("rope_scaling") or {}),
    }
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise CheckpointError(f"RoPE scaling {kind!r} is not known. Known: 'default', 'linear', 'llama3'.")
    fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return theta, RopeScaling(kind, **{name: rope[name] for name in fields if name in rope})
