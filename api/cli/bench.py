"""`vlm-serve bench`: load on a server over HTTP, as its users see it: time to first token, time between tokens.

Every prompt and every image is different, so that nothing is found in a cache, and every answer has the same
length. Images are made before the clock starts.
"""

import argparse
import asyncio
import io
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, pairwise
from pathlib import Path

import httpx
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from api.cli.files import data_url
from api.cli.own_server import connect, served_models
from vlm_serve import __version__
from vlm_serve.errors import InvalidRequestError, ServiceError
from vlm_serve.types import ImagePart, JsonObject

QUESTION = "Study number {number}. Describe the findings of this study in complete sentences, then give an impression."


@dataclass(frozen=True, slots=True)
class Timing:
    """One request: seconds from its start to the first token, between all later ones, and to the end."""

    ttft: float
    inter_token: tuple[float, ...]
    total: float
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class RunResult:
    """One workload at one concurrency; `seconds` is the whole run's wall time."""

    workload: str
    concurrency: int
    seconds: float
    timings: tuple[Timing, ...]

    @property
    def tokens_per_second(self) -> float:
        return sum(timing.completion_tokens for timing in self.timings) / self.seconds

    def summary(self) -> JsonObject:
        first = [timing.ttft for timing in self.timings]
        between = [gap for timing in self.timings for gap in timing.inter_token] or [0.0]
        return {
            "workload": self.workload,
            "concurrency": self.concurrency,
            "requests": len(self.timings),
            "seconds": self.seconds,
            "output_tokens_per_second": self.tokens_per_second,
            "ttft_mean": statistics.fmean(first),
            "ttft_p50": float(np.quantile(first, 0.5)),
            "ttft_p99": float(np.quantile(first, 0.99)),
            "itl_p50": float(np.quantile(between, 0.5)),
            "itl_p99": float(np.quantile(between, 0.99)),
        }


def bench(arguments: argparse.Namespace) -> int:
    try:
        levels = tuple(int(level) for level in arguments.concurrency.split(","))
    except ValueError:
        levels = ()
    if not levels or min(levels) < 1:
        raise InvalidRequestError("--concurrency takes numbers with commas between them: 1,8,32.")
    console = Console(highlight=False)
    results, model = asyncio.run(_bench(arguments, levels, console))
    _print_table(results, console)
    if arguments.out is not None:
        _write(arguments.out, results, model, arguments.max_tokens)
    return 0


async def _bench(
    arguments: argparse.Namespace, levels: tuple[int, ...], console: Console
) -> tuple[list[RunResult], JsonObject]:
    results = []
    async with connect(arguments, console) as client:
        model = (await served_models(client))[0]
        load = _Load(client, model["id"], arguments.max_tokens)
        workloads = ("text", "image") if model["max_tokens_per_image"] else ("text",)
        with Progress(console=console, transient=True) as progress:
            for workload in workloads:
                await load.run(workload, 1, 1, lambda: None)  # kernels are built and memory is touched
                for level in levels:
                    requests = arguments.requests or 4 * level
                    task = progress.add_task(f"{workload}, {level} at once", total=requests)
                    results.append(await load.run(workload, level, requests, partial(progress.advance, task)))
    return results, model


class _Load:
    """Sends requests of one shape to one server."""

    def __init__(self, client: httpx.AsyncClient, model: str, max_tokens: int) -> None:
        self._client = client
        self._model = model
        self._max_tokens = max_tokens
        self._numbers = count(time.time_ns() // 1_000_000)

    async def run(self, workload: str, concurrency: int, requests: int, on_done: Callable[[], object]) -> RunResult:
        contents = [self._content(workload) for _ in range(requests)]
        waiting = iter(contents)
        timings: list[Timing] = []

        async def worker() -> None:
            for content in waiting:
                timings.append(await self._one(content))
                on_done()

        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())
        return RunResult(workload, concurrency, time.perf_counter() - start, tuple(timings))

    def _content(self, workload: str) -> list[JsonObject]:
        number = next(self._numbers)
        text = {"type": "text", "text": QUESTION.format(number=number)}
        if workload == "text":
            return [text]
        return [{"type": "image_url", "image_url": {"url": _generated_image(number)}}, text]

    async def _one(self, content: list[JsonObject]) -> Timing:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        times: list[float] = []
        usage: JsonObject | None = None
        start = time.perf_counter()
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                raise ServiceError(f"The server refused a request: {response.json()['error']['message']}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise ServiceError(f"A request failed: {chunk['error']['message']}")
                usage = chunk.get("usage", usage)
                if any(choice["delta"].get("content") for choice in chunk["choices"]):
                    times.append(time.perf_counter() - start)
        total = time.perf_counter() - start
        assert usage is not None
        gaps = tuple(later - earlier for earlier, later in pairwise(times))
        return Timing(times[0] if times else total, gaps, total, usage["prompt_tokens"], usage["completion_tokens"])


def _generated_image(number: int) -> str:
    """A smooth 512×512 picture, another for each number."""
    ramp = np.linspace(0, 4 * np.pi, 512) + number
    pixels = (127.5 * (1 + np.outer(np.sin(ramp), np.cos(ramp)))).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return data_url(ImagePart(buffer.getvalue(), "image/png"))


def _print_table(results: list[RunResult], console: Console) -> None:
    table = Table("workload", *("at once", "output tok/s", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99"))
    for result in results:
        row = result.summary()
        times = (f"{row[name] * 1000:.0f} ms" for name in ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99"))
        table.add_row(result.workload, str(result.concurrency), f"{result.tokens_per_second:.1f}", *times)
    console.print(table)


def _write(path: Path, results: list[RunResult], model: JsonObject, max_tokens: int) -> None:
    content = {
        "vlm_serve": __version__,
        "machine": {"processor": processor(), "system": platform.platform()},
        "model": {name: model[name] for name in ("id", "digest", "max_model_len")},
        "max_tokens": max_tokens,
        "summary": [result.summary() for result in results],
        "runs": [asdict(result) for result in results],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def processor() -> str:
    """Its name as the kernel gives it, and how many of them this process may use."""
    names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} in use"
