"""Files of a run: JSON with the keys of `vllm bench serve`, and JSON lines with a line a request."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from baton.benchmark.load.experiment import Run
from baton.benchmark.load.record import json_lines
from baton.benchmark.load.settings import ServingSettings
from baton.benchmark.load.summary import Distribution, Summary

Json = str | int | float | bool | None | list["Json"] | Mapping[str, "Json"]


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What a reader of a result must know besides its figures."""

    command: str
    """As typed, without keys."""
    date: str
    machine: str
    prompt_salt: int


def rate_text(rate: float | None) -> str:
    """As vLLM writes it; a trace or a ramp has its own."""
    return "own" if rate is None else "inf" if math.isinf(rate) else f"{rate:g}"


def result(run: Run, settings: ServingSettings, about: Circumstances) -> dict[str, Json]:
    """All figures of a run, by vLLM's names, and ours beside them."""
    summary = run.summary
    offered: Json = "inf" if run.rate is not None and math.isinf(run.rate) else run.offered_rate
    found: dict[str, Json] = {
        "date": about.date,
        "endpoint_type": settings.backend,
        "backend": settings.backend,
        "label": settings.label or settings.backend,
        "model_id": run.server.model,
        "tokenizer_id": settings.tokenizer or run.server.model,
        "num_prompts": run.num_requests,
        "request_rate": run.rate if run.rate is not None and math.isfinite(run.rate) else offered,
        "burstiness": settings.burstiness,
        "max_concurrency": settings.max_concurrency,
        "duration": summary.duration_s,
        "completed": summary.completed,
        "failed": summary.failed,
        "total_input_tokens": summary.total_input_tokens,
        "total_output_tokens": summary.total_output_tokens,
        "request_throughput": summary.request_throughput,
        "request_goodput": summary.request_goodput if settings.goodput else None,
        "output_throughput": summary.output_throughput,
        "total_token_throughput": summary.total_token_throughput,
        "max_output_tokens_per_s": summary.max_output_tokens_per_s,
        "max_concurrent_requests": summary.max_concurrent_requests,
    }
    for name in settings.shown_metrics:
        found.update(_latency(name, summary.latencies[name]))
    found.update(_ours(run, settings, about))
    if settings.save_detailed:
        found.update(_detailed(run))
    return found


def save(run: Run, settings: ServingSettings, about: Circumstances) -> list[Path]:
    """Write what the settings ask for; returns what was written."""
    model = re.sub(r"[^\w.-]+", "-", run.server.model.rpartition("/")[2])
    label = "-".join(filter(None, (settings.label or settings.backend, run.server.name)))
    stamp = re.sub(r"\D", "", about.date)
    name = re.sub(r"[^\w.-]+", "-", f"{label}-{rate_text(run.rate)}qps-seed{run.seed}-{model}-{stamp}")
    written = []
    settings.result_dir.mkdir(parents=True, exist_ok=True)
    if settings.save_result or settings.save_detailed:
        written.append(settings.result_dir / f"{name}.json")
        encoded = msgspec.json.encode(result(run, settings, about))
        written[-1].write_bytes(msgspec.json.format(encoded, indent=1) + b"\n")
    if settings.save_requests:
        written.append(settings.result_dir / f"{name}.requests.jsonl")
        written[-1].write_bytes(json_lines(run.records, run.server.name, rate_text(run.rate), run.seed))
    return written


def _latency(name: str, values: Distribution) -> dict[str, Json]:
    found: dict[str, Json] = {
        f"mean_{name}_ms": values.mean,
        f"median_{name}_ms": values.median,
        f"std_{name}_ms": values.std,
    }
    for percentile, value in values.percentiles:
        found[f"p{percentile:g}_{name}_ms"] = value
    return found


def _ours(run: Run, settings: ServingSettings, about: Circumstances) -> dict[str, Json]:
    summary = run.summary
    return {
        "server": str(run.server.origin),
        "seed": run.seed,
        "prompt_salt": about.prompt_salt,
        "command": about.command,
        "machine": about.machine,
        "offered_rate": run.offered_rate,
        "num_warmups": run.num_warmups,
        "cancelled": summary.cancelled,
        "unsent": summary.unsent,
        "failures": dict(summary.failures),
        "goodput_config": dict(settings.objectives.limits_ms),
        "slo_attainment": summary.attainment if settings.goodput else None,
        "total_cached_tokens": summary.total_cached_tokens,
        "tokens_counted_by": "server" if summary.tokens_counted else "chunks",
        "tokens_per_chunk": summary.tokens_per_chunk,
        "client_cpu_cores": run.client_cpu_cores,
        "machine_load": run.machine_load,
        **_latency("schedule_lag", summary.schedule_lag),
        **_latency("client_queue", summary.client_queue),
    }


def _detailed(run: Run) -> dict[str, Json]:
    """One entry a request, in the order of the plan. Seconds, as vLLM has them."""
    records = run.records
    return {
        "input_lens": [record.prompt_tokens for record in records],
        "output_lens": [record.output_tokens if record.completed else 0 for record in records],
        "ttfts": [record.ttft_s or 0.0 for record in records],
        "itls": [list(record.gaps_s) for record in records],
        "start_times": [record.due_s for record in records],
        "errors": [record.error for record in records],
    }


def columns(summary: Summary) -> dict[str, float]:
    """The latencies that tables and plots are made of."""
    found = {}
    for name, values in summary.latencies.items():
        found[f"{name}_p50"], found[f"{name}_p99"] = values.at(50), values.at(99)
    return found
