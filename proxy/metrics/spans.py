"""Records as OpenTelemetry spans: one of the kind SERVER for each generation, and below it one for each of its stages.

The only module that knows OpenTelemetry; it is imported only where traces were asked for. Spans are made when the
generation is over, with the times that its timeline measured, so nothing is traced while tokens flow.

Source: OpenTelemetry's semantic conventions for GenAI spans; `gen_ai.latency.*` are the names that vLLM gives them;
W3C Trace Context for the parent that a client names.
"""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from baton import __version__
from baton.node.errors import SettingsError
from baton.proxy.metrics.metrics import PROVIDER
from baton.proxy.metrics.record import GenerationRecord
from baton.proxy.metrics.timeline import FIRST_TOKEN, Attempt

MAX_QUEUED_SPANS = 8192
"""More are dropped: a slow collector costs no request anything."""
CLOSE_TIMEOUT_MS = 3000


def otlp_spans(endpoint: str) -> OtelSpans:
    """Sends spans in batches to `endpoint`/v1/traces. Headers, compression and the like come from OTEL_* variables."""
    if not endpoint.startswith(("http://", "https://")):
        raise SettingsError(f"--otlp-endpoint is a URL, such as http://localhost:4318, and not {endpoint!r}")
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=MAX_QUEUED_SPANS))
    return OtelSpans(provider)


class OtelSpans:
    """Implements `request_log.Spans` over a provider, which it closes."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("baton.proxy", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def export(self, record: GenerationRecord) -> None:
        info, began_ns = record.info, record.info.began_unix_ns
        span = self._tracer.start_span(
            f"{info.operation} {info.model}".rstrip(),
            context=self._propagator.extract(info.trace_headers),
            kind=trace.SpanKind.SERVER,
            attributes=_attributes(record),
            start_time=began_ns,
        )
        if span.is_recording():
            self._export_stages(record, span)
        if record.outcome not in ("stop", "length", "cancelled"):
            span.set_status(trace.StatusCode.ERROR, record.outcome)
        span.end(began_ns + _ns(record.total_s))

    def close(self) -> None:
        self._provider.force_flush(CLOSE_TIMEOUT_MS)
        self._provider.shutdown()

    def _export_stages(self, record: GenerationRecord, parent: trace.Span) -> None:
        """One after the other, as STAGES has them: the length of a stage is measured, its place is not."""
        context = trace.set_span_in_context(parent)
        at_ns = record.info.began_unix_ns
        for segment in record.segments:
            for stage, took_s in segment.stages:
                if took_s > 0.0:
                    attributes = {"baton.timeline.until": segment.until}
                    span = self._tracer.start_span(stage, context, attributes=attributes, start_time=at_ns)
                    at_ns += _ns(took_s)
                    span.end(at_ns)


def _attributes(record: GenerationRecord) -> dict[str, AttributeValue]:
    info, sampling = record.info, record.info.sampling
    last = record.attempts[-1] if record.attempts else Attempt("", "")
    attributes: dict[str, AttributeValue] = {
        "gen_ai.operation.name": info.operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": info.model,
        "gen_ai.response.model": info.model,
        "gen_ai.response.id": info.request_id,
        "gen_ai.request.stream": info.stream,
        "gen_ai.usage.input_tokens": info.prompt_tokens,
        "gen_ai.usage.output_tokens": record.generated_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.response.finish_reasons": [record.outcome],
        "gen_ai.latency.e2e": record.total_s,
        "baton.attempts": record.num_attempts,
        "baton.worker.prefill": last.prefill,
        "baton.worker.decode": last.decode,
    }
    if sampling is not None:
        attributes["gen_ai.request.max_tokens"] = sampling.max_tokens
        attributes["gen_ai.request.temperature"] = sampling.temperature
        attributes["gen_ai.request.top_p"] = sampling.top_p
    if record.outcome not in ("stop", "length"):
        attributes["error.type"] = record.outcome
    if (first := record.segment(FIRST_TOKEN)) is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = first.total_s
        attributes["gen_ai.latency.time_to_first_token"] = first.total_s
        attributes["gen_ai.latency.time_in_queue"] = first.seconds("queue", "prefill_queue")
    return attributes


def _resource() -> Resource:
    """Named by OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES, else baton."""
    found = Resource.create()
    named = not str(found.attributes.get(SERVICE_NAME, "unknown_service")).startswith("unknown_service")
    return found if named else found.merge(Resource({SERVICE_NAME: "baton"}))


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
