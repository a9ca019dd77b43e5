"""Log-probabilities of the model's own distribution, of the tokens drawn and of those of a prompt."""

import numpy as np
import torch

from vlm_serve.decoders.decoder import Decoder
from vlm_serve.types import SamplingParams, TokenLogprobs

MAX_LOGITS_AT_ONCE = 2**24
"""Logits of a prompt that are held at the same time, 64 MiB of them."""


def token_logprobs(logprobs: torch.Tensor, tokens: np.ndarray, counts: np.ndarray) -> list[TokenLogprobs]:
    """The entry of each position.

    Args:
        logprobs: float32 `[n, vocab]`, a log_softmax.
        tokens: int64 `[n]`, the token at each position. One past the vocabulary has probability 0.
        counts: int64 `[n]`, how many of the likeliest are asked for.
    """
    vocab_size = logprobs.shape[-1]
    is_known = tokens < vocab_size
    index = torch.from_numpy(np.where(is_known, tokens, 0)).to(logprobs.device)[:, None]
    chosen = logprobs.gather(1, index)
    # As many for all, so that equal ones are in the same order whatever the other rows ask for.
    top, top_ids = logprobs.topk(min(SamplingParams.MAX_LOGPROBS, vocab_size))
    ranks = ((logprobs > chosen).sum(-1) + 1).tolist()
    return [
        TokenLogprobs(
            (token, *ids[:count]), (own if known else float("-inf"), *values[:count]), rank if known else vocab_size + 1
        )
        for token, known, own, values, ids, rank, count in zip(
            tokens.tolist(),
            is_known.tolist(),
            chosen[:, 0].tolist(),
            top.tolist(),
            top_ids.tolist(),
            ranks,
            counts.tolist(),
            strict=True,
        )
    ]


def prompt_logprobs(decoder: Decoder, hidden: torch.Tensor, targets: np.ndarray, count: int) -> list[TokenLogprobs]:
    """The entries of n tokens of a prompt, in bounded memory.

    Args:
        hidden: `[n, hidden_size]` of the positions before them.
        targets: int64 `[n]`, the tokens.
        count: how many of the likeliest are asked for.
    """
    size = max(1, MAX_LOGITS_AT_ONCE // decoder.config.vocab_size)
    entries: list[TokenLogprobs] = []
    for begin in range(0, len(targets), size):
        logprobs = torch.log_softmax(decoder.logits(hidden[begin : begin + size]), dim=-1)
        piece = targets[begin : begin + size]
        entries += token_logprobs(logprobs, piece, np.full(len(piece), count))
    return entries
