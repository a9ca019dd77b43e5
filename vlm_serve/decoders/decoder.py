"""The decoder: one for every family, described by its `DecoderConfig`.

Tokens of all sequences run through it end to end on one axis; which sequence a token belongs to is the
business of the `ForwardContext` alone.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN

from vlm_serve.decoders.config import DecoderConfig, MlpKind, NormKind, PositionKind
from vlm_serve.errors import CheckpointError
from vlm_serve.layers.attention import Attention
from vlm_serve.layers.context import AdapterSegment, ForwardContext, Outputs
from vlm_serve.layers.linear import Linear
from vlm_serve.layers.norm import RMSNorm
from vlm_serve.layers.parallel import SINGLE, TensorParallel
from vlm_serve.layers.rotary import Rotary


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))` (arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig, parallel: TensorParallel) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(
            hidden, {"gate_proj": inner, "up_proj": inner}, bias=config.mlp_bias, parallel=parallel
        )
        self.down_proj = Linear(inner, {"down_proj": hidden}, bias=config.mlp_bias, split="row", parallel=parallel)
        self.activation = None if config.activation == "silu" else ACT2FN[config.activation]

    def forward(self, x: torch.Tensor, adapters: tuple[AdapterSegment, ...]) -> torch.Tensor:
        if self.activation is None:
            activated = self.gate_up_proj.silu_and_mul(x, adapters)
        else:
            gate, up = self.gate_up_proj(x, adapters).chunk(2, dim=-1)
            activated = self.activation(gate) * up
        return self.down_proj(activated, adapters)  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Attention and MLP, each after a norm and added to the stream."""

    def __init__(self, config: DecoderConfig, layer: int, parallel: TensorParallel) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        group, cache_layer = config.place_of(layer)
        self.self_attn = Attention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            group=group,
            cache_layer=cache_layer,
            window=config.windows[layer],
            bias=config.attention_bias,
            output_bias=config.attention_output_bias,
            parallel=parallel,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config, parallel)

    def forward(
        self,
        update: torch.Tensor | None,
        stream: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
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
        if outputs is not None:
            stream = stream[outputs.index]
        x = self.post_attention_layernorm.add(attended, stream)
        return self.mlp(x, (outputs or context).adapters), stream


class Decoder(nn.Module):
    """A causal language model over paged keys and values.

    Raises:
        CheckpointError: the config names a part that is not built yet.
    """

    def __init__(self, config: DecoderConfig, parallel: TensorParallel = SINGLE) -> None:
        super().__init__()
        _refuse_what_is_not_built(config)
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_tokens.requires_grad_(False)
        self.layers = nn.ModuleList(DecoderLayer(config, i, parallel) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.rotary = Rotary(config.head_dim, config.rope_theta, config.rope_scaling)
        self.lm_head = Linear(config.hidden_size, {"lm_head": config.vocab_size})
        if config.tie_word_embeddings:
            self.lm_head.tie(self.embed_tokens.weight)  # type: ignore[arg-type]

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids int64 `[T]` -> `[T, hidden_size]`."""
        return self.embed_tokens(token_ids)  # type: ignore[no-any-return]

    def forward(self, embeddings: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """embeddings `[T, hidden_size]`, which are changed -> hidden states of the last layer before the final norm, of
        all T tokens or of the context's outputs alone: a prompt's others leave nothing there but keys and values.
        """
        rotation = self.rotary(context.positions, embeddings.dtype)
        update: torch.Tensor | None = None
        stream, last = embeddings, len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            update, stream = layer(update, stream, rotation, context, context.outputs if index == last else None)
        assert update is not None, "a decoder has layers"
        return stream.add_(update)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden `[n, hidden_size]` of the positions that are sampled -> float32 `[n, vocab_size]`."""
        return self.lm_head(self.norm(hidden)).float()  # type: ignore[no-any-return]


def _refuse_what_is_not_built(config: DecoderConfig) -> None:
    built = {
        "norm": (config.norm, NormKind.RMS),
        "position": (config.position, PositionKind.ROPE),
        "mlp": (config.mlp, MlpKind.GATED),
        "qk_norm": (config.qk_norm, False),
        "attention_softcap": (config.attention_softcap, None),
        "logit_softcap": (config.logit_softcap, None),
    }
    if unknown := [f"{name}={value}" for name, (value, known) in built.items() if value != known]:
        raise CheckpointError(f"A decoder with {', '.join(unknown)} is not served by this version.")
