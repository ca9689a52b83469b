"""Writes docs/metrics.md from the code: every metric of GET /metrics, and every stage of a timeline.

    python3 -m baton.scripts.metrics_page   # after a change of the metrics; a test compares the page with the code

What engine and workers count is named in proxy/counters.py; everything else describes itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from baton.node.messages.control import Load
from baton.proxy.group import UP
from baton.proxy.interface import WorkerStatus
from baton.proxy.metrics.adapters import AdapterUsage
from baton.proxy.metrics.counters import ENGINE_COUNTERS, STORE_COUNTERS, WORKER_COUNTERS
from baton.proxy.metrics.meter import GenerationMeter
from baton.proxy.metrics.metrics import COARSE_SECONDS, SECONDS, ProxyMetrics
from baton.proxy.metrics.record import GenerationInfo
from baton.proxy.metrics.request_log import RequestLog
from baton.proxy.metrics.timeline import STAGES, USUAL, Timeline
from baton.proxy.scaling.objectives import RoleScale
from baton.proxy.tenants.tenants import Tenants
from baton.testing.fake_engine import FakeEngine

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
HEAD = f"""# Metrics, timelines, traces

Written by `python3 -m baton.scripts.metrics_page` from the code; do not edit. Ready for use: [a scrape
configuration](monitoring/prometheus.yml), [alerts](monitoring/alerts.yml) and [a Grafana
dashboard](monitoring/grafana.json).

`GET /metrics` of the proxy is all there is to scrape: what workers and stores count reaches it with their heartbeats.
`vllm:` names have vLLM's meaning, counted per generation (each of `n` answers to each prompt is one) and as the client
sees it. Units are seconds, bytes and tokens. Every counter of the proxy, and every value of a bounded label, exists
from the start, at 0. A series with a worker in its labels exists as long as the worker.

With `--proxies N`, a scrape of the port shows all proxies, whichever of them answers: what a proxy counts has a label
`proxy`, to be summed over (`sum by (model_name) (rate(...))`); what workers and stores report is there once, without
it. `baton:proxy_up{{proxy="0"}}` is 0 for a proxy that does not answer.

Buckets reach from {SECONDS[0] * 1000:g} ms to {SECONDS[-1]:g} s: {len(SECONDS)} of them, or {len(COARSE_SECONDS)}
where there are many labels.
"""
TIMELINE = """
## Where the time went

Each generation has a timeline in three parts: from the first byte of its request to the first answer written (the
TTFT), from there to the second answer, from there to the end. The stages of a part sum to it. The proxy measures its
own stages with its clock. Workers report theirs as durations, which are placed at the end of the time that passed in
the proxy; `network` is the remainder. No clock is compared between hosts, and no stage is negative. For an answer that
is not streamed, a token counts as shown when the proxy has it.

| stage | what it is | until first token | until second token | until the end |
|---|---|:-:|:-:|:-:|
"""
SHOWN = """
"yes": always present, possibly with 0; other stages are present only if they took time.

- `GET /metrics`: `baton:request_stage_seconds{until="first_token",stage="prefill"}` and so on, for parts that were
  reached.
- The log: one line `request_finished` a generation at `--log-level debug`; `request_slow` with the same fields, as a
  warning, for those that took longer than `--slow-request-s`. Lengths, workers and the beginning of a hash, never text.
- `GET /debug/requests/ID` with `--debug-requests N`: outcome, attempts and timeline of one of the last N generations,
  by the id that the answer had (`id`, `x-request-id`). The API key guards it. Cancelled and failed ones are there too.
- Traces with `--otlp-endpoint URL` (or `OTEL_EXPORTER_OTLP_ENDPOINT`; needs `pip install 'baton-serve[otel]'`): a span
  a generation with OpenTelemetry's `gen_ai.*` attributes, and one for each stage below it, one after the other. A
  client's `traceparent` is honoured. Other `OTEL_*` variables (headers, service name, sampler) have their usual
  meaning.
"""
NOTE = """
A disk's misses, refusals, evictions and drops come by reason beside these, as `baton:store_disk_miss_corrupt_total`.
"""


def page() -> str:
    """The whole page."""
    families = sorted(_families(), key=lambda family: family.name)
    parts = [HEAD]
    for title, prefix in (("Names that vLLM has", "vllm:"), ("Baton's own", "baton:"), ("OpenTelemetry's", "gen_ai")):
        rows = [_row(family) for family in families if family.name.startswith(prefix)]
        parts.append(f"\n## {title}\n\n| metric | type | labels | meaning |\n|---|---|---|---|\n" + "".join(rows))
        parts.append(NOTE if prefix == "baton:" else "")
    parts.append(TIMELINE + "".join(_stage_row(stage, text) for stage, text in STAGES.items()) + SHOWN)
    return "".join(parts)


def names() -> set[str]:
    """Of all samples that a scrape may have."""
    return {UP} | {sample.name for family in _families() for sample in family.samples}


def _families() -> Iterable[Metric]:
    """Of a proxy with one worker of each role and a store, after one request."""
    engine = FakeEngine(lambda call: [], totals=dict.fromkeys(ENGINE_COUNTERS, 0.0))
    for role in ("prefill", "decode"):
        load = Load(counters=dict.fromkeys(WORKER_COUNTERS, 0.0))
        engine.workers.append(WorkerStatus(role, role, "ready", load, block_tokens=16, model="demo"))
    stored = Load(counters=dict.fromkeys(STORE_COUNTERS, 0.0))
    engine.workers.append(WorkerStatus("store", "store", "ready", stored))
    engine.attempts["demo"] = {"": 0}
    engine.scaling["demo"] = [RoleScale(role, 0.0, 1) for role in ("prefill", "decode")]
    adapter = SimpleNamespace(name="adapter", usage=AdapterUsage())
    metrics = ProxyMetrics(engine, ["demo"], time.monotonic, Tenants.one(["key"]), [adapter])
    line = Timeline(metrics.clock)
    track = GenerationMeter(
        metrics.of("demo"), RequestLog(), GenerationInfo("", 0, "chat", "demo", True, 1, None, 0, {}), line
    )
    line.dispatch("prefill/1", "decode/1", b"")
    line.handed_over(1, 1.0)
    track.close("stop")
    families = text_string_to_metric_families(metrics.exposition().decode())
    return [family for family in families if not family.name.endswith("_created")]


def _row(family: Metric) -> str:
    name = f"{family.name}_total" if family.type == "counter" else family.name
    labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
    shown = ", ".join(f"`{label}`" for label in labels)
    return f"| `{name}` | {family.type} | {shown} | {family.documentation} |\n"


def _stage_row(stage: str, text: str) -> str:
    usual = " | ".join("yes" if stage in stages else "" for stages in USUAL.values())
    return f"| `{stage}` | {text} | {usual} |\n"


if __name__ == "__main__":
    PAGE.write_text(page())
