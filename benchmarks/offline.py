"""The engine beside transformers' `generate`, in one run on one model: for `docs/performance.md`.

Both get the same prompts and the same images' embeddings, all requests at once, greedy, a fixed number of
tokens each. Prints a table with ratios and writes the raw result.

    python -m benchmarks.offline --out benchmarks/results/offline-cpu.json
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from vlm_serve.clinical.image import ClinicalImage, ImageReceipt
from vlm_serve.config import EngineConfig, ModelConfig
from vlm_serve.engine.engine import Engine
from vlm_serve.families import load_family, resolve_model
from vlm_serve.families.base import Prompt
from vlm_serve.types import ChatInput, ChatMessage, ImagePart, Request, SamplingParams, TextPart

WORDS = ("lung", "heart", "rib", "left", "right", "clear", "small", "opacity", "no", "new", "seen", "margin")


def make_prompts(family: Any, count: int, *, with_image: bool, seed: int = 0, words: int = 180) -> list[Prompt]:
    """Prompts of about 230 tokens that share nothing but the template."""
    rng = np.random.default_rng(seed)
    prompts = []
    for _ in range(count):
        text = " ".join(rng.choice(WORDS, words - (60 if with_image else 0)))
        parts: list[TextPart | ImagePart] = [TextPart(text)]
        images = []
        if with_image:
            pixels = rng.integers(0, 256, (512, 512, 3), dtype=np.uint8)
            images = [family.process_image(ClinicalImage(pixels, ImageReceipt("image/png", "", "", 512, 512, "-")))]
            parts.insert(0, ImagePart(b"-", "image/png"))
        prompts.append(family.render_chat(ChatInput((ChatMessage("user", tuple(parts)),)), images))
    return prompts


def run_engine(engine: Engine, prompts: list[Prompt], output: int) -> dict[str, float]:
    began = time.perf_counter()
    first: dict[str, float] = {}
    tokens = 0
    for index, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=output, temperature=0, ignore_eos=True)
        engine.add(Request(str(index), prompt.token_ids, sampling, prompt.images))
    while engine.has_work:
        for one in engine.step().outputs:
            assert one.error is None, one.error
            first.setdefault(one.request_id, time.perf_counter() - began)
            tokens += len(one.token_ids)
    return {"seconds": time.perf_counter() - began, "tokens": tokens, "ttft_p50": statistics.median(first.values())}


@torch.inference_mode()
def run_transformers(model: Any, engine: Engine, prompts: list[Prompt], output: int) -> dict[str, float]:
    """`generate` on the left-padded batch; images' embeddings come from the same tower, in one batch."""
    began = time.perf_counter()
    embed = model.get_input_embeddings()
    longest = max(len(prompt.token_ids) for prompt in prompts)
    batch = torch.zeros(len(prompts), longest, embed.weight.shape[1], dtype=model.dtype, device=model.device)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long, device=model.device)
    encoded: Iterator[torch.Tensor] = iter(
        engine.runner.model.encode_images([span.inputs for prompt in prompts for span in prompt.images])
    )
    for row, prompt in enumerate(prompts):
        ids = torch.tensor(prompt.token_ids, device=model.device)
        spans = [(span.offset, span.end) for span in prompt.images]
        for start, end in spans:
            ids[start:end] = 0
        embeddings = embed(ids).clone()
        for start, end in spans:
            embeddings[start:end] = next(encoded)
        batch[row, longest - len(ids) :] = embeddings
        mask[row, longest - len(ids) :] = 1
    first: list[float] = []

    def note_first(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        if not first:
            first.append(time.perf_counter() - began)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    made = model.generate(
        inputs_embeds=batch,
        attention_mask=mask,
        max_new_tokens=output,
        min_new_tokens=output,
        do_sample=False,
        stopping_criteria=[note_first],
    )
    return {"seconds": time.perf_counter() - began, "tokens": made.shape[0] * output, "ttft_p50": first[0]}


def where_a_step_goes(engine: Engine, prompts: list[Prompt], steps: int = 10) -> dict[str, float]:
    """Shares of a decode step with all prompts at once, by kind of operation, of the CPU's own time."""
    for index, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
        engine.add(Request(f"profile-{index}", prompt.token_ids, sampling, prompt.images))
    while any(sequence.remaining > 1 for sequence in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
    began = time.perf_counter()
    for _ in range(steps):
        engine.step()
    milliseconds = (time.perf_counter() - began) / steps * 1000
    on_gpu = engine.runner.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            engine.step()
    for index in range(len(prompts)):
        engine.abort(f"profile-{index}")
    kinds = {"linear": ("linear", "panel", "mm", "gemm"), "attention": ("paged_attention",), "norm": ("rms_norm",)}
    kinds["cache write"] = ("write_kv",)
    shares: dict[str, float] = {}
    for event in profiler.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        name = next((kind for kind, words in kinds.items() if any(word in event.key for word in words)), "the rest")
        shares[name] = shares.get(name, 0.0) + own
    total = sum(shares.values())
    return {"step_ms": milliseconds} | {name: share / total for name, share in shares.items()}


def load_reference(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The embedded model's decoder as transformers' own."""
    from transformers import LlamaConfig, LlamaForCausalLM  # once vlm_serve has made torchvision importable

    config = LlamaConfig(**json.loads((folder / "config.json").read_text())["text_config"])
    model = LlamaForCausalLM(config)
    weights = load_file(folder / "model.safetensors")
    missing, _ = model.load_state_dict(
        {name: tensor for name, tensor in weights.items() if name.startswith(("model.", "lm_head."))}, strict=False
    )
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model.to(device, dtype).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=int, default=64, help="tokens a request")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=2, help="the best of this many counts")
    parser.add_argument("--out", type=Path, help="where the raw result goes, as JSON")
    arguments = parser.parse_args()

    folder = resolve_model("demo")
    family = load_family(folder)
    engine = Engine.build(family, ModelConfig("demo", dtype=arguments.dtype), EngineConfig(enable_prefix_caching=False))
    runner = engine.runner
    reference = load_reference(folder, runner.dtype, runner.device)
    rows = []
    for kind in ("text", "one image"):
        for concurrency in arguments.concurrency:
            ours, theirs = [], []
            for repeat in range(arguments.repeats):  # taking turns, so that both see the same machine
                # New pictures each time: the embedding cache must not spare us what transformers has to compute.
                prompts = make_prompts(family, concurrency, with_image=kind != "text", seed=100 * concurrency + repeat)
                ours.append(run_engine(engine, prompts, arguments.output))
                theirs.append(run_transformers(reference, engine, prompts, arguments.output))
            assert engine.stats.mm_cache_hits == engine.stats.prefix_cache_hits == 0
            mine, other = (min(runs, key=lambda run: run["seconds"]) for runs in (ours, theirs))
            row = {
                "kind": kind,
                "concurrency": concurrency,
                "prompt_tokens": statistics.mean(len(prompt.token_ids) for prompt in prompts),
                "engine": mine,
                "transformers": other,
                "throughput_ratio": mine["tokens"] / mine["seconds"] / (other["tokens"] / other["seconds"]),
                "ttft_ratio": mine["ttft_p50"] / other["ttft_p50"],
            }
            rows.append(row)
            print(
                f"{kind:>9} x {concurrency:<3} {mine['tokens'] / mine['seconds']:7.1f} tok/s "
                f"({row['throughput_ratio']:.2f} x transformers' {other['tokens'] / other['seconds']:.1f})   "
                f"TTFT p50 {mine['ttft_p50']:.2f} s ({other['ttft_p50']:.2f} s)",
                flush=True,
            )
    steps = {
        str(concurrency): where_a_step_goes(engine, make_prompts(family, concurrency, with_image=False))
        for concurrency in arguments.concurrency
    }
    for concurrency, shares in steps.items():
        parts = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if name != "step_ms")
        print(f"a decode step of {concurrency}: {shares['step_ms']:.1f} ms: {parts}")
    if arguments.out:
        result = {
            "what": "benchmarks/offline.py",
            "model": "demo",
            "dtype": str(runner.dtype),
            "device": torch.cuda.get_device_name() if runner.device.type == "cuda" else platform.processor(),
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "transformers": version("transformers")},
            "rows": rows,
            "decode_step": steps,
        }
        arguments.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
