"""Attention on this CPU: the C++ operator beside batched torch and the reference, in one run.

    python benchmarks/kernels.py --threads 1 --out benchmarks/results/kernels.json

Prints milliseconds for all layers of one step of SmolLM2-135M's shape and the ratios to the C++ operator.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from vlm_serve.kernels import cpp_library
from vlm_serve.kernels.attention import cpu, reference, torch_batched

IMPLEMENTATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "cpp": cpu.paged_attention,
    "torch_batched": torch_batched.paged_attention,
    "reference": reference.paged_attention,
}
LAYERS, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 30, 9, 3, 64, 16


@dataclass(frozen=True)
class Step:
    """`sequences` of `context` keys each, of which the last `granted` are this step's."""

    name: str
    sequences: int
    context: int
    granted: int


STEPS = [
    Step("decode, batch 1", 1, 512, 1),
    Step("decode, batch 8", 8, 512, 1),
    Step("decode, batch 32", 32, 512, 1),
    Step("prefill of 512", 1, 512, 512),
    Step("last 512 of 4096", 1, 4096, 512),
]


def layer_inputs(step: Step, dtype: torch.dtype) -> list[torch.Tensor]:
    """One layer's arguments, with every block at a random place in the cache."""
    per_sequence = -(-step.context // BLOCK_SIZE)
    blocks = step.sequences * per_sequence
    shape = (blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    return [
        torch.randn(step.sequences * step.granted, HEADS, HEAD_DIM).to(dtype),
        torch.randn(shape).to(dtype),
        torch.randn(shape).to(dtype),
        torch.randperm(blocks).int().view(step.sequences, per_sequence),
        torch.full((step.sequences,), step.context, dtype=torch.int32),
        torch.arange(0, step.sequences * step.granted + 1, step.granted, dtype=torch.int32),
    ]


def milliseconds(attend: Callable[..., torch.Tensor], layers: list[list[torch.Tensor]], repeats: int) -> float:
    """The median time of all layers, each with a cache of its own, so that memory is read as in a step."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for tensors in layers:
            attend(*tensors, scale=HEAD_DIM**-0.5)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if not cpp_library.load():
        raise SystemExit("The C++ kernels could not be built; see the warning above.")

    rows = []
    print(f"{arguments.dtype}, {arguments.threads} threads, ms for {LAYERS} layers (times the C++ operator's)")
    for step in STEPS:
        layers = [layer_inputs(step, getattr(torch, arguments.dtype)) for _ in range(LAYERS)]
        times = {name: milliseconds(attend, layers, arguments.repeats) for name, attend in IMPLEMENTATIONS.items()}
        rows.append({"step": step.name} | times)
        shown = "  ".join(f"{name} {value:8.1f} ({value / times['cpp']:5.1f}x)" for name, value in times.items())
        print(f"{step.name:18}{shown}", flush=True)
    if arguments.out:
        figures = {"dtype": arguments.dtype, "threads": arguments.threads, "torch": torch.__version__, "rows": rows}
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
