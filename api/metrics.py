"""Prometheus metrics under vLLM's names with the prefix `vlm_serve:`, for the dashboards that read them.

The engine's own figures are read when they are scraped; those of requests are counted as they end. A
registry belongs to one app. Labels are bounded: the model, its adapters, tenants of the file of keys, finish reasons.
"""

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vlm_serve.serving.run import TokenDelta
from vlm_serve.types import EngineStats, FinishReason, StepOutput

FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10)
REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 240, 480)
LENGTH_BUCKETS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
COUNT_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)

MAX_TENANTS = 32
"""With a label of their own; those further down in the file of keys share `other`."""


class EngineCollector(Collector):
    """Reads the engine's figures at each scrape."""

    def __init__(self, stats: Callable[[], EngineStats], restarts: Callable[[], int], model_name: str) -> None:
        self._stats = stats
        self._restarts = restarts
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        usage = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        places = stats.kv_tokens_allocated
        waste = (places - stats.kv_tokens_live) / places if places else 0.0
        gauges = {
            "num_requests_running": ("Requests that the engine is working on.", stats.num_requests_running),
            "num_requests_waiting": ("Requests that wait for room.", stats.num_requests_waiting),
            "kv_cache_usage_perc": ("Blocks of the KV cache in use, as a fraction of 1.", usage),
            "kv_waste_ratio": ("Places in blocks in use that hold no token, as a fraction of 1.", waste),
        }
        counters = {
            "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", stats.prefix_cache_queries),
            "prefix_cache_hits": ("Prompt tokens found there.", stats.prefix_cache_hits),
            "mm_cache_queries": ("Images looked up in the encoder cache.", stats.mm_cache_queries),
            "mm_cache_hits": ("Images found there.", stats.mm_cache_hits),
            "num_preemptions": ("Times that a request gave up its blocks and began again.", stats.num_preemptions),
            "spec_decode_num_draft_tokens": ("Tokens guessed by look-up.", stats.spec_draft_tokens),
            "spec_decode_num_accepted_tokens": ("Guessed tokens that the model drew.", stats.spec_accepted_tokens),
            "engine_restarts": ("Times that the engine's process died and was started again.", self._restarts()),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"vlm_serve:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(f"vlm_serve:{name}", text, labels=["model_name"])
            counter.add_metric([self._model_name], value)
            yield counter


class AdapterCollector(Collector):
    """`lora_requests_info`: which adapters have requests now, waiting for their first token or past it, and how many
    may be on the device at once.
    """

    def __init__(self, slots: int) -> None:
        self.running: Tally[str] = Tally()
        self.waiting: Tally[str] = Tally()
        self._slots = slots

    def collect(self) -> Iterator[Metric]:
        labels = ["running_lora_adapters", "waiting_lora_adapters", "max_lora"]
        gauge = GaugeMetricFamily(
            "vlm_serve:lora_requests_info", "Adapters in use; the value is the time.", labels=labels
        )
        names = [",".join(sorted(+tally)) for tally in (self.running, self.waiting)]
        gauge.add_metric([*names, str(self._slots)], time.time())
        yield gauge


class Metrics:
    """The figures of one app.

    Args:
        stats: the engine's.
        restarts: of its process.
        model_name: the base model's.
        adapter_slots: how many adapters are on the device at once.
        tenants: those of the file of keys, in its order.
    """

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        restarts: Callable[[], int],
        model_name: str,
        adapter_slots: int,
        tenants: Sequence[str] = (),
    ) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._tenants = frozenset(tenants[:MAX_TENANTS])
        self.adapters = AdapterCollector(adapter_slots)
        self.registry.register(EngineCollector(stats, restarts, model_name))
        self.registry.register(self.adapters)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that were let in.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.success = self._counter("request_success", "Answers that ended well.", "finished_reason")
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From the request's arrival to its first token.", FIRST_TOKEN_BUCKETS
        )
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of an answer.", TOKEN_BUCKETS
        )
        self.per_token = self._histogram(
            "request_time_per_output_token_seconds", "The same, averaged over an answer.", TOKEN_BUCKETS
        )
        self.end_to_end = self._histogram(
            "e2e_request_latency_seconds", "From the request's arrival to an answer's end.", REQUEST_BUCKETS
        )
        self.queue = self._histogram(
            "request_queue_time_seconds", "From the engine's admission to the first step.", REQUEST_BUCKETS
        )
        self.prefill = self._histogram(
            "request_prefill_time_seconds", "From the first step to the first token.", REQUEST_BUCKETS
        )
        self.decode = self._histogram(
            "request_decode_time_seconds", "From an answer's first token to its last.", REQUEST_BUCKETS
        )
        self.prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", LENGTH_BUCKETS)
        self.answer_length = self._histogram("request_generation_tokens", "Tokens of an answer.", LENGTH_BUCKETS)
        self._step_tokens = self._engine_histogram("iteration_tokens_total", "Tokens of a step.", LENGTH_BUCKETS)
        self._step_images = self._engine_histogram("encoder_batch_images", "Images encoded in a step.", COUNT_BUCKETS)
        self._step_encoding = self._engine_histogram("encoder_seconds", "Encoding of a step's images.", TOKEN_BUCKETS)
        self._image_decode = self._engine_histogram(
            "image_decode_seconds", "Decoding of an image's file, in a worker.", FIRST_TOKEN_BUCKETS
        )
        self._image_preprocess = self._engine_histogram(
            "image_preprocess_seconds", "Processing of an image's pixels for the model.", TOKEN_BUCKETS
        )
        self._adapter_load = self._engine_histogram(
            "adapter_load_seconds", "Reading and checking the adapters, by an engine that starts.", REQUEST_BUCKETS
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        names = ["model_name", "adapter", "tenant", *labels]
        return Counter(f"vlm_serve:{name}", text, names, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        names = ["model_name", "adapter", "tenant"]
        return Histogram(f"vlm_serve:{name}", text, names, buckets=buckets, registry=self.registry)

    def _engine_histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        full = Histogram(f"vlm_serve:{name}", text, ["model_name"], buckets=buckets, registry=self.registry)
        return full.labels(self._model_name)

    def step(self, output: StepOutput) -> None:
        """One step of the engine."""
        if output.num_tokens:
            self._step_tokens.observe(output.num_tokens)
        if output.images_encoded:
            self._step_images.observe(output.images_encoded)
            self._step_encoding.observe(output.encoder_seconds)

    def image(self, decode_seconds: float, preprocess_seconds: float) -> None:
        """One image on its way in; from any thread."""
        self._image_decode.observe(decode_seconds)
        self._image_preprocess.observe(preprocess_seconds)

    def adapters_loaded(self, seconds: float) -> None:
        """An engine process has read its adapters."""
        self._adapter_load.observe(seconds)

    def request(self, adapter: str, tenant: str) -> "RequestFigures":
        """What one request adds; `adapter` is empty for the base model itself."""
        shown = tenant if not tenant or tenant in self._tenants else "other"
        return RequestFigures(self, (self._model_name, adapter, shown))

    def exposition(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)


class RequestFigures:
    """One request's part in the figures, from its admission to its close."""

    def __init__(self, metrics: Metrics, labels: tuple[str, str, str]) -> None:
        self._metrics = metrics
        self._labels = labels
        self._adapter = labels[1]
        self._place: Tally[str] | None = None
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._tokens: Tally[int] = Tally()
        self._ended: set[int] = set()

    def admitted(self, prompt_tokens: int) -> None:
        self._metrics.prompt_tokens.labels(*self._labels).inc(prompt_tokens)
        self._metrics.prompt_length.labels(*self._labels).observe(prompt_tokens)
        self._move(self._metrics.adapters.waiting)

    def add(self, delta: TokenDelta, now: float) -> None:
        """A step's tokens of one answer came `now` seconds after the request."""
        metrics, labels, index, count = self._metrics, self._labels, delta.index, len(delta.token_ids)
        if delta.starts_over:
            self._last.clear()
            self._tokens.clear()
        if count:
            if not self._first:
                metrics.first_token.labels(*labels).observe(now)
                self._move(metrics.adapters.running)
            if index in self._last:
                latency = metrics.inter_token.labels(*labels)
                for _ in range(count):
                    latency.observe((now - self._last[index]) / count)
            self._first.setdefault(index, now)
            self._last[index] = now
            self._tokens[index] += count
            metrics.generation_tokens.labels(*labels).inc(count)
        if index == 0 and delta.queue_seconds is not None:
            metrics.queue.labels(*labels).observe(delta.queue_seconds)
        if index == 0 and delta.prefill_seconds is not None:
            metrics.prefill.labels(*labels).observe(delta.prefill_seconds)
        if delta.finish_reason is not None and index not in self._ended:
            self._finished(index, delta.finish_reason.value, now)

    def _finished(self, index: int, reason: str, now: float) -> None:
        self._ended.add(index)
        metrics, labels, tokens = self._metrics, self._labels, self._tokens[index]
        metrics.success.labels(*labels, reason).inc()
        metrics.end_to_end.labels(*labels).observe(now)
        metrics.answer_length.labels(*labels).observe(tokens)
        decoding = now - self._first.get(index, now)
        metrics.decode.labels(*labels).observe(decoding)
        if tokens > 1:
            metrics.per_token.labels(*labels).observe(decoding / (tokens - 1))

    def embedded(self, prompt_tokens: int, now: float) -> None:
        """The prompt's embedding came `now` seconds after the request: there are no tokens to measure."""
        self.admitted(prompt_tokens)
        self._metrics.success.labels(*self._labels, FinishReason.STOP.value).inc()
        self._metrics.end_to_end.labels(*self._labels).observe(now)
        self.close()

    def close(self) -> None:
        """The request has ended, however it did."""
        self._move(None)

    def _move(self, place: "Tally[str] | None") -> None:
        """Among the adapters that wait, or those that run."""
        if self._adapter:
            if self._place is not None:
                self._place[self._adapter] -= 1
            if place is not None:
                place[self._adapter] += 1
        self._place = place
