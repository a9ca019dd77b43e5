"""`ForwardContext`: what a forward pass needs beside its tokens, passed explicitly down the layers.

A batch is ragged: the tokens of all sequences lie end to end on one axis of length T, with no padding.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AdapterSegment:
    """The tokens of one adapter in a batch: its device slot and their indices, int64 `[n]`."""

    slot: int
    token_index: torch.Tensor


@dataclass(frozen=True, slots=True)
class Outputs:
    """The n tokens whose hidden states are wanted of the last layer: of each sequence its last ones, or none.

    Args:
        index: int64 `[n]`, which of the batch's tokens they are.
        query_start: int32 `[S + 1]`, prefix sums of how many each sequence has.
        max_query_len: the most that one sequence has.
        adapters: as the context's, with indices among the n.
        spans: of these tokens, as the context's, int32 `[n, 2]`.
    """

    index: torch.Tensor
    query_start: torch.Tensor
    max_query_len: int
    adapters: tuple[AdapterSegment, ...] = ()
    spans: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """One step's batch of S sequences and T tokens.

    Args:
        positions: int64 `[T]`, the position of each token in its sequence.
        slot_mapping: for each group of layers int64 `[T]`, where each token's key and value go:
            `block * block_size + offset`.
        block_tables: for each group of layers int32 `[S, max_blocks]`, each sequence's blocks in order. Where the
            group's window has passed, an entry means nothing.
        kv_lengths: int32 `[S]`, keys present once this step's are written.
        query_start: int32 `[S + 1]`, prefix sums of the tokens granted to each sequence.
        max_query_len: the most tokens granted to one sequence.
        key_cache, value_cache: `[layers of a group, blocks, kv_heads, block_size, head_dim]`.
        adapters: the tokens that an adapter applies to; empty for a step of base requests alone.
        outputs: where the last layer need not give every token's hidden state; None: it gives all T.
        rope_positions: int64 `[3, T]`, the time, row and column by which each token is rotated; None: `positions`.
        spans: int32 `[T, 2]`, the positions `[begin, end)` that a token sees beside those before it, which attend both
            ways; (0, 0) for one that has none. None: no token has any.
        deepstack: for n image tokens their indices, int64 `[n]`, and features `[k, n, hidden_size]`: the i-th are added
            to the stream after layer i (arXiv 2406.04334). None: no token has any.
        is_long: bool `[T]`, which tokens are of sequences that take the second set of rotary frequencies. None: none
            is, or there is one set.
    """

    positions: torch.Tensor
    slot_mapping: tuple[torch.Tensor, ...]
    block_tables: tuple[torch.Tensor, ...]
    kv_lengths: torch.Tensor
    query_start: torch.Tensor
    max_query_len: int
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    adapters: tuple[AdapterSegment, ...] = ()
    outputs: Outputs | None = None
    rope_positions: torch.Tensor | None = None
    spans: torch.Tensor | None = None
    deepstack: tuple[torch.Tensor, torch.Tensor] | None = None
    is_long: torch.Tensor | None = None
