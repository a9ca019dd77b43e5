"""The linear layer: stacked parts, adapters by token, and shares of tensor-parallel ranks that add up."""

import pytest
import torch
import torch.nn.functional as F

from vlm_serve.layers.context import AdapterSegment
from vlm_serve.layers.linear import Linear
from vlm_serve.layers.parallel import TensorParallel

PARTS = {"q_proj": 12, "k_proj": 4, "v_proj": 8}
IN = 16


def filled(parts=PARTS, *, bias=True, split="column", parallel=None) -> tuple[Linear, dict[str, torch.Tensor]]:
    """A layer loaded part by part as the checkpoint loader does, and the whole matrices."""
    generator = torch.Generator().manual_seed(0)
    linear = Linear(IN, parts, bias=bias, split=split, parallel=parallel or TensorParallel())
    whole = {}
    for name, width in parts.items():
        for kind, shape in (("weight", (width, IN)), ("bias", (width,))):
            if kind == "bias" and not bias:
                continue
            whole[f"{name}.{kind}"] = torch.randn(shape, generator=generator)
            linear.target(name, kind).copy_(linear.share_of(whole[f"{name}.{kind}"], kind))
    linear.pack()
    return linear, whole


def test_stacked_parts_equal_each_alone():
    linear, whole = filled()
    x = torch.randn(5, IN)
    alone = [F.linear(x, whole[f"{name}.weight"], whole[f"{name}.bias"]) for name in PARTS]
    torch.testing.assert_close(linear(x), torch.cat(alone, -1))


def test_each_token_gets_its_own_adapter_on_the_parts_that_it_changes():
    linear, _ = filled()
    x = torch.randn(6, IN)
    base = linear(x)
    pairs = {slot: (torch.randn(rank, IN), torch.randn(8, rank)) for slot, rank in ((0, 2), (3, 5))}
    for slot, pair in pairs.items():
        linear.set_adapter(slot, {"v_proj": pair})
    expected = base.clone()
    for slot, tokens in ((0, [0, 4]), (3, [1])):
        a, b = pairs[slot]
        expected[tokens, 16:] += x[tokens] @ a.T @ b.T
    segments = (AdapterSegment(0, torch.tensor([0, 4])), AdapterSegment(3, torch.tensor([1])))
    torch.testing.assert_close(linear(x, segments), expected)


def test_an_adapter_on_several_parts_keeps_them_apart():
    linear, _ = filled()
    x = torch.randn(3, IN)
    q, v = (torch.randn(2, IN), torch.randn(12, 2)), (torch.randn(4, IN), torch.randn(8, 4))
    linear.set_adapter(1, {"q_proj": q, "v_proj": v})
    expected = linear(x)
    expected[:, :12] += x @ q[0].T @ q[1].T
    expected[:, 16:] += x @ v[0].T @ v[1].T
    torch.testing.assert_close(linear(x, (AdapterSegment(1, torch.arange(3)),)), expected)


def test_an_adapter_that_left_its_slot_has_no_effect():
    linear, _ = filled()
    linear.set_adapter(0, {"q_proj": (torch.randn(2, IN), torch.randn(12, 2))})
    linear.set_adapter(0, {})
    x = torch.randn(3, IN)
    assert torch.equal(linear(x, (AdapterSegment(0, torch.arange(3)),)), linear(x))


@pytest.mark.parametrize("size", [2, 4])
def test_the_shares_of_a_column_split_lie_side_by_side(size):
    whole, _ = filled()
    x = torch.randn(5, IN)
    shares = [filled(parallel=TensorParallel(rank, size))[0](x) for rank in range(size)]
    for name, start in whole.offsets().items():
        pieces = [share[:, start // size : (start + PARTS[name]) // size] for share in shares]
        torch.testing.assert_close(torch.cat(pieces, -1), whole(x)[:, start : start + PARTS[name]])


@pytest.mark.parametrize("size", [2, 4])
def test_the_shares_of_a_row_split_sum_up_with_one_bias(size, monkeypatch):
    # The sum over ranks is done here, since all of them live in this process.
    monkeypatch.setattr(TensorParallel, "all_reduce", lambda self, partial: partial)
    whole, _ = filled(split="row")
    x = torch.randn(5, IN)
    total = sum(
        filled(split="row", parallel=TensorParallel(rank, size))[0](TensorParallel(rank, size).slice(x, 1))
        for rank in range(size)
    )
    torch.testing.assert_close(total, whole(x))
