"""Runs the Triton kernels in the interpreter and prints each case's largest deviation as JSON.

A program of its own: `TRITON_INTERPRET` must be set before triton is first imported, and would change it for
every other test of the process. The interpreter's bfloat16 is wrong, so float32 and float16 stand for it.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from tests.kernels.cases import SMALL_CASES
from vlm_serve.kernels.attention import reference, triton_kernel
from vlm_serve.kernels.kv_cache import reference as kv_cache_reference
from vlm_serve.kernels.kv_cache import triton_kernel as kv_cache_triton


def attention_deviations() -> dict[str, float]:
    found = {}
    for case in SMALL_CASES:
        for dtype in (torch.float32, torch.float16):
            batch = case.build(dtype)
            out = triton_kernel.paged_attention(*batch.tensors, **batch.options, max_query_len=max(case.granted))
            expected = reference.paged_attention(*batch.tensors, **batch.options)
            # Of the whole output: padding must come back as the reference's zeros.
            found[f"{case.name}-{dtype}"] = (out - expected).abs().max().item()
    return found


def cache_mismatches() -> dict[str, int]:
    found = {}
    for dtype in (torch.float32, torch.float16):
        stacked = torch.randn(5, 6, 8).to(dtype)
        slots = torch.tensor([3, -1, 11, 0, 7])
        written, expected = torch.zeros(2, 2, 4, 3, 3, 8, dtype=dtype)
        kv_cache_triton.write_kv_cache(stacked[:, :3], stacked[:, 3:], *written, slots)
        kv_cache_reference.write_kv_cache(stacked[:, :3], stacked[:, 3:], *expected, slots)
        found[str(dtype)] = int((written != expected).sum())
    return found


if __name__ == "__main__":
    json.dump({"attention": attention_deviations(), "kv_cache": cache_mismatches()}, sys.stdout)
