import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.cases import SMALL_CASES, names

pytest.importorskip("triton")

SHARED_MEMORY = 227 * 1024
"""Bytes that a block may have on sm_90."""

DTYPES = ("bf16", "fp16", "fp32")


def output_of(program: str, cache: Path) -> Any:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)]),
        "TRITON_CACHE_DIR": str(cache),
        "OMP_NUM_THREADS": "1",
    }
    ended = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{program}"], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return output_of("triton_interpreter", tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return output_of("triton_compiler", tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.float16"])
@pytest.mark.parametrize("case", names(SMALL_CASES))
def test_interpreted_attention_agrees_with_the_reference(interpreted: Any, case: str, dtype: str) -> None:
    # In float16 two units of the last place between 2 and 4: weights are rounded before they meet the values.
    assert interpreted["attention"][f"{case}-{dtype}"] <= (5e-6 if dtype == "torch.float32" else 2**-8)


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.float16"])
def test_the_interpreted_cache_write_is_exact(interpreted: Any, dtype: str) -> None:
    assert interpreted["kv_cache"][dtype] == 0


def test_attention_compiles_for_sm_90_within_its_shared_memory(compiled: Any) -> None:
    """Of every element type and head dimension, for decodes and prefills, with each option."""
    built = {name: sizes for name, sizes in compiled.items() if name.startswith("attention-")}
    kinds = itertools.product((64, 80, 128, 256), ("decode", "prefill"))
    assert built.keys() >= {f"attention-bf16-D{head_dim}-{kind}" for head_dim, kind in kinds}
    assert {name.split("-")[1] for name in built} == set(DTYPES)
    assert all(sizes["cubin"] > 0 for sizes in built.values())
    assert {name: sizes for name, sizes in built.items() if sizes["shared_memory"] > SHARED_MEMORY} == {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cache_write_compiles_for_sm_90(compiled: Any, dtype: str) -> None:
    assert compiled[f"kv_cache-{dtype}"]["cubin"] > 0
