"""Compiles the Triton kernels for sm_90 (H100, H200) without a GPU and prints what came out as JSON.

A program of its own, because the tests' process must not decide whether triton interprets or compiles.
"""

import json
import os
import sys
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vlm_serve.kernels.attention.triton_kernel import paged_attention_kernel, tile_sizes
from vlm_serve.kernels.kv_cache.triton_kernel import write_kv_cache_kernel

TARGET = GPUTarget("cuda", 90, 32)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS: dict[str, dict[str, Any]] = {
    "decode": {"max_query_len": 1},
    "prefill": {"max_query_len": 512},
    "windowed": {"max_query_len": 512, "window": 4096},
    "all-options": {"max_query_len": 512, "window": 4096, "softcap": 50.0, "alibi": True, "spans": True},
}
ATTENTION = [
    *(("bf16", head_dim, kind) for head_dim in (64, 80, 128, 256) for kind in ("decode", "prefill")),
    *(("bf16", 128, kind) for kind in ("windowed", "all-options")),
    *(("fp16", 256, kind) for kind in ("decode", "prefill")),  # bfloat16's code but for the type of its elements
    *(("fp32", head_dim, "prefill") for head_dim in (64, 256)),  # its tiles are those of a decode
    ("fp32", 128, "all-options"),
]
"""Element type, head dimension and kind. A compilation takes a second of a CPU."""


def compile_kernel(kernel, tensors: dict[str, str], constants: dict[str, object]) -> dict[str, int]:
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


def compile_attention(
    name: str,
    head_dim: int,
    max_query_len: int,
    window: int | None = None,
    softcap: float | None = None,
    alibi: bool = False,
    spans: bool = False,
) -> dict[str, int]:
    tensors = dict.fromkeys(("out_ptr", "query_ptr", "key_cache_ptr", "value_cache_ptr"), name)
    tensors |= dict.fromkeys(("block_tables_ptr", "kv_lengths_ptr", "query_start_ptr"), "i32")
    constants: dict[str, object] = {}
    constants |= tile_sizes(4, head_dim, 16, max_query_len, DTYPES[name], window, softcap)
    for pointer, element, is_there in (("alibi_slopes_ptr", "fp32", alibi), ("spans_ptr", "i32", spans)):
        if is_there:
            tensors = tensors | {pointer: element}
        else:
            constants[pointer] = None
    return compile_kernel(paged_attention_kernel, tensors, constants)


def main() -> None:
    built = {
        f"attention-{name}-D{head_dim}-{kind}": compile_attention(name, head_dim, **KINDS[kind])
        for name, head_dim, kind in ATTENTION
    }
    for name in DTYPES:
        tensors = dict.fromkeys(("key_ptr", "value_ptr", "key_cache_ptr", "value_cache_ptr"), name)
        tensors |= {"slot_mapping_ptr": "i64"}
        sizes = {"HEAD_DIM": 80, "KV_HEADS": 8, "BLOCK_SIZE": 16, "PADDED": 1024}
        built[f"kv_cache-{name}"] = compile_kernel(write_kv_cache_kernel, tensors, sizes)
    json.dump(built, sys.stdout)


if __name__ == "__main__":
    main()
