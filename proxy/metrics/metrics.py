"""What the proxy measures, in Prometheus' format under the names that users of vLLM know.

`vllm:` metrics are counted here, per generation (each of n answers of each prompt is one), from what the client sees;
`baton:` ones are stages of its timeline, and what `proxy.collector` reads of engine and workers when scraped; `gen_ai_`
ones are the few that OpenTelemetry's GenAI conventions name for a server. One registry an app, no global one. Knows no
HTTP.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from baton.proxy.http.failures import FAILURE_KINDS
from baton.proxy.interface import Engine
from baton.proxy.metrics.collector import EngineCollector, MovedBytes
from baton.proxy.metrics.counters import PROMPT_SOURCES
from baton.proxy.metrics.record import GenerationRecord
from baton.proxy.metrics.timeline import FIRST_TOKEN, USUAL, Segment

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


class ProxyMetrics:
    """The metrics of one app."""

    def __init__(self, engine: Engine, model_name: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._registry = CollectorRegistry()
        self._model = model_name
        self.waiting = self._gauge("vllm:num_requests_waiting", "Generations without a first token.")
        self.running = self._gauge("vllm:num_requests_running", "Generations between first and last token.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Generated tokens.")
        self.itl = self._histogram("vllm:inter_token_latency_seconds", "Between two arrivals of tokens.", SECONDS)
        self._add_prompt_metrics()
        self._add_latencies()
        self._add_stages()
        self._add_gen_ai()
        reasons = ("stop", "length", "abort", "error")
        self._finished = self._counters("vllm:request_success", "Generations that ended.", "finished_reason", reasons)
        self.failed = self._counters("baton:request_failures", "HTTP requests that failed.", "kind", FAILURE_KINDS)
        self._moved = MovedBytes()
        self._registry.register(EngineCollector(engine, model_name, self._moved))

    def exposition(self) -> bytes:
        """All metrics as text. (Not as OpenMetrics, in which prometheus-client writes vllm: as vllm_.)"""
        return generate_latest(self._registry)

    # -- told by a generation

    def begun(self, prompt_tokens: int, cached_tokens: int) -> None:
        """The first tokens of a generation have come; `cached_tokens` of its prompt nobody had to compute."""
        self.waiting.dec()
        self.running.inc()
        self._prompt_tokens.inc(prompt_tokens)
        self._prompt_length.observe(prompt_tokens)
        self._prefix_queries.inc(prompt_tokens)
        self._prefix_hits.inc(cached_tokens)

    def segments_of(self, operation: str) -> Callable[[Segment], None]:
        """Takes in the segments of one generation's timeline, as they end."""
        return functools.partial(self._observe_segment, self._gen_ai_ttft[operation])

    def ended(self, record: GenerationRecord, *, first_at: float, last_at: float) -> None:
        """A generation is over; its tokens arrived between these moments of `clock`."""
        finished = record.outcome in ("stop", "length")
        reason = record.outcome if finished else "abort" if record.outcome == "cancelled" else "error"
        self._finished[reason].inc()
        for attempt in record.attempts:
            if attempt.handed_over:
                self._transfer.observe(attempt.transfer_s)
                self._moved.add(attempt.prefill, attempt.decode, attempt.sent_bytes)
        first = record.segment(FIRST_TOKEN)
        if first is None or not finished:
            return
        decode_s, followers = last_at - first_at, record.generated_tokens - 1
        operation = record.info.operation
        by_source = record.tokens_by_source()
        self._ttft_by_source[max(by_source, key=by_source.__getitem__)].observe(first.total_s)
        self._e2e.observe(record.total_s)
        self._gen_ai_duration[operation].observe(record.total_s)
        self._decode.observe(decode_s)
        self._inference.observe(first.seconds(*_PREFILL) + decode_s)
        self._answer_length.observe(record.generated_tokens)
        if followers > 0:
            self._tpot.observe(decode_s / followers)
            self._gen_ai_tpot[operation].observe(decode_s / followers)

    def _observe_segment(self, gen_ai_ttft: Histogram, segment: Segment) -> None:
        if not segment.complete:
            return
        for stage, took_s in segment.stages:
            self._stage(segment.until, stage).observe(took_s)
        if segment.until == FIRST_TOKEN:
            self._ttft.observe(segment.total_s)
            gen_ai_ttft.observe(segment.total_s)
            self._queue.observe(segment.seconds(*_BEFORE_SCHEDULED))
            self._prefill.observe(segment.seconds(*_PREFILL))

    # -- making them

    def _add_prompt_metrics(self) -> None:
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of generations that began.")
        self._prefix_queries = self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up in prefix caches.")
        self._prefix_hits = self._counter("vllm:prefix_cache_hits", "Prompt tokens that nobody had to compute.")
        self._prompt_length = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a generation.", TOKENS)
        self._answer_length = self._histogram("vllm:request_generation_tokens", "Generated tokens.", TOKENS)
        self._ttft_by_source = self._histograms(
            "baton:ttft_by_source_seconds", "TTFT by where most of the prompt's KV came from.", "source", PROMPT_SOURCES
        )

    def _add_latencies(self) -> None:
        self._ttft = self._histogram(
            "vllm:time_to_first_token_seconds", "First byte of the request to the first answer written.", SECONDS
        )
        self._tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time of a token after the first.", SECONDS
        )
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "First byte to the end of the answer.", SECONDS)
        self._queue = self._histogram(
            "vllm:request_queue_time_seconds", "Waiting for a worker, and in the worker that prefills.", SECONDS
        )
        self._prefill = self._histogram(
            "vllm:request_prefill_time_seconds",
            "First step with the prompt, or loading its KV, to first token.",
            SECONDS,
        )
        self._decode = self._histogram("vllm:request_decode_time_seconds", "First to last token.", SECONDS)
        self._inference = self._histogram(
            "vllm:request_inference_time_seconds", "Prefill and decode together.", SECONDS
        )
        self._transfer = self._histogram(
            "baton:transfer_seconds", "A whole transfer of KV, from the first offer to the acknowledgement.", SECONDS
        )

    def _add_stages(self) -> None:
        """One histogram for all stages; the usual ones of each segment exist from the start."""
        self._stages = Histogram(
            "baton:request_stage_seconds",
            "Time of a request in a stage of its timeline; the stages until a token sum to the time until that token.",
            (*_LABEL, "until", "stage"),
            registry=self._registry,
            buckets=COARSE_SECONDS,
        )
        self._stage = functools.cache(lambda until, stage: self._stages.labels(self._model, until, stage))
        for until, stages in USUAL.items():
            for stage in stages:
                self._stage(until, stage)

    def _add_gen_ai(self) -> None:
        """Source: OpenTelemetry's semantic conventions for GenAI metrics, "model server metrics"."""
        self._gen_ai_duration = self._gen_ai("request_duration", "As vllm:e2e_request_latency_seconds.")
        self._gen_ai_ttft = self._gen_ai("time_to_first_token", "As vllm:time_to_first_token_seconds.")
        self._gen_ai_tpot = self._gen_ai("time_per_output_token", "As vllm:request_time_per_output_token_seconds.")

    def _gen_ai(self, name: str, text: str) -> dict[str, Histogram]:
        family = Histogram(
            f"gen_ai_server_{name}_seconds", text, _GEN_AI, registry=self._registry, buckets=COARSE_SECONDS
        )
        return {operation: family.labels(operation, PROVIDER, self._model) for operation in OPERATIONS}

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, _LABEL, registry=self._registry).labels(self._model)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, _LABEL, registry=self._registry).labels(self._model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, _LABEL, registry=self._registry, buckets=buckets).labels(self._model)

    def _counters(self, name: str, text: str, label: str, values: Iterable[str]) -> dict[str, Counter]:
        """A counter for each value of a label, there from the start."""
        family = Counter(name, text, (*_LABEL, label), registry=self._registry)
        return {value: family.labels(self._model, value) for value in values}

    def _histograms(self, name: str, text: str, label: str, values: Iterable[str]) -> dict[str, Histogram]:
        family = Histogram(name, text, (*_LABEL, label), registry=self._registry, buckets=COARSE_SECONDS)
        return {value: family.labels(self._model, value) for value in values}
