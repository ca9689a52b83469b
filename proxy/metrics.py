"""What the proxy measures, in Prometheus' format under the names that users of vLLM know.

`vllm:` metrics are counted here, per generation (each of n answers of each prompt is one), from what the client sees;
`baton:` ones are the engine's own counters and each worker's last reported load, read when scraped. One registry an
app, no global one. Knows no HTTP.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from proxy.failures import FAILURE_KINDS
from proxy.interface import Engine, WorkerStatus

# fmt: off
SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5,
           0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000)
# fmt: on
_LABEL = ("model_name",)


class Metrics:
    """The metrics of one app."""

    def __init__(self, engine: Engine, model_name: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._registry = CollectorRegistry()
        self._model = model_name
        self._gauges: dict[str, Gauge] = {}
        self.waiting = self._gauge("vllm:num_requests_waiting", "Generations without a first token.")
        self.running = self._gauge("vllm:num_requests_running", "Generations between first and last token.")
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of generations that began.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Generated tokens.")
        self.prefix_queries = self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up in prefix caches.")
        self.prefix_hits = self._counter("vllm:prefix_cache_hits", "Prompt tokens that nobody had to compute.")
        self.ttft = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", SECONDS)
        self.itl = self._histogram("vllm:inter_token_latency_seconds", "Between two arrivals of tokens.", SECONDS)
        self.tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time of a token after the first.", SECONDS
        )
        self.e2e = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", SECONDS)
        self.decode = self._histogram("vllm:request_decode_time_seconds", "First to last token.", SECONDS)
        self.prompt_length = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a generation.", TOKENS)
        self.answer_length = self._histogram("vllm:request_generation_tokens", "Generated tokens.", TOKENS)
        finished = Counter(
            "vllm:request_success", "Generations that ended.", (*_LABEL, "finished_reason"), registry=self._registry
        )
        self.finished = {reason: finished.labels(model_name, reason) for reason in ("stop", "length", "abort")}
        failed = Counter(
            "baton:request_failures", "HTTP requests that failed.", (*_LABEL, "kind"), registry=self._registry
        )
        self.failed = {kind: failed.labels(model_name, kind) for kind in FAILURE_KINDS}
        self._registry.register(_EngineCollector(engine, model_name))

    def exposition(self) -> bytes:
        """All metrics as text."""
        return generate_latest(self._registry)

    def track(self, prompt_tokens: int, arrived_s: float) -> Track:
        """Begin a generation of a request that arrived at `arrived_s` of this object's clock; close the result once."""
        return Track(self, prompt_tokens, arrived_s)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, _LABEL, registry=self._registry).labels(self._model)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, _LABEL, registry=self._registry).labels(self._model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, _LABEL, registry=self._registry, buckets=buckets).labels(self._model)


class Track:
    """The clock of one generation: waiting until its first tokens, running until it is closed."""

    def __init__(self, metrics: Metrics, prompt_tokens: int, arrived_s: float) -> None:
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._arrived_s = arrived_s
        self._first_s = 0.0
        self._last_s = 0.0
        self._num_tokens = 0
        metrics.waiting.inc()

    def tokens(self, num_tokens: int, cached_tokens: int) -> None:
        """New tokens have arrived; `cached_tokens` of the prompt nobody had to compute."""
        metrics, now_s = self._metrics, self._metrics.clock()
        if self._num_tokens:
            metrics.itl.observe(now_s - self._last_s)
        else:
            self._first_s = now_s
            metrics.waiting.dec()
            metrics.running.inc()
            metrics.ttft.observe(now_s - self._arrived_s)
            metrics.prompt_tokens.inc(self._prompt_tokens)
            metrics.prompt_length.observe(self._prompt_tokens)
            metrics.prefix_queries.inc(self._prompt_tokens)
            metrics.prefix_hits.inc(cached_tokens)
        self._last_s = now_s
        self._num_tokens += num_tokens
        metrics.generation_tokens.inc(num_tokens)

    def close(self, finish: str) -> None:
        """The generation is over: "stop", "length", or "" where it failed or was cancelled."""
        metrics = self._metrics
        (metrics.running if self._num_tokens else metrics.waiting).dec()
        metrics.finished[finish or "abort"].inc()
        if not finish or not self._num_tokens:
            return
        metrics.e2e.observe(self._last_s - self._arrived_s)
        metrics.decode.observe(self._last_s - self._first_s)
        metrics.answer_length.observe(self._num_tokens)
        if self._num_tokens > 1:
            metrics.tpot.observe((self._last_s - self._first_s) / (self._num_tokens - 1))


class _EngineCollector(Collector):
    """The engine's counters and its workers' loads at the time of a scrape."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine = engine
        self._model = model_name
        self._preemptions = _Total()

    def describe(self) -> Iterable[Metric]:
        return ()  # names depend on the engine; said here so that registering does not collect

    def collect(self) -> Iterable[Metric]:
        workers = self._engine.worker_loads()
        yield from self._vllm(workers)
        yield from _counters(self._engine.counters(), self._model)
        yield from _workers(workers)

    def _vllm(self, workers: list[WorkerStatus]) -> Iterable[Metric]:
        decode = [worker.load for worker in workers if worker.role == "decode"]
        total = sum(load.total_blocks for load in decode)
        used = total - sum(load.free_blocks for load in decode)
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Part of decode's KV in use, 0 to 1.", labels=_LABEL)
        usage.add_metric((self._model,), used / total if total else 0.0)
        yield usage
        self._preemptions.observe({worker.worker: worker.load.counters.get("preemptions", 0.0) for worker in workers})
        preemptions = CounterMetricFamily("vllm:num_preemptions", "Sequences that gave up their KV.", labels=_LABEL)
        preemptions.add_metric((self._model,), self._preemptions.value)
        yield preemptions


class _Total:
    """A sum over workers' counters that never falls when a worker leaves or starts anew."""

    def __init__(self) -> None:
        self.value = 0.0
        self._last: Mapping[str, float] = {}

    def observe(self, now: Mapping[str, float]) -> None:
        for worker, value in now.items():
            before = self._last.get(worker, 0.0)
            self.value += value - before if value >= before else value
        self._last = {**self._last, **now}


def _counters(counters: Mapping[str, float], model: str) -> Iterable[Metric]:
    for name, value in sorted(counters.items()):
        kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
        family = kind(f"baton:{_plain(name)}", "Counted by the proxy's engine.", labels=_LABEL)
        family.add_metric((model,), value)
        yield family


def _workers(workers: list[WorkerStatus]) -> Iterable[Metric]:
    up = GaugeMetricFamily("baton:worker_up", "A registered worker, by state.", labels=("worker", "role", "state"))
    for worker in workers:
        up.add_metric((worker.worker, worker.role, worker.state), 1.0)
    yield up
    for name in ("running", "waiting", "waiting_tokens", "free_blocks", "total_blocks"):
        gauge = GaugeMetricFamily(f"baton:worker_{name}", "As the worker last reported.", labels=("worker", "role"))
        for worker in workers:
            gauge.add_metric((worker.worker, worker.role), getattr(worker.load, name))
        yield gauge
    names = sorted({_plain(name) for worker in workers for name in worker.load.counters})
    for name in ["steps", *(name for name in names if name != "steps")]:
        yield _worker_counter(name, workers)


def _worker_counter(name: str, workers: list[WorkerStatus]) -> Metric:
    family = CounterMetricFamily(f"baton:worker_{name}", "As the worker last reported.", labels=("worker", "role"))
    for worker in workers:
        values = {_plain(key): value for key, value in worker.load.counters.items()} | {"steps": worker.load.steps}
        if name in values:
            family.add_metric((worker.worker, worker.role), values[name])
    return family


def _plain(name: str) -> str:
    """`name` as a part of a metric's name; `_total` is added by the format."""
    return re.sub(r"[^a-zA-Z0-9_]", "_", name).removesuffix("_total")
