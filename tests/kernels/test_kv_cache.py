import pytest
import torch

from tests.kernels.cases import require_cpp
from vlm_serve.kernels.kv_cache import cpu, reference

IMPLEMENTATIONS = {"cpp": cpu.write_kv_cache, "torch": reference.write_kv_cache}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    if request.param == "cpp":
        require_cpp()
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_token_lands_in_its_slot_and_nothing_else_changes(implementation: str, dtype: torch.dtype) -> None:
    # Keys and values as the layer has them: strided slices of stacked projections.
    stacked = torch.randn(5, 4, 8).to(dtype)
    key, value = stacked[:, :2], stacked[:, 2:]
    key_cache, value_cache = torch.full((2, 4, 2, 3, 8), torch.nan, dtype=dtype)
    slots = torch.tensor([3, -1, 11, 0, 7])
    IMPLEMENTATIONS[implementation](key, value, key_cache, value_cache, slots)
    for rows, cache in ((key, key_cache), (value, value_cache)):
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                assert torch.equal(cache[slot // 3, :, slot % 3], rows[token])
        assert int(cache.isnan().all(dim=-1).sum()) == (4 * 3 - 4) * 2


def test_a_step_without_tokens_writes_nothing(implementation: str) -> None:
    empty, caches = torch.empty(0, 2, 8), torch.zeros(2, 4, 2, 3, 8)
    IMPLEMENTATIONS[implementation](empty, empty, *caches, torch.empty(0, dtype=torch.int64))
    assert not caches.any()


def test_many_tokens_are_written_by_many_threads(implementation: str) -> None:
    rows = torch.randn(2, 500, 3, 8)
    caches = torch.zeros(2, 40, 3, 16, 8)
    slots = torch.randperm(640)[:500]
    IMPLEMENTATIONS[implementation](*rows, *caches, slots)
    for cache, expected in zip(caches, rows, strict=True):
        assert torch.equal(cache.transpose(1, 2).flatten(0, 1)[slots], expected)


def test_a_slot_past_the_cache_is_refused_before_anything_is_written() -> None:
    require_cpp()
    rows, caches = torch.randn(2, 2, 2, 8), torch.zeros(2, 4, 2, 3, 8)
    with pytest.raises(RuntimeError, match="past the end"):
        cpu.write_kv_cache(*rows, *caches, torch.tensor([0, 12]))
    assert not caches.any()
