import pytest
import torch
import torch.nn.functional as F

from tests.kernels.cases import CASES, Case, names
from vlm_serve.kernels import dispatch
from vlm_serve.kernels.attention import reference
from vlm_serve.kernels.experts import reference as experts_reference
from vlm_serve.kernels.kv_cache import reference as kv_cache_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Triton 3.9 says once how it will treat fused multiplications from 3.10 on.
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]

# The kernel rounds the softmax's weights to the dtype before they meet the values: a unit or two of the last place.
TOLERANCE = {torch.float32: (0.0, 5e-6), torch.float16: (2**-9, 1e-3), torch.bfloat16: (2**-6, 8e-3)}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=names(CASES))
def test_attention_on_a_gpu_agrees_with_the_reference(case: Case, dtype: torch.dtype) -> None:
    batch = case.build(dtype)
    expected = reference.paged_attention(*batch.tensors, **batch.options)
    on_gpu = batch.to("cuda")
    out = dispatch.paged_attention(*on_gpu.tensors, **batch.options, max_query_len=max(case.granted)).cpu()
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(out, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attention_over_a_long_context_agrees_with_the_reference(dtype: torch.dtype) -> None:
    batch = Case((4096, 3000, 17), (512, 1, 17), heads=28, kv_heads=4, head_dim=128, block_size=16).build(dtype)
    expected = reference.paged_attention(*batch.tensors, **batch.options)
    on_gpu = batch.to("cuda")
    out = dispatch.paged_attention(*on_gpu.tensors, **batch.options, max_query_len=512).cpu()
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(out, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_cache_write_on_a_gpu_is_exact(dtype: torch.dtype) -> None:
    stacked = torch.randn(200, 6, 80, device="cuda").to(dtype)
    slots = torch.randperm(640, device="cuda")[:200]
    slots[::7] = -1
    written, expected = torch.zeros(2, 2, 40, 3, 16, 80, dtype=dtype, device="cuda")
    dispatch.write_kv_cache(stacked[:, :3], stacked[:, 3:], *written, slots)
    kv_cache_reference.write_kv_cache(stacked[:, :3], stacked[:, 3:], *expected, slots)
    assert torch.equal(written, expected)


def test_a_decode_step_is_captured_in_a_cuda_graph_and_follows_its_inputs() -> None:
    case = Case((100, 40, 0), (1, 1, 0), heads=9, kv_heads=3, head_dim=64, block_size=16, padding=6)
    batch = case.build(torch.bfloat16).to("cuda")

    def attend() -> torch.Tensor:
        return dispatch.paged_attention(*batch.tensors, **batch.options, max_query_len=1)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    batch.kv_lengths[0] = 70
    graph.replay()
    torch.testing.assert_close(out, attend(), rtol=0, atol=0)


def test_experts_are_grouped_on_a_gpu_and_agree_with_the_reference() -> None:
    hidden, inner, experts, each = 64, 32, 8, 2
    x = torch.randn(33, hidden, device="cuda").bfloat16()
    gate_up = torch.randn(experts, 2 * inner, hidden, device="cuda").bfloat16() / 8
    down = torch.randn(experts, hidden, inner, device="cuda").bfloat16() / 6
    weights, index = torch.rand(33, experts, device="cuda").topk(each)
    together = dispatch.group_experts(*([dispatch.pack_linear(w) for w in all_] for all_ in (gate_up, down)))
    assert together is not None
    expected = experts_reference.experts(x, index, weights, gate_up, down, F.silu)
    torch.testing.assert_close(together(x, index, weights), expected, rtol=2**-6, atol=2**-5)
