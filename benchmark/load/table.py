"""Tables in Markdown: of one run, of many, and of servers side by side. Pure: runs in, text out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from baton.benchmark.load.experiment import Run
from baton.benchmark.load.results import rate_text
from baton.benchmark.load.settings import ServingSettings
from baton.benchmark.load.summary import METRICS, Distribution, Summary

TITLES = {
    "ttft": "TTFT, ms",
    "tpot": "TPOT, ms (without the first token)",
    "itl": "ITL, ms (between chunks; TBT)",
    "e2el": "E2EL, ms",
}
COMPARED: tuple[tuple[str, Callable[[Summary], float]], ...] = (
    ("requests/s", lambda summary: summary.request_throughput),
    ("goodput, requests/s", lambda summary: summary.request_goodput),
    ("output tokens/s", lambda summary: summary.output_throughput),
    *(
        (f"{name.upper()} p{percentile}, ms", lambda summary, n=name, p=percentile: summary.latencies[n].at(p))
        for name in METRICS
        for percentile in (50, 99)
    ),
)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned table."""
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + " |"

    return "\n".join([line(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])


def of_run(run: Run, settings: ServingSettings) -> str:
    """Everything about one run."""
    summary = run.summary
    how = "all due at once" if run.offered_rate is None else f"due at {run.offered_rate:.3g} conversations/s"
    if settings.turns == 1:
        how = how.replace("conversations", "requests")
    if settings.max_concurrency:
        how += f", at most {settings.max_concurrency} under way"
        how += "" if run.offered_rate else ": a closed loop, clocks start as slots become free"
    counts = f"{summary.completed} completed, {summary.failed} failed, {summary.cancelled} cancelled"
    rows = [
        ("requests", counts + (f", {summary.unsent} not sent" if summary.unsent else "")),
        ("load", f"{how}; seed {run.seed}; after {run.num_warmups} warm-ups"),
        ("duration, s", f"{summary.duration_s:.2f}"),
        ("input tokens", f"{summary.total_input_tokens}, of them cached {summary.total_cached_tokens}"),
        (
            "output tokens",
            f"{summary.total_output_tokens}, "
            + ("counted by the server" if summary.tokens_counted else "counted as chunks with text")
            + f"; {summary.tokens_per_chunk:.2f} a chunk",
        ),
        ("requests/s", f"{summary.request_throughput:.3f}"),
        ("output tokens/s", f"{summary.output_throughput:.1f}; most in a second {summary.max_output_tokens_per_s:.0f}"),
        ("all tokens/s", f"{summary.total_token_throughput:.1f}"),
        ("most under way at once", f"{summary.max_concurrent_requests}"),
    ]
    if settings.goodput:
        kept = f"{summary.request_goodput:.3f}; {100 * summary.attainment:.1f} % of requests kept {settings.objectives}"
        rows.append(("goodput, requests/s", kept))
    rows += [(TITLES[name], _latency(summary.latencies[name])) for name in settings.shown_metrics]
    rows += [
        ("client: schedule lag, ms", _latency(summary.schedule_lag)),
        ("client: wait for a slot, ms", _latency(summary.client_queue)),
        ("client: cores used", f"{run.client_cpu_cores:.2f}; load of its machine at the end {run.machine_load:.1f}"),
    ]
    return markdown(("measure", "value"), rows)


def of_runs(runs: Sequence[Run], settings: ServingSettings) -> str:
    """A line a run, by rate: the ladder."""
    head = ["server"] if any(run.server.name for run in runs) else []
    head += ["rate", "seed", "done", "failed", "req/s", "goodput", "kept %", "tokens/s"]
    head += ["TTFT p50", "p99", "TPOT p50", "p99", "ITL p50", "p99", "lag p99", "load"]
    rows = []
    for run in sorted(runs, key=lambda run: (run.rate or 0.0, run.seed)):
        summary = run.summary
        row = [run.server.name] if head[0] == "server" else []
        row += [rate_text(run.rate), str(run.seed), str(summary.completed), str(summary.failed)]
        row.append(f"{summary.request_throughput:.2f}")
        row += [f"{summary.request_goodput:.2f}", f"{100 * summary.attainment:.0f}"] if settings.goodput else ["", ""]
        row.append(f"{summary.output_throughput:.0f}")
        for name in ("ttft", "tpot", "itl"):
            row += [_ms(summary.latencies[name].at(50)), _ms(summary.latencies[name].at(99))]
        rows.append([*row, _ms(summary.schedule_lag.at(99)), f"{run.machine_load:.1f}"])
    return markdown(head, rows)


def side_by_side(runs: Sequence[Run]) -> str:
    """Servers against the first: at each rate, medians over the seeds, and the median of the seeds' ratios."""
    names = list(dict.fromkeys(run.server.name for run in runs))
    rates = list(dict.fromkeys(run.rate for run in runs))
    head = ["rate", "measure", *names, *(f"{name} / {names[0]}" for name in names[1:])]
    rows = []
    for rate in rates:
        for title, value in COMPARED:
            by_name = [
                {run.seed: value(run.summary) for run in runs if run.server.name == name and run.rate == rate}
                for name in names
            ]
            ratios = [_ratios(by_name[0], other) for other in by_name[1:]]
            medians = [f"{statistics.median(values.values()):.4g}" for values in by_name]
            rows.append([rate_text(rate), title, *medians, *ratios])
    return markdown(head, rows)


def warnings(run: Run) -> list[str]:
    """What makes a run's figures less than they seem."""
    summary, found = run.summary, []
    if run.warmup_errors:
        found.append(f"{len(run.warmup_errors)} warm-ups failed: {run.warmup_errors[0]}")
    found += [f"{count} requests failed: {reason}" for reason, count in summary.failures[:5]]
    if run.client_cpu_cores > 0.8:
        found.append(f"the client used {run.client_cpu_cores:.2f} of one core: it may have measured itself")
    lag_ms, ttft_ms = summary.schedule_lag.at(99), summary.latencies["ttft"].at(50)
    if lag_ms > max(5.0, 0.05 * ttft_ms):
        found.append(f"1 % of requests were sent {lag_ms:.1f} ms late or more; that is part of their TTFT")
    if summary.completed and not summary.tokens_counted:
        found.append("the server did not count tokens: chunks with text stand for them, and TPOT may be too high")
    return found


def _latency(values: Distribution) -> str:
    at = ", ".join(f"p{percentile:g} {_ms(value)}" for percentile, value in values.percentiles)
    return f"mean {_ms(values.mean)}, {at}"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _ratios(base: dict[int, float], other: dict[int, float]) -> str:
    """Of the seeds that both have."""
    found = [other[seed] / base[seed] for seed in base if seed in other and base[seed]]
    if not found:
        return "-"
    spread = f" ({min(found):.2f} .. {max(found):.2f})" if len(found) > 1 else ""
    return f"{statistics.median(found):.2f}{spread}"
