"""proxy.metrics.spans: the spans that a tracing system receives, in memory and over HTTP on loopback."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from baton.node.errors import Overloaded, SettingsError
from baton.proxy.__main__ import _spans
from baton.proxy.http.app import create_app
from baton.proxy.interface import AppSettings
from baton.proxy.metrics.request_log import NoSpans
from baton.proxy.metrics.spans import OtelSpans, otlp_spans
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import FakeEngine
from baton.tests.unit.proxy.metrics.test_request_log import record

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"
COMPLETION = {"model": "demo", "prompt": "Hi", "temperature": 0.5, "max_tokens": 40}


@pytest.fixture
def memory() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
async def traced(engine: FakeEngine, text: ModelText, app_settings: AppSettings, memory: InMemorySpanExporter):  # type: ignore[no-untyped-def]
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    app = create_app(engine, {"demo": text}, app_settings, OtelSpans(provider))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
        yield client


async def test_a_request_is_a_span_with_its_stages_below(
    traced: httpx.AsyncClient, memory: InMemorySpanExporter
) -> None:
    """Guards the conventions' names, and that the stages lie inside the request and fill it."""
    answer = await traced.post("/v1/completions", json=COMPLETION)
    usage = answer.json()["usage"]
    *stages, root = memory.get_finished_spans()
    assert (root.name, root.kind) == ("text_completion demo", SpanKind.SERVER)
    assert root.attributes is not None
    assert {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "demo",
        "gen_ai.request.max_tokens": 40,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.id": answer.headers["x-request-id"],
    }.items() <= root.attributes.items()
    assert root.attributes["gen_ai.response.time_to_first_chunk"] > 0.0  # type: ignore[operator]
    assert {"admission", "tokenise"} <= {span.name for span in stages}
    at_ns = root.start_time
    for span in stages:
        assert span.parent is not None and span.parent.span_id == root.context.span_id
        assert span.start_time == at_ns
        at_ns = span.end_time
    assert at_ns == pytest.approx(root.end_time, abs=len(stages) + 1)


async def test_the_clients_trace_goes_on(traced: httpx.AsyncClient, memory: InMemorySpanExporter) -> None:
    """Guards W3C Trace Context: a request belongs to the trace that its client named, and a bad header to none."""
    for headers in ({"traceparent": PARENT}, {"traceparent": "nonsense"}):
        await traced.post("/v1/completions", json=COMPLETION, headers=headers)
    named, unnamed = [span for span in memory.get_finished_spans() if span.kind is SpanKind.SERVER]
    assert f"{named.context.trace_id:032x}" == TRACE_ID
    assert named.parent is not None and f"{named.parent.span_id:016x}" == PARENT[36:52]
    assert unnamed.parent is None


async def test_what_the_client_does_not_want_traced_is_not(
    traced: httpx.AsyncClient, memory: InMemorySpanExporter
) -> None:
    """Guards the sampled flag."""
    await traced.post("/v1/completions", json=COMPLETION, headers={"traceparent": PARENT[:-2] + "00"})
    assert memory.get_finished_spans() == ()


async def test_a_failure_is_an_error(
    traced: httpx.AsyncClient, engine: FakeEngine, memory: InMemorySpanExporter
) -> None:
    """Guards traces of what went wrong, before there was anything to generate too."""
    engine.script = lambda call: [Overloaded("full")]
    await traced.post("/v1/completions", json=COMPLETION)
    await traced.post("/v1/completions", json={"model": "demo"})
    roots = [span for span in memory.get_finished_spans() if span.kind is SpanKind.SERVER]
    assert [span.status.status_code for span in roots] == [StatusCode.ERROR] * 2
    assert [(span.attributes or {})["error.type"] for span in roots] == ["overloaded", "bad_request"]


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """A collector on this machine: its URL, and what it was sent."""
    received: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()
    thread.join()
    server.server_close()


def test_spans_reach_a_collector(
    collector: tuple[str, list[tuple[str, bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the whole way out: closing sends what is still queued, to the path that OTLP over HTTP has."""
    url, received = collector
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    monkeypatch.setenv("no_proxy", "*")
    spans = otlp_spans(f"{url}/")
    spans.export(replace(record(), outcome="stop"))
    spans.close()
    ((path, body),) = received
    assert path == "/v1/traces"
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert ("service.name", "baton") in [(each.key, each.value.string_value) for each in resource.resource.attributes]
    names = [span.name for scope in resource.scope_spans for span in scope.spans]
    assert names == ["prefill", "text_completion demo"]


def test_tracing_that_cannot_be_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a proxy configured for traces that gives neither traces nor an error."""
    assert isinstance(_spans(""), NoSpans)
    with pytest.raises(SettingsError, match="is a URL"):
        _spans("localhost:4317")
    for name in [
        name for name in sys.modules if name.startswith("opentelemetry") or name == "baton.proxy.metrics.spans"
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(SettingsError, match=r"baton-serve\[otel\]"):
        _spans("http://localhost:4318")
