"""The decoder: one for every family, described by its `DecoderConfig`.

Tokens of all sequences run through it end to end on one axis; which sequence a token belongs to is the
business of the `ForwardContext` alone.
"""

import torch
from torch import nn

from vlm_serve.decoders.config import DecoderConfig
from vlm_serve.decoders.kinds import NormKind, PositionKind
from vlm_serve.decoders.mlp import make_mlp
from vlm_serve.layers.attention import Attention
from vlm_serve.layers.context import ForwardContext, Outputs
from vlm_serve.layers.linear import Linear
from vlm_serve.layers.norm import LayerNorm, Norm, RMSNorm
from vlm_serve.layers.parallel import SINGLE, TensorParallel
from vlm_serve.layers.rotary import Rotary, Rotation, alibi_slopes, frequency_axes


def make_norm(config: DecoderConfig, size: int | None = None) -> Norm:
    """A norm of the decoder's kind, of the stream or of another size."""
    size = config.hidden_size if size is None else size
    if config.norm is NormKind.LAYER:
        return LayerNorm(size, config.norm_eps, bias=config.norm_bias)
    return RMSNorm(size, config.norm_eps, offset=1.0 if config.norm is NormKind.RMS_PLUS_ONE else 0.0)


def make_attention(config: DecoderConfig, layer: int, parallel: TensorParallel) -> Attention:
    """One layer's."""
    group, cache_layer = config.place_of(layer)
    return Attention(
        config.hidden_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        group=group,
        cache_layer=cache_layer,
        window=config.windows[layer],
        bias=config.attention_bias,
        output_bias=config.attention_output_bias,
        query_norm=make_norm(config, config.head_dim) if config.qk_norm else None,
        key_norm=make_norm(config, config.head_dim) if config.qk_norm else None,
        scale=config.attention_scale,
        softcap=config.attention_softcap,
        alibi_slopes=alibi_slopes(config.num_heads) if config.position is PositionKind.ALIBI else None,
        parallel=parallel,
    )


class DecoderLayer(nn.Module):
    """Attention and MLP, each after a norm and added to the stream."""

    def __init__(self, config: DecoderConfig, layer: int, parallel: TensorParallel) -> None:
        super().__init__()
        self.is_parallel = config.parallel_residual
        self.input_layernorm = make_norm(config)
        self.self_attn = make_attention(config, layer, parallel)
        self.post_attention_norm = make_norm(config) if config.post_norms else None
        self.post_attention_layernorm = make_norm(config) if config.mlp_norm else None
        self.mlp = make_mlp(config, layer, parallel)
        self.post_mlp_norm = make_norm(config) if config.post_norms else None

    def forward(
        self,
        update: torch.Tensor | None,
        stream: torch.Tensor,
        rotation: Rotation | None,
        context: ForwardContext,
        outputs: Outputs | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each norm adds what came before it to the stream, in place; what the layer adds last is left to the next one.

        Args:
            update: `[T, hidden_size]`, what the layer before is still to add; None for the first.
            stream: `[T, hidden_size]`.

        Returns:
            What this layer is still to add, and the stream: `[T, hidden_size]`, or `[n, hidden_size]` of `outputs`.
        """
        x = self.input_layernorm(stream) if update is None else self.input_layernorm.add(update, stream)
        attended = self.self_attn(x, rotation, context, outputs)
        if self.post_attention_norm is not None:
            attended = self.post_attention_norm(attended)
        if outputs is not None:
            stream = stream[outputs.index]
        adapters = (outputs or context).adapters
        if self.is_parallel:
            if self.post_attention_layernorm is not None:
                x = self.post_attention_layernorm(stream)
            elif outputs is not None:
                x = x[outputs.index]
            return attended + self.mlp(x, adapters), stream
        assert self.post_attention_layernorm is not None, "one that is not parallel has a norm of its own"
        computed = self.mlp(self.post_attention_layernorm.add(attended, stream), adapters)
        return computed if self.post_mlp_norm is None else self.post_mlp_norm(computed), stream


class Decoder(nn.Module):
    """A causal language model over paged keys and values."""

    def __init__(self, config: DecoderConfig, parallel: TensorParallel = SINGLE) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_tokens.requires_grad_(False)
        self.embed_positions: nn.Embedding | None = None
        if config.position is PositionKind.LEARNED:
            self.embed_positions = nn.Embedding(config.max_positions + config.position_offset, config.hidden_size)
            self.embed_positions.requires_grad_(False)
        self.layers = nn.ModuleList(DecoderLayer(config, i, parallel) for i in range(config.num_layers))
        self.norm = make_norm(config)
        self.rotary = self.local_rotary = None
        if config.position in (PositionKind.ROPE, PositionKind.MROPE):
            axes = frequency_axes(config.mrope_section, interleaved=config.mrope_interleaved)
            self.rotary = Rotary(config.rotary_dim, config.rope_theta, config.rope_scaling, axes)
            if config.local_rope_theta is not None:
                self.local_rotary = Rotary(config.rotary_dim, config.local_rope_theta, None, axes)
        self.lm_head = Linear(config.hidden_size, {"lm_head": config.vocab_size})
        if config.tie_word_embeddings:
            self.lm_head.tie(self.embed_tokens.weight)  # type: ignore[arg-type]

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids int64 `[T]` -> `[T, hidden_size]`."""
        embeddings: torch.Tensor = self.embed_tokens(token_ids)
        if self.config.embedding_scale is not None:  # rounded to the weights' dtype, as the models were trained
            embeddings *= torch.tensor(self.config.embedding_scale, dtype=embeddings.dtype)
        return embeddings

    def forward(self, embeddings: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """embeddings `[T, hidden_size]`, which are changed -> hidden states of the last layer before the final norm, of
        all T tokens or of the context's outputs alone: a prompt's others leave nothing there but keys and values.
        """
        rotations = self._rotations(context, embeddings.dtype)
        if self.embed_positions is not None:
            embeddings += self.embed_positions(context.positions + self.config.position_offset)
        update: torch.Tensor | None = None
        stream, last = embeddings, len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            outputs = context.outputs if index == last else None
            update, stream = layer(update, stream, rotations[index], context, outputs)
            if context.deepstack is not None and index < self.config.deepstack_layers:
                places, features = context.deepstack
                _add_features(update, places, features[index], outputs, len(context.positions))
        assert update is not None, "a decoder has layers"
        return stream.add_(update)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden `[n, hidden_size]` of the positions that are sampled -> float32 `[n, vocab_size]`."""
        logits: torch.Tensor = self.lm_head(self.norm(hidden)).float()
        cap = self.config.logit_softcap
        return logits if cap is None else (logits / cap).tanh_().mul_(cap)

    def _rotations(self, context: ForwardContext, dtype: torch.dtype) -> list[Rotation | None]:
        """By which each layer rotates its queries and keys."""
        config = self.config
        if self.rotary is None:
            return [None] * config.num_layers
        positions = context.positions if context.rope_positions is None else context.rope_positions
        rotation = self.rotary(positions, dtype, context.is_long)
        local = rotation if self.local_rotary is None else self.local_rotary(positions, dtype)
        rotations = [rotation if window is None else local for window in config.windows]
        return [None if index in config.unrotated_layers else rotations[index] for index in range(config.num_layers)]


def _add_features(
    update: torch.Tensor, places: torch.Tensor, features: torch.Tensor, outputs: Outputs | None, num_tokens: int
) -> None:
    """Adds features of images `[n, hidden_size]` to what a layer gave their tokens, in place.

    Args:
        update: `[T, hidden_size]`, or of `outputs` alone.
        places: int64 `[n]`, of the images' tokens among the T.
    """
    if outputs is None:
        update.index_add_(0, places, features)
    else:
        update += features.new_zeros(num_tokens, update.shape[1]).index_copy_(0, places, features)[outputs.index]
