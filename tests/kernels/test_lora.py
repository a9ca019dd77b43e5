import pytest
import torch

from vlm_serve.kernels import dispatch


def test_each_token_gets_its_own_adapters_update_and_no_other() -> None:
    x, before = torch.randn(7, 6), torch.randn(7, 5)
    adapters = {0: (torch.randn(2, 6), torch.randn(5, 2)), 1: (torch.randn(4, 6), torch.randn(5, 4))}
    adapter_of = [0, None, 1, 0, 1, None, 1]
    segments = [
        (torch.tensor([token for token, its in enumerate(adapter_of) if its == adapter]), a, b)
        for adapter, (a, b) in adapters.items()
    ]
    out = before.clone()
    dispatch.apply_lora(out, x, segments)
    for token, adapter in enumerate(adapter_of):
        if adapter is None:
            assert torch.equal(out[token], before[token])
        else:
            a, b = adapters[adapter]
            torch.testing.assert_close(out[token], before[token] + b @ (a @ x[token]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_of_zeros_changes_nothing(dtype: torch.dtype) -> None:
    x, before = torch.randn(3, 6).to(dtype), torch.randn(3, 5).to(dtype)
    out = before.clone()
    a, b = torch.randn(2, 6).to(dtype), torch.zeros(5, 2).to(dtype)
    dispatch.apply_lora(out, x, [(torch.tensor([0, 2]), a, b)])
    assert torch.equal(out, before)
