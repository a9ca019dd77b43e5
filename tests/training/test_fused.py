"""The functions with a backward of their own give what autograd gives for the plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from vlm_serve.training.fused import FusedLoraLinear, causal_attention, token_loss

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
EXACT = {"rtol": 1e-12, "atol": 1e-12}
"""In float64, as the layers are compared."""


def lora(fused: bool, dropout: float = 0.0, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, bias=bias)).requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["0"], lora_dropout=dropout)
    if fused:
        config._register_custom_module({nn.Linear: FusedLoraLinear})
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return wrapped.double()


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(7)  # for dropout
    output = model(x)
    output.square().sum().backward()
    assert x.grad is not None
    return [output, x.grad, *[p.grad for p in model.parameters() if p.grad is not None]]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_fused_layer_is_pefts(dropout: float, bias: bool) -> None:
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = (gradients(lora(fused, dropout, bias), x) for fused in (True, False))
    assert len(ours) == len(theirs) == 4, "output, input, A and B: the base has no gradient"
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_the_fused_layer_without_its_adapter_is_the_base() -> None:
    model = lora(fused=True)
    x = torch.randn(3, 12, dtype=torch.float64)
    with model.disable_adapter():  # type: ignore[operator]
        torch.testing.assert_close(model(x), model.get_base_model()[0].base_layer(x))  # type: ignore[operator,index]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_attention_is_torchs(heads: int, kv_heads: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 7, 8, requires_grad=True) for n in (heads, kv_heads, kv_heads))
    ours, _ = causal_attention(nn.Module(), q, k, v, None, scaling=0.3)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    weight = torch.randn_like(ours)
    for one, other in zip(
        *(torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(one, other, **TOLERANCE)


@pytest.mark.parametrize("rows", [1, 128, 300])
def test_the_loss_is_torchs_whatever_the_count_of_rows(rows: int) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(rows, 16, requires_grad=True), torch.randn(50, 16)
    labels = torch.randint(0, 50, (rows,))
    ours, theirs = token_loss(hidden, head, labels), F.cross_entropy(hidden @ head.t(), labels, reduction="sum")
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    one, other = (torch.autograd.grad(loss / 3, hidden)[0] for loss in (ours, theirs))
    torch.testing.assert_close(one, other, **TOLERANCE)
