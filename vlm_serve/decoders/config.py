"""What a decoder is made of, read once from a checkpoint's config.

The kinds of norm, position, attention and MLP are named here, so that another architecture is a row in
the decoder's tables and not another decoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlm_serve.decoders.hf_config import KNOWN as KNOWN
from vlm_serve.decoders.hf_config import read_fields
from vlm_serve.decoders.kinds import AttentionKind as AttentionKind
from vlm_serve.decoders.kinds import MlpKind as MlpKind
from vlm_serve.decoders.kinds import NormKind as NormKind
from vlm_serve.decoders.kinds import PositionKind as PositionKind
from vlm_serve.decoders.layer_groups import LayerGroup, group_layers
from vlm_serve.layers.rotary import RopeScaling


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """One decoder. Sizes are counts of features, heads, layers or tokens.

    Positions: `partial_rotary_factor` is the share of a head that is rotated. Layers that slide rotate by
    `local_rope_theta`, without scaling, where it is not None; `unrotated_layers` do not rotate at all. `mrope_section`
    counts the frequencies of time, row and column, end to end or, `mrope_interleaved`, in turns. A learned position's
    embedding is at `position_offset` past it.

    Attention: `layer_types` has the kind of each layer; empty: all see the whole context. Those that slide see the last
    `sliding_window` positions, their own among them. `attention_bias` is of queries, keys and values, `qk_norm` a norm
    of each query and key. `attention_scale` None is 1 / sqrt(head_dim).

    Layers: `post_norms` are those of Gemma 2, after attention and MLP. With `parallel_residual` attention and MLP take
    the same stream and are added to it together; the MLP may have no norm of its own then (`mlp_norm`). Of
    `num_experts` each token takes `experts_per_token`, but in `dense_layers`, whose MLP is gated; `norm_topk_prob`
    makes their weights sum to one. After each of the first `deepstack_layers` features of images are added.

    `logit_softcap` and `attention_softcap` None: no cap. `embedding_scale` is of the words' embeddings.
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
    partial_rotary_factor: float = 1.0
    local_rope_theta: float | None = None
    unrotated_layers: tuple[int, ...] = ()
    mrope_section: tuple[int, ...] = ()
    mrope_interleaved: bool = False
    position: PositionKind = PositionKind.ROPE
    position_offset: int = 0
    norm: NormKind = NormKind.RMS
    norm_bias: bool = False
    post_norms: bool = False
    parallel_residual: bool = False
    mlp_norm: bool = True
    attention_bias: bool = False
    attention_output_bias: bool = False
    qk_norm: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[AttentionKind, ...] = ()
    mlp: MlpKind = MlpKind.GATED
    mlp_bias: bool = False
    activation: str = "silu"
    num_experts: int = 0
    experts_per_token: int = 0
    experts_intermediate_size: int = 0
    norm_topk_prob: bool = True
    dense_layers: tuple[int, ...] = ()
    deepstack_layers: int = 0
    embedding_scale: float | None = None
    logit_softcap: float | None = None
    tie_word_embeddings: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Reads a text config of transformers, with its defaults filled in (`AutoConfig(...).to_dict()`).

        Raises:
            CheckpointError: the architecture, or something in it, is not known here.
        """
        return cls(**read_fields(config))

    @property
    def rotary_dim(self) -> int:
        """How many features of a head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def stretches_from(self) -> int | None:
        """Sequences of more tokens than this take another set of rotary frequencies, for all of their tokens; None:
        there is one set.
        """
        scaling = self.rope_scaling
        if scaling is None or not scaling.long_factor or self.max_positions <= scaling.original_max_position_embeddings:
            return None
        return scaling.original_max_position_embeddings

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

    def mlp_of(self, layer: int) -> MlpKind:
        """The kind of one layer's MLP."""
        return MlpKind.GATED if layer in self.dense_layers else self.mlp
