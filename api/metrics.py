"""Prometheus metrics under vLLM's names with the prefix `vlm_serve:`, for the dashboards that read them.

The engine's own figures are read when they are scraped; those of requests are counted as they end. A
registry belongs to one app. Labels are bounded: the model, its adapters, and the finish reasons.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vlm_serve.types import EngineStats, FinishReason

FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10)
REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 240, 480)
LENGTH_BUCKETS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class EngineCollector(Collector):
    """Reads the engine's figures at each scrape."""

    def __init__(self, stats: Callable[[], EngineStats], model_name: str) -> None:
        self._stats = stats
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        usage = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        gauges = {
            "num_requests_running": ("Requests that the engine is working on.", stats.num_requests_running),
            "num_requests_waiting": ("Requests that wait for room.", stats.num_requests_waiting),
            "kv_cache_usage_perc": ("Blocks of the KV cache in use, as a fraction of 1.", usage),
        }
        counters = {
            "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", stats.prefix_cache_queries),
            "prefix_cache_hits": ("Prompt tokens found there.", stats.prefix_cache_hits),
            "mm_cache_queries": ("Images looked up in the encoder cache.", stats.mm_cache_queries),
            "mm_cache_hits": ("Images found there.", stats.mm_cache_hits),
            "num_preemptions": ("Times that a request gave up its blocks and began again.", stats.num_preemptions),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"vlm_serve:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(f"vlm_serve:{name}", text, labels=["model_name"])
            counter.add_metric([self._model_name], value)
            yield counter


class Metrics:
    """The figures of one app. `model_name` is the base model; `adapter` is empty for the base itself."""

    def __init__(self, stats: Callable[[], EngineStats], model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self.registry.register(EngineCollector(stats, model_name))
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that were let in.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._success = self._counter("request_success", "Requests that ended well.", "finished_reason")
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From the request's arrival to its first token.", FIRST_TOKEN_BUCKETS
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of an answer.", TOKEN_BUCKETS
        )
        self._end_to_end = self._histogram(
            "e2e_request_latency_seconds", "From the request's arrival to its last token.", REQUEST_BUCKETS
        )
        self._prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", LENGTH_BUCKETS)
        self._answer_length = self._histogram(
            "request_generation_tokens", "Tokens generated for a request.", LENGTH_BUCKETS
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"vlm_serve:{name}", text, ["model_name", "adapter", *labels], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vlm_serve:{name}", text, ["model_name", "adapter"], buckets=buckets, registry=self.registry)

    def admitted(self, adapter: str, prompt_tokens: int) -> None:
        self._prompt_tokens.labels(self._model_name, adapter).inc(prompt_tokens)
        self._prompt_length.labels(self._model_name, adapter).observe(prompt_tokens)

    def first_tokens(self, adapter: str, seconds: float, count: int) -> None:
        """The first step's `count` tokens came `seconds` after the request."""
        self._first_token.labels(self._model_name, adapter).observe(seconds)
        self._generation_tokens.labels(self._model_name, adapter).inc(count)

    def next_tokens(self, adapter: str, seconds: float, count: int) -> None:
        """A later step's `count` tokens came `seconds` after those before."""
        latency = self._inter_token.labels(self._model_name, adapter)
        for _ in range(count):
            latency.observe(seconds / count)
        self._generation_tokens.labels(self._model_name, adapter).inc(count)

    def finished(self, adapter: str, reason: FinishReason, seconds: float, completion_tokens: int) -> None:
        self._success.labels(self._model_name, adapter, reason.value).inc()
        self._end_to_end.labels(self._model_name, adapter).observe(seconds)
        self._answer_length.labels(self._model_name, adapter).observe(completion_tokens)

    def exposition(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)
