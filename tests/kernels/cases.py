"""Ragged batches over a paged cache, for the tests of every implementation of attention and cache writes."""

import shutil
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from vlm_serve.kernels import cpp_library

NO_BLOCK = 2**30
"""Fills block tables past a sequence's length and before its windows: reading through it leaves the cache."""


@dataclass(frozen=True)
class Batch:
    """The tensors of one call, and its options."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_tables: torch.Tensor
    kv_lengths: torch.Tensor
    query_start: torch.Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None
    alibi_slopes: torch.Tensor | None = None
    spans: torch.Tensor | None = None

    @property
    def options(self) -> dict[str, Any]:
        names = ("scale", "window", "softcap", "alibi_slopes", "spans")
        return {name: getattr(self, name) for name in names}

    def options_of(self, tokens: slice) -> dict[str, Any]:
        """The options for these tokens' queries alone."""
        return self.options | {"spans": None if self.spans is None else self.spans[tokens]}

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (
            self.query,
            self.key_cache,
            self.value_cache,
            self.block_tables,
            self.kv_lengths,
            self.query_start,
        )

    def to(self, device: str) -> "Batch":
        options = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in self.options.items()
        }
        return Batch(*(tensor.to(device) for tensor in self.tensors), **options)

    @property
    def granted(self) -> int:
        return int(self.query_start[-1])


@dataclass(frozen=True)
class Case:
    """A shape: for each sequence how many keys it has, how many of its last tokens are computed in this step, and which
    of its spans attend both ways.
    """

    kv_lengths: tuple[int, ...]
    granted: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    padding: int = 0
    window: int | None = None
    softcap: float | None = None
    alibi: bool = False
    spans: tuple[tuple[tuple[int, int], ...], ...] = ()

    @property
    def name(self) -> str:
        kind = "decode" if max(self.granted) == 1 else "prefill" if self.granted == self.kv_lengths else "mixed"
        shape = f"Hq{self.heads}-Hkv{self.kv_heads}-D{self.head_dim}-B{self.block_size}"
        kind += (f"-P{self.padding}" if self.padding else "") + (f"-W{self.window}" if self.window else "")
        kind += (f"-C{self.softcap}" if self.softcap else "") + "-alibi" * self.alibi + "-spans" * bool(self.spans)
        return f"S{len(self.kv_lengths)}-{shape}-{kind}"

    def build(self, dtype: torch.dtype, seed: int = 0) -> Batch:
        """Random values in scattered blocks. Cache memory that no token was written to holds NaN, and so does
        what lies before the first key that a sequence's queries see; blocks wholly before it are not in its table.
        """
        random = torch.Generator().manual_seed(seed)
        needed = [-(-length // self.block_size) for length in self.kv_lengths]
        blocks = torch.randperm(sum(needed) + 3, generator=random).int()
        shape = (len(blocks), self.kv_heads, self.block_size, self.head_dim)
        key_cache, value_cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        block_tables = torch.full((len(needed), max(needed) + 2), NO_BLOCK, dtype=torch.int32)
        taken = 0
        for sequence, (count, length) in enumerate(zip(needed, self.kv_lengths, strict=True)):
            own = blocks[taken : taken + count]
            taken += count
            block_tables[sequence, :count] = own
            for index, block in enumerate(own.tolist()):
                written = min(self.block_size, length - index * self.block_size)
                rows = torch.randn(2, self.kv_heads, written, self.head_dim, generator=random)
                key_cache[block, :, :written], value_cache[block, :, :written] = rows
            if self.window is not None:
                first = length - self.granted[sequence]
                passed = min(
                    [max(0, first - self.window + 1), *(begin for begin, end in self.spans_of(sequence) if end > first)]
                )
                block_tables[sequence, : passed // self.block_size] = NO_BLOCK
                for index, block in enumerate(own.tolist()):
                    unseen = max(0, passed - index * self.block_size)
                    key_cache[block, :, :unseen] = value_cache[block, :, :unseen] = torch.nan
        tokens = sum(self.granted) + self.padding
        slopes = 2.0 ** -(torch.arange(1, self.heads + 1) * 8 / self.heads)
        return Batch(
            query=torch.randn(tokens, self.heads, self.head_dim, generator=random).to(dtype),
            key_cache=key_cache.to(dtype),
            value_cache=value_cache.to(dtype),
            block_tables=block_tables,
            kv_lengths=torch.tensor(self.kv_lengths, dtype=torch.int32),
            query_start=torch.tensor([0, *self.granted]).cumsum(0).int(),
            scale=self.head_dim**-0.5,
            window=self.window,
            softcap=self.softcap,
            alibi_slopes=slopes if self.alibi else None,
            spans=self.spans_of_tokens() if self.spans else None,
        )

    def spans_of(self, sequence: int) -> tuple[tuple[int, int], ...]:
        return self.spans[sequence] if self.spans else ()

    def spans_of_tokens(self) -> torch.Tensor:
        """int32 `[T, 2]`; padding tokens have what no kernel may take for a span."""
        rows = [
            next(((begin, end) for begin, end in self.spans_of(sequence) if begin <= position < end), (0, 0))
            for sequence, (length, granted) in enumerate(zip(self.kv_lengths, self.granted, strict=True))
            for position in range(length - granted, length)
        ]
        return torch.tensor(rows + [(0, NO_BLOCK)] * self.padding, dtype=torch.int32).view(-1, 2)


MIXED = ((70, 1, 133, 40, 200, 65), (5, 1, 133, 40, 1, 1))
DECODE = ((1, 16, 17, 64, 65, 129), (1,) * 6)
SPANS = ((), (), ((3, 50), (50, 120)), ((0, 40),), ((90, 200),), ())
"""Of MIXED: spans end to end, one of a whole prompt, and one of which the last token alone is asked for."""

CASES = [
    Case(*MIXED, heads=9, kv_heads=3, head_dim=64, block_size=16),
    Case(*MIXED, heads=9, kv_heads=3, head_dim=64, block_size=16, padding=3),
    Case(*DECODE, heads=9, kv_heads=3, head_dim=64, block_size=16, padding=2),
    Case((133, 40), (133, 40), heads=3, kv_heads=3, head_dim=128, block_size=16),
    Case(*MIXED, heads=4, kv_heads=4, head_dim=72, block_size=8),
    Case(*MIXED, heads=8, kv_heads=2, head_dim=80, block_size=1),
    Case(*MIXED, heads=14, kv_heads=2, head_dim=256, block_size=16),
    Case(*DECODE, heads=28, kv_heads=4, head_dim=128, block_size=24),
    Case((20, 30, 40), (20, 0, 7), heads=7, kv_heads=1, head_dim=8, block_size=4),
    Case((20, 30), (0, 0), heads=9, kv_heads=3, head_dim=64, block_size=16),
    Case(*MIXED, heads=9, kv_heads=3, head_dim=64, block_size=16, padding=3, window=8),
    Case(*MIXED, heads=4, kv_heads=4, head_dim=72, block_size=8, window=64),
    Case(*MIXED, heads=14, kv_heads=2, head_dim=256, block_size=16, window=100),
    Case(*DECODE, heads=28, kv_heads=4, head_dim=128, block_size=24, window=33),
    Case(*DECODE, heads=3, kv_heads=3, head_dim=64, block_size=1, window=1),
    Case((300, 200), (150, 200), heads=8, kv_heads=2, head_dim=80, block_size=16, window=1),
    Case((300, 200), (150, 200), heads=8, kv_heads=2, head_dim=80, block_size=16, window=5000),
    Case((400, 30, 40), (200, 0, 7), heads=7, kv_heads=1, head_dim=8, block_size=4, window=70),
    Case(*MIXED, heads=9, kv_heads=3, head_dim=64, block_size=16, softcap=0.5),
    Case(*DECODE, heads=14, kv_heads=2, head_dim=256, block_size=16, softcap=50.0, window=33),
    Case(*MIXED, heads=7, kv_heads=1, head_dim=64, block_size=16, padding=3, alibi=True),
    Case(*DECODE, heads=3, kv_heads=3, head_dim=80, block_size=16, alibi=True),
    Case((700, 300, 150), (90, 1, 150), heads=16, kv_heads=16, head_dim=16, block_size=16, alibi=True),
    Case((900, 2000), (5, 1), heads=32, kv_heads=2, head_dim=64, block_size=16, padding=3, alibi=True),
    Case(*MIXED, heads=9, kv_heads=3, head_dim=64, block_size=16, padding=3, spans=SPANS),
    Case(*MIXED, heads=9, kv_heads=3, head_dim=64, block_size=16, padding=3, window=8, spans=SPANS),
    Case((300, 200), (150, 200), heads=8, kv_heads=2, head_dim=72, block_size=4, window=70, spans=(((150, 290),), ())),
    Case((300, 9), (40, 0), heads=7, kv_heads=1, head_dim=8, block_size=4, window=5, spans=(((20, 270),), ())),
    Case(*MIXED, heads=6, kv_heads=3, head_dim=16, block_size=8, window=30, softcap=2.0, alibi=True, spans=SPANS),
]

SMALL_CASES = [
    Case((20, 1, 33, 7), (5, 1, 33, 1), heads=9, kv_heads=3, head_dim=64, block_size=16),
    Case((20, 1, 33, 7), (1, 1, 1, 1), heads=9, kv_heads=3, head_dim=64, block_size=16, padding=3),
    Case((20, 9), (20, 9), heads=4, kv_heads=4, head_dim=72, block_size=8),
    Case((20, 9, 70), (3, 0, 4), heads=14, kv_heads=2, head_dim=80, block_size=16),
    Case((20, 30), (0, 0), heads=9, kv_heads=3, head_dim=64, block_size=16, padding=2),
    Case((40, 9), (1, 1), heads=28, kv_heads=4, head_dim=128, block_size=16),
    Case((20, 9), (4, 9), heads=8, kv_heads=2, head_dim=256, block_size=16),
    Case((90, 1, 133, 7), (5, 1, 90, 1), heads=9, kv_heads=3, head_dim=64, block_size=16, padding=3, window=8),
    Case((90, 17, 133), (1, 1, 1), heads=4, kv_heads=4, head_dim=72, block_size=8, window=33),
    Case((150, 100, 70), (70, 0, 40), heads=7, kv_heads=1, head_dim=80, block_size=16, window=50),
    Case((90, 20), (70, 20), heads=2, kv_heads=1, head_dim=16, block_size=4, window=1),
    Case((20, 1, 33, 7), (5, 1, 33, 1), heads=9, kv_heads=3, head_dim=64, block_size=16, softcap=0.5),
    Case((20, 1, 90), (5, 1, 1), heads=7, kv_heads=1, head_dim=64, block_size=16, padding=3, alibi=True),
    Case((600, 300), (2, 1), heads=16, kv_heads=1, head_dim=16, block_size=16, alibi=True),
    Case(
        (90, 20), (70, 20), heads=4, kv_heads=2, head_dim=16, block_size=4, padding=3, spans=(((25, 80),), ((0, 20),))
    ),
    Case(
        (160, 9, 20),
        (130, 0, 1),
        heads=4,
        kv_heads=2,
        head_dim=16,
        block_size=4,
        window=8,
        spans=(((31, 150),), (), ()),
    ),
    Case(
        (90, 20),
        (20, 1),
        heads=14,
        kv_heads=2,
        head_dim=16,
        block_size=4,
        window=8,
        softcap=2.0,
        alibi=True,
        spans=(((25, 80),), ((2, 20),)),
    ),
]
"""For Triton's interpreter, which runs program by program."""


def names(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]


ONE_UNIT = {torch.float32: (0.0, 5e-6), torch.bfloat16: (2**-7, 1e-5)}
"""`rtol` and `atol` of an implementation that accumulates in float32: in bfloat16 one unit of the last place."""


def require_cpp() -> None:
    """Skips a test of the C++ operators where there is no compiler; with one, they must build."""
    if shutil.which(cpp_extension.get_cxx_compiler()) is None:
        pytest.skip("no C++ compiler")
    assert cpp_library.load(), "the C++ operators do not build"
