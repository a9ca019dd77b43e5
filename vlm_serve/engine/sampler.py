"""From logits to tokens, for all rows of a step at once.

A random draw is one uniform number a row, taken from the row's own seed and the index of the token, and
looked up in the cumulative distribution: so a seeded request gives the same answer whatever else runs.
"""

from dataclasses import dataclass

import numpy as np
import torch

GREEDY_BELOW = 1e-5
"""A lower temperature is greedy: it would be in effect, and float32 cannot divide by every one of them."""


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """The sampling parameters of n rows, one array each.

    Args:
        temperature: float `[n]`, below `GREEDY_BELOW` for greedy.
        top_k: int64 `[n]`, 0 or less for every token.
        top_p: float `[n]`, above 0.
        min_p: float `[n]`, 0 for every token.
        draws: uint64 `[n]`, the seed of each row.
        indices: int64 `[n]`, which token of its answer each row draws.
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    draws: np.ndarray
    indices: np.ndarray


def sample(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """logits float32 `[n, vocab]` -> the token drawn for each row, int64 `[n]`.

    Greedy takes the first of equal maxima, as transformers does. Each row's result depends on that row alone.
    """
    tokens = logits.argmax(dim=-1)
    is_random = rows.temperature >= GREEDY_BELOW
    if not is_random.any():
        return tokens
    is_filtered = is_random & ((rows.top_k > 0) | (rows.top_p < 1))
    uniforms = _uniforms(rows.draws, rows.indices)
    for members, draw in ((is_random & ~is_filtered, _draw), (is_filtered, _draw_filtered)):
        if not members.any():
            continue
        index = torch.from_numpy(members.nonzero()[0]).to(logits.device)

        def on_device(values: np.ndarray, members: np.ndarray = members) -> torch.Tensor:
            return torch.from_numpy(values[members]).to(logits.device)[:, None]

        members_logits = logits[index]
        highest = members_logits.amax(dim=-1, keepdim=True)
        scaled = (members_logits - highest) / on_device(rows.temperature).float()
        tokens[index] = draw(scaled, *(on_device(part) for part in (uniforms, rows.min_p, rows.top_k, rows.top_p)))
    return tokens


def _draw(
    scaled: torch.Tensor, uniform: torch.Tensor, min_p: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    return _invert(torch.softmax(scaled, dim=-1).masked_fill_(_is_below(scaled, min_p), 0.0), uniform)


def _draw_filtered(
    scaled: torch.Tensor, uniform: torch.Tensor, min_p: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """Top-k first, then top-p over what it left: the smallest set of tokens whose mass reaches `top_p`."""
    ordered, token_ids = torch.sort(scaled, dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[-1], device=scaled.device)
    ordered = ordered.masked_fill((top_k > 0) & (rank >= top_k), float("-inf"))
    probabilities = torch.softmax(ordered, dim=-1)
    mass_before = probabilities.cumsum(dim=-1, dtype=torch.float64) - probabilities
    # The most likely token always stays: no mass is before it, and top_p is above 0.
    probabilities = probabilities.masked_fill((mass_before >= top_p) | _is_below(ordered, min_p), 0.0)
    return token_ids.gather(1, _invert(probabilities, uniform)[:, None])[:, 0]


def _is_below(scaled: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Where a token has less than `min_p` of the most likely one's probability, whose scaled logit is 0."""
    return scaled < min_p.log().float()


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The index at which the running sum of `weights` `[n, vocab]` passes `uniform` of the total."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Below the total even when rounded, so that none with weight 0 is found.
    passed = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, passed, right=True)[:, 0]
    return index.clamp(max=weights.shape[-1] - 1)


def _uniforms(draws: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """float64 `[n]` in [0, 1): SplitMix64 (Steele et al., OOPSLA 2014) of the seed, stepped by the index."""
    with np.errstate(over="ignore"):
        z = _mix(draws + np.uint64(0x9E3779B97F4A7C15)) + (indices.astype(np.uint64) + np.uint64(1)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        uniforms: np.ndarray = (_mix(z) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return uniforms


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed
