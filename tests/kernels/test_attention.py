import pytest
import torch

from tests.kernels.cases import CASES, ONE_UNIT, Batch, Case, names, require_cpp
from vlm_serve.kernels import dispatch
from vlm_serve.kernels.attention import cpu, reference, torch_batched

DTYPES = [torch.float32, torch.bfloat16]
IMPLEMENTATIONS = {"cpp": cpu.paged_attention, "torch": torch_batched.paged_attention}


def attend(implementation: str, batch: Batch) -> torch.Tensor:
    if implementation == "cpp":
        require_cpp()
    return IMPLEMENTATIONS[implementation](*batch.tensors, **batch.options)


def tokens_of(batch: Batch, out: torch.Tensor, sequence: int) -> torch.Tensor:
    start, end = batch.query_start[sequence : sequence + 2].tolist()
    return out[start:end]


def only(batch: Batch, sequence: int) -> Batch:
    """The batch of one of its sequences, over the same cache."""
    tokens = slice(*batch.query_start[sequence : sequence + 2].tolist())
    return Batch(
        batch.query[tokens],
        batch.key_cache,
        batch.value_cache,
        batch.block_tables[sequence : sequence + 1],
        batch.kv_lengths[sequence : sequence + 1],
        torch.tensor([0, tokens.stop - tokens.start], dtype=torch.int32),
        **batch.options_of(tokens),
    )


def part(batch: Batch, start: int, end: int) -> Batch:
    """Tokens `start` to `end` of a whole prefill of one sequence, as a later step would compute them."""
    return Batch(
        batch.query[start:end],
        batch.key_cache,
        batch.value_cache,
        batch.block_tables,
        torch.tensor([end], dtype=torch.int32),
        torch.tensor([0, end - start], dtype=torch.int32),
        **batch.options_of(slice(start, end)),
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=names(CASES))
def test_every_implementation_agrees_with_the_reference(implementation: str, dtype: torch.dtype, case: Case) -> None:
    batch = case.build(dtype)
    rtol, atol = ONE_UNIT[dtype]
    expected = reference.paged_attention(*batch.tensors, **batch.options)
    out = attend(implementation, batch)
    torch.testing.assert_close(out[: batch.granted], expected[: batch.granted], rtol=rtol, atol=atol)


def test_the_reference_is_the_softmax_of_the_formula() -> None:
    batch = Case((3,), (2,), heads=1, kv_heads=1, head_dim=2, block_size=2).build(torch.float32)
    keys, values = (
        cache[batch.block_tables[0, :2].long(), 0].reshape(4, 2)[:3] for cache in (batch.key_cache, batch.value_cache)
    )
    expected = []
    for query, seen in zip(batch.query[:, 0], (2, 3), strict=True):
        weights = torch.stack([(query @ keys[index] * batch.scale).exp() for index in range(seen)])
        expected.append((weights[:, None] * values[:seen]).sum(0) / weights.sum())
    out = reference.paged_attention(*batch.tensors, **batch.options)
    torch.testing.assert_close(out[:, 0], torch.stack(expected))


def test_the_reference_sees_its_window_and_no_more() -> None:
    batch = Case((5,), (5,), heads=1, kv_heads=1, head_dim=2, block_size=8, window=2).build(torch.float32)
    keys, values = (cache[batch.block_tables[0, 0].long(), 0, :5] for cache in (batch.key_cache, batch.value_cache))
    out = reference.paged_attention(*batch.tensors, **batch.options)[:, 0]
    torch.testing.assert_close(out[0], values[0])
    for position in range(1, 5):
        seen = slice(position - 1, position + 1)
        weights = (keys[seen] @ batch.query[position, 0] * batch.scale).softmax(0)
        torch.testing.assert_close(out[position], weights @ values[seen])


@pytest.mark.parametrize("length", [5, 600])
def test_the_reference_caps_scaled_scores_and_adds_alibi_in_bfloat16(length: int) -> None:
    case = Case((length,), (2,), heads=16, kv_heads=1, head_dim=2, block_size=1024, softcap=0.5, alibi=True)
    batch = case.build(torch.float32)
    assert batch.alibi_slopes is not None
    keys, values = (
        cache[batch.block_tables[0, 0].long(), 0].double() for cache in (batch.key_cache, batch.value_cache)
    )
    out = reference.paged_attention(*batch.tensors, **batch.options)
    for head, slope in enumerate(batch.alibi_slopes.bfloat16()):
        scores = 0.5 * (batch.query[1, head].double() @ keys[:length].T * batch.scale / 0.5).tanh()
        bias = torch.stack([slope * torch.tensor(float(position)).bfloat16() for position in range(length)])
        assert bias.dtype is torch.bfloat16
        weights = (scores + bias.double() * batch.scale).softmax(0)
        torch.testing.assert_close(out[1, head].double(), weights @ values[:length], rtol=0, atol=1e-6)


def test_the_reference_sees_a_span_whole_and_its_window() -> None:
    case = Case((9,), (9,), heads=1, kv_heads=1, head_dim=2, block_size=16, window=2, spans=(((2, 6),),))
    batch = case.build(torch.float32)
    keys, values = (cache[batch.block_tables[0, 0].long(), 0, :9] for cache in (batch.key_cache, batch.value_cache))
    out = reference.paged_attention(*batch.tensors, **batch.options)[:, 0]
    seen = [[0], [0, 1], [1, 2, 3, 4, 5], *[[2, 3, 4, 5]] * 3, [5, 6], [6, 7], [7, 8]]
    for position, positions in enumerate(seen):
        weights = (keys[positions] @ batch.query[position, 0] * batch.scale).softmax(0)
        torch.testing.assert_close(out[position], weights @ values[positions])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_output_of_padding_is_finite(implementation: str) -> None:
    for case in CASES:
        if case.padding:
            assert attend(implementation, case.build(torch.float32)).isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_may_be_a_slice_of_stacked_projections(implementation: str) -> None:
    batch = CASES[0].build(torch.bfloat16)
    stacked = torch.full((len(batch.query), 15, 64), torch.nan, dtype=torch.bfloat16)
    stacked[:, :9] = batch.query
    sliced = Batch(stacked[:, :9], *batch.tensors[1:], **batch.options)
    assert torch.equal(attend(implementation, sliced), attend(implementation, batch))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=names(CASES))
def test_a_sequence_gets_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype, case: Case) -> None:
    batch = case.build(dtype)
    out = attend("cpp", batch)
    for sequence in range(len(case.granted)):
        assert torch.equal(tokens_of(batch, out, sequence), attend("cpp", only(batch, sequence)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(9, 64), (3, 80), (21, 128)])
@pytest.mark.parametrize("window", [None, 1, 8, 65, 100])
def test_a_prefill_gets_the_same_bits_wherever_it_is_cut(
    dtype: torch.dtype, heads: int, head_dim: int, window: int | None
) -> None:
    shape = {"heads": heads, "kv_heads": 3, "head_dim": head_dim, "block_size": 16}
    whole = Case((150,), (150,), **shape, window=window).build(dtype)
    out = attend("cpp", whole)
    for cut in (1, 31, 32, 63, 64, 65, 149):
        assert torch.equal(attend("cpp", part(whole, 0, cut)), out[:cut])
        assert torch.equal(attend("cpp", part(whole, cut, 150)), out[cut:])
    for position in (0, 63, 64, 149):
        assert torch.equal(attend("cpp", part(whole, position, position + 1)), out[position : position + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 8, 100])
@pytest.mark.parametrize("bent", [False, True], ids=["plain", "capped-alibi"])
def test_a_prefill_with_spans_gets_the_same_bits_wherever_it_may_be_cut(
    dtype: torch.dtype, window: int | None, bent: bool
) -> None:
    whole = Case(
        (230,),
        (230,),
        heads=9,
        kv_heads=3,
        head_dim=64,
        block_size=16,
        window=window,
        softcap=2.0 if bent else None,
        alibi=bent,
        spans=(((33, 130), (130, 190)),),
    ).build(dtype)
    out = attend("cpp", whole)
    for cut in (1, 32, 33, 130, 190, 191, 229):
        assert torch.equal(attend("cpp", part(whole, 0, cut)), out[:cut])
        assert torch.equal(attend("cpp", part(whole, cut, 230)), out[cut:])
    for start in (
        34,
        95,
        129,
        131,
        189,
        229,
    ):  # of a step's tokens the last ones alone, as the last layer computes them
        assert torch.equal(attend("cpp", part(whole, start, 230)), out[start:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_span_changes_nothing_for_the_tokens_outside_of_it(implementation: str) -> None:
    shape = {"heads": 9, "kv_heads": 3, "head_dim": 64, "block_size": 16, "window": 20}
    outside = torch.ones(150, dtype=torch.bool)
    outside[40:110] = False
    with_span = attend(implementation, Case((150,), (150,), **shape, spans=(((40, 110),),)).build(torch.float32))
    without = attend(implementation, Case((150,), (150,), **shape).build(torch.float32))
    torch.testing.assert_close(with_span[outside], without[outside], rtol=0, atol=1e-6)
    assert not (with_span[~outside] - without[~outside]).abs().amax(dim=(1, 2)).lt(1e-3).any()


@pytest.mark.parametrize("span", [(0, 3), (4, 8), (5, 5), (-1, 8), (2, 9)])
def test_a_span_that_is_not_its_tokens_or_not_present_is_refused(span: tuple[int, int]) -> None:
    require_cpp()
    batch = Case((8,), (8,), heads=2, kv_heads=1, head_dim=16, block_size=4, spans=(((3, 8),),)).build(torch.float32)
    assert batch.spans is not None
    batch.spans[3] = torch.tensor(span)
    with pytest.raises(RuntimeError, match="a span must hold its token"):
        attend("cpp", batch)


def test_a_softcap_of_nothing_is_refused() -> None:
    batch = CASES[0].build(torch.float32)
    require_cpp()
    with pytest.raises(RuntimeError, match="softcap must be positive"):
        cpu.paged_attention(*batch.tensors, scale=batch.scale, softcap=0.0)


def test_the_number_of_threads_changes_no_bit() -> None:
    batch = CASES[0].build(torch.bfloat16)
    alone = attend("cpp", batch)
    torch.set_num_threads(4)
    assert torch.equal(attend("cpp", batch), alone)


def test_a_key_that_dominates_by_far_neither_overflows_nor_vanishes() -> None:
    batch = Case((200,), (1,), heads=2, kv_heads=1, head_dim=16, block_size=16).build(torch.float32)
    block, offset = int(batch.block_tables[0, 150 // 16]), 150 % 16
    batch.key_cache[block, 0, offset] = batch.query[0, 0] * 1000
    for implementation in IMPLEMENTATIONS:
        out = attend(implementation, batch)
        torch.testing.assert_close(out[0, 0], batch.value_cache[block, 0, offset], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("block", "message"), [(-1, "does not have"), (10_000, "does not have")], ids=["negative", "past the cache"]
)
def test_a_block_that_the_cache_does_not_have_is_refused(block: int, message: str) -> None:
    batch = CASES[0].build(torch.float32)
    batch.block_tables[2, 1] = block
    with pytest.raises(RuntimeError, match=message):
        attend("cpp", batch)


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_that_sees_nothing_is_refused(window: int) -> None:
    batch = CASES[0].build(torch.float32)
    require_cpp()
    with pytest.raises(RuntimeError, match="at least 1"):
        cpu.paged_attention(*batch.tensors, scale=batch.scale, window=window)


def test_dispatch_takes_the_cpp_operator_for_its_dtypes_and_torch_for_others() -> None:
    for dtype, implementation in ((torch.float32, "cpp"), (torch.bfloat16, "cpp"), (torch.float16, "torch")):
        batch = CASES[0].build(dtype)
        out = dispatch.paged_attention(*batch.tensors, **batch.options, max_query_len=133)
        assert torch.equal(out, attend(implementation, batch))


def test_padded_scores_are_kept_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = CASES[0].build(torch.float32)
    whole = attend("torch", batch)
    monkeypatch.setattr(torch_batched, "SCORES_BUDGET", 9 * 2 * 200)
    groups = torch_batched._groups(batch.kv_lengths.tolist(), batch.query_start.diff().tolist(), 9)
    assert sorted(map(len, groups)) == [1, 1, 1, 1, 2]
    torch.testing.assert_close(attend("torch", batch), whole, rtol=0, atol=1e-6)
