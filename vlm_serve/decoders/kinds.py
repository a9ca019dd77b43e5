"""The kinds of part that a decoder is put together from, as `DecoderConfig` names them."""

from enum import StrEnum


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
