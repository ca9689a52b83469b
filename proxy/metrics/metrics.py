"""What the proxy measures, in Prometheus' format under the names that users of vLLM know.

`vllm:` metrics are counted here, per generation (each of n answers of each prompt is one), from what the client sees;
`baton:` ones are stages of its timeline, and what `collector` reads of engine and workers when scraped; `gen_ai_`
ones are the few that OpenTelemetry's GenAI conventions name for a server. Two registries an app, no global one: what
this proxy counts, and what workers and stores report to it. Knows no HTTP.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from baton.proxy.formats.tables import FORMATS
from baton.proxy.http.connections import REFUSALS
from baton.proxy.http.failures import FAILURE_KINDS
from baton.proxy.interface import Engine
from baton.proxy.metrics.adapters import AdapterCollector, NamedUsage
from baton.proxy.metrics.collector import EngineCollector, MovedBytes, ReportCollector, TenantCollector
from baton.proxy.metrics.counters import PROMPT_SOURCES
from baton.proxy.metrics.record import GenerationRecord
from baton.proxy.metrics.timeline import FIRST_TOKEN, USUAL, Segment
from baton.proxy.tenants.tenants import Tenant

# fmt: off
SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5,
           0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
COARSE_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 40.0, 160.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000)
# fmt: on
OPERATIONS = ("chat", "text_completion")
PROVIDER = "baton"
_LABEL = ("model_name",)
_GEN_AI = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
_BEFORE_SCHEDULED = ("queue", "prefill_queue")
_PREFILL = ("tier_load", "prefill")
Family = TypeVar("Family", Counter, Gauge, Histogram)


class _Families:
    """The metric families of one registry, made when they are first asked for, so that models share them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._made: dict[str, Counter | Gauge | Histogram] = {}

    def gauge(self, name: str, text: str, labels: Sequence[str] = _LABEL) -> Gauge:
        return self._get(name, lambda: Gauge(name, text, labels, registry=self.registry))

    def counter(self, name: str, text: str, labels: Sequence[str] = _LABEL) -> Counter:
        return self._get(name, lambda: Counter(name, text, labels, registry=self.registry))

    def histogram(
        self, name: str, text: str, labels: Sequence[str] = _LABEL, buckets: tuple[float, ...] = SECONDS
    ) -> Histogram:
        return self._get(name, lambda: Histogram(name, text, labels, registry=self.registry, buckets=buckets))

    def _get(self, name: str, make: Callable[[], Family]) -> Family:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]  # type: ignore[return-value]  # a name has one kind


class ProxyMetrics:
    """The metrics of one app: those of each of its models, and what belongs to none."""

    def __init__(
        self,
        engine: Engine,
        models: Sequence[str],
        clock: Callable[[], float] = time.perf_counter,
        tenants: Iterable[Tenant] = (),
        adapters: Iterable[NamedUsage] = (),
    ) -> None:
        """`tenants`: those that have counters of their own; `adapters` by name."""
        self.clock = clock
        self._families = _Families()
        self._moved = MovedBytes()
        self._models = {name: ModelMetrics(name, self._families, self._moved, clock) for name in models}
        family = self._families.counter("baton:request_failures", "HTTP requests that failed.", (*_LABEL, "kind"))
        self.failed = {kind: family.labels(",".join(models), kind) for kind in FAILURE_KINDS}
        refused = self._families.counter(
            "baton:http_refusals", "Connections, and requests before their route, that were refused.", ("reason",)
        )
        self.refused = {reason: refused.labels(reason) for reason in REFUSALS}
        self._families.registry.register(EngineCollector(engine, models, self._moved))
        self._families.registry.register(TenantCollector(tenants))
        self._families.registry.register(AdapterCollector(engine, adapters))
        self._reports = CollectorRegistry()
        self._reports.register(ReportCollector(engine, models))

    def of(self, model: str) -> ModelMetrics:
        return self._models[model]

    def exposition(self) -> bytes:
        """All metrics as text, at once. (Not as OpenMetrics, in which prometheus-client writes vllm: as vllm_.)"""
        return b"".join((*self.own(), *self.reported()))

    def own(self) -> Iterator[bytes]:
        """What this proxy has counted, a metric family at a time: all take 10 ms."""
        return _texts(self._families.registry)

    def reported(self) -> Iterator[bytes]:
        """What workers and stores have reported: another proxy that they serve shows the same."""
        return _texts(self._reports)


@dataclass(frozen=True, slots=True)
class _Family(Collector):
    """One metric family that was collected."""

    metric: Metric

    def collect(self) -> Iterable[Metric]:
        return (self.metric,)


def _texts(registry: CollectorRegistry) -> Iterator[bytes]:
    return (generate_latest(_Family(metric)) for metric in registry.collect())


@dataclass(frozen=True, slots=True)
class _PromptMetrics:
    """Of the prompts of generations that began."""

    tokens: Counter
    queries: Counter
    hits: Counter
    length: Histogram

    @classmethod
    def make(cls, families: _Families, model: str) -> _PromptMetrics:
        return cls(
            families.counter("vllm:prompt_tokens", "Prompt tokens of generations that began.").labels(model),
            families.counter("vllm:prefix_cache_queries", "Prompt tokens looked up in prefix caches.").labels(model),
            families.counter("vllm:prefix_cache_hits", "Prompt tokens that a prefix cache had.").labels(model),
            families.histogram("vllm:request_prompt_tokens", "Prompt tokens of a generation.", buckets=TOKENS).labels(
                model
            ),
        )


@dataclass(frozen=True, slots=True)
class _Latencies:
    """Of generations; those until the first token are observed when it was written, the others at the end."""

    ttft: Histogram
    tpot: Histogram
    e2e: Histogram
    queue: Histogram
    prefill: Histogram
    decode: Histogram
    inference: Histogram
    transfer: Histogram

    @classmethod
    def make(cls, families: _Families, model: str) -> _Latencies:
        texts = {
            "vllm:time_to_first_token_seconds": "First byte of the request to the first answer written.",
            "vllm:request_time_per_output_token_seconds": "Mean time of a token after the first.",
            "vllm:e2e_request_latency_seconds": "First byte to the end of the answer.",
            "vllm:request_queue_time_seconds": "Waiting for a worker, and in the worker that prefills.",
            "vllm:request_prefill_time_seconds": "First step with the prompt, or loading its KV, to first token.",
            "vllm:request_decode_time_seconds": "First to last token.",
            "vllm:request_inference_time_seconds": "Prefill and decode together.",
            "baton:transfer_seconds": "A whole transfer of KV, from the first offer to the acknowledgement.",
        }
        return cls(*(families.histogram(name, text).labels(model) for name, text in texts.items()))


@dataclass(frozen=True, slots=True)
class _GenAi:
    """By operation. Source: OpenTelemetry's semantic conventions for GenAI metrics, "model server metrics"."""

    duration: Mapping[str, Histogram]
    ttft: Mapping[str, Histogram]
    tpot: Mapping[str, Histogram]

    @classmethod
    def make(cls, families: _Families, model: str) -> _GenAi:
        def by_operation(name: str, text: str) -> Mapping[str, Histogram]:
            family = families.histogram(f"gen_ai_server_{name}_seconds", text, _GEN_AI, COARSE_SECONDS)
            return {operation: family.labels(operation, PROVIDER, model) for operation in OPERATIONS}

        return cls(
            by_operation("request_duration", "As vllm:e2e_request_latency_seconds."),
            by_operation("time_to_first_token", "As vllm:time_to_first_token_seconds."),
            by_operation("time_per_output_token", "As vllm:request_time_per_output_token_seconds."),
        )


class ModelMetrics:
    """What is measured of the generations of one model."""

    def __init__(self, model: str, families: _Families, moved: MovedBytes, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.waiting = families.gauge("vllm:num_requests_waiting", "Generations without a first token.").labels(model)
        self.running = families.gauge("vllm:num_requests_running", "Generations between first and last token.").labels(
            model
        )
        self.generation_tokens = families.counter("vllm:generation_tokens", "Generated tokens.").labels(model)
        self.itl = families.histogram(
            "vllm:inter_token_latency_seconds", "Time between two arrivals of tokens."
        ).labels(model)
        broken = families.counter(
            "baton:tool_calls_broken",
            "Calls that the model did not write as its format demands, and those of functions that were not declared.",
            (*_LABEL, "format"),
        )
        self.broken_calls = {name: broken.labels(model, name) for name in FORMATS}
        self._prompts = _PromptMetrics.make(families, model)
        self._latencies = _Latencies.make(families, model)
        self._gen_ai = _GenAi.make(families, model)
        self._answer_length = families.histogram(
            "vllm:request_generation_tokens", "Generated tokens.", buckets=TOKENS
        ).labels(model)
        by_source = families.histogram(
            "baton:ttft_by_source_seconds",
            "TTFT by where most of the prompt's KV came from.",
            (*_LABEL, "source"),
            COARSE_SECONDS,
        )
        self._ttft_by_source = {source: by_source.labels(model, source) for source in PROMPT_SOURCES}
        finished = families.counter("vllm:request_success", "Generations that ended.", (*_LABEL, "finished_reason"))
        self._finished = {reason: finished.labels(model, reason) for reason in ("stop", "length", "abort", "error")}
        stages = families.histogram(
            "baton:request_stage_seconds",
            "Time of a request in a stage of its timeline; the stages until a token sum to the time until that token.",
            (*_LABEL, "until", "stage"),
            COARSE_SECONDS,
        )
        self._stage = functools.cache(lambda until, stage: stages.labels(model, until, stage))
        for until, usual in USUAL.items():
            for stage in usual:  # there from the start
                self._stage(until, stage)
        self._moved = moved

    def begun(self, prompt_tokens: int, cached_tokens: int) -> None:
        """The first tokens of a generation have come; a cache had `cached_tokens` of its prompt."""
        self.waiting.dec()
        self.running.inc()
        self._prompts.tokens.inc(prompt_tokens)
        self._prompts.length.observe(prompt_tokens)
        self._prompts.queries.inc(prompt_tokens)
        self._prompts.hits.inc(cached_tokens)

    def segments_of(self, operation: str) -> Callable[[Segment], None]:
        """Observes the segments of one generation's timeline, as they end."""
        return functools.partial(self._observe_segment, self._gen_ai.ttft[operation])

    def ended(self, record: GenerationRecord, *, first_at: float, last_at: float) -> None:
        """A generation is over; its tokens arrived between these moments of `clock`."""
        latencies = self._latencies
        finished = record.outcome in ("stop", "length")
        reason = record.outcome if finished else "abort" if record.outcome == "cancelled" else "error"
        self._finished[reason].inc()
        for attempt in record.attempts:
            if attempt.handed_over:
                latencies.transfer.observe(attempt.transfer_s)
                self._moved.add(attempt.prefill, attempt.decode, attempt.sent_bytes)
        first = record.segment(FIRST_TOKEN)
        if first is None or not finished:
            return
        decode_s, followers = last_at - first_at, record.generated_tokens - 1
        operation = record.info.operation
        by_source = record.tokens_by_source()
        self._ttft_by_source[max(by_source, key=by_source.__getitem__)].observe(first.total_s)
        latencies.e2e.observe(record.total_s)
        self._gen_ai.duration[operation].observe(record.total_s)
        latencies.decode.observe(decode_s)
        latencies.inference.observe(first.seconds(*_PREFILL) + decode_s)
        self._answer_length.observe(record.generated_tokens)
        if followers > 0:
            latencies.tpot.observe(decode_s / followers)
            self._gen_ai.tpot[operation].observe(decode_s / followers)

    def _observe_segment(self, gen_ai_ttft: Histogram, segment: Segment) -> None:
        if not segment.complete:
            return
        for stage, took_s in segment.stages:
            self._stage(segment.until, stage).observe(took_s)
        if segment.until == FIRST_TOKEN:
            self._latencies.ttft.observe(segment.total_s)
            gen_ai_ttft.observe(segment.total_s)
            self._latencies.queue.observe(segment.seconds(*_BEFORE_SCHEDULED))
            self._latencies.prefill.observe(segment.seconds(*_PREFILL))
