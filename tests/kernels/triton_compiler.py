"""Compiles the Triton kernels for sm_90 (H100, H200) without a GPU and prints what came out as JSON.

A program of its own, because the tests' process must not decide whether triton interprets or compiles.
"""

import json
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vlm_serve.kernels.attention.triton_kernel import paged_attention_kernel, tile_sizes
from vlm_serve.kernels.kv_cache.triton_kernel import write_kv_cache_kernel

TARGET = GPUTarget("cuda", 90, 32)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEAD_DIMS = (64, 80, 128, 256)
WINDOWED_HEAD_DIM = 128


def compile_kernel(kernel, tensors: dict[str, str], constants: dict[str, int]) -> dict[str, int]:
    """`tensors` gives the element type of each pointer; other arguments are int32, a scale is float32."""
    types = {
        name: f"*{tensors[name]}" if name in tensors else "fp32" if "scale" in name else "i32"
        for name in kernel.arg_names
    }
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in tensors}
    source = ASTSource(kernel, signature=types, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=TARGET, options={"num_warps": 4, "num_stages": 2})
    return {"cubin": len(compiled.asm["cubin"]), "shared_memory": compiled.metadata.shared}


def main() -> None:
    built = {}
    for name, dtype in DTYPES.items():
        tensors = dict.fromkeys(("out_ptr", "query_ptr", "key_cache_ptr", "value_cache_ptr"), name)
        tensors |= dict.fromkeys(("block_tables_ptr", "kv_lengths_ptr", "query_start_ptr"), "i32")
        for head_dim in HEAD_DIMS:
            kinds = [("decode", 1, None), ("prefill", 512, None)]
            if head_dim == WINDOWED_HEAD_DIM:
                kinds += [("windowed", 512, 4096)]
            for kind, max_query_len, window in kinds:
                sizes = tile_sizes(4, head_dim, 16, max_query_len, dtype, window)
                built[f"attention-{name}-D{head_dim}-{kind}"] = compile_kernel(paged_attention_kernel, tensors, sizes)
        tensors = dict.fromkeys(("key_ptr", "value_ptr", "key_cache_ptr", "value_cache_ptr"), name)
        tensors |= {"slot_mapping_ptr": "i64"}
        sizes = {"HEAD_DIM": 80, "KV_HEADS": 8, "BLOCK_SIZE": 16, "PADDED": 1024}
        built[f"kv_cache-{name}"] = compile_kernel(write_kv_cache_kernel, tensors, sizes)
    json.dump(built, sys.stdout)


if __name__ == "__main__":
    main()
