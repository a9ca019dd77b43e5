"""The projector: what turns a tower's features into embeddings of the decoder's width."""

import torch
from torch import nn
from transformers.activations import ACT2FN


class MlpProjector(nn.Module):
    """Two linear layers with an activation between them (LLaVA-1.5, arXiv 2310.03744, section 3.3)."""

    def __init__(self, in_features: int, hidden_size: int, activation: str = "gelu", *, bias: bool = True) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, hidden_size, bias=bias)
        self.activation = ACT2FN[activation]
        self.linear_2 = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """features `[B, tokens, in_features]` -> `[B, tokens, hidden_size]`."""
        return self.linear_2(self.activation(self.linear_1(features)))  # type: ignore[no-any-return]
