"""Tables and JSON of what the studies found. Text only; numbers come from the studies."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence

from baton.simulator.capacity import Hits
from baton.simulator.fit import Fit
from baton.simulator.latency import Profile
from baton.simulator.parallel import rank_gib
from baton.simulator.placement import Goodput, Split
from baton.simulator.record import RunSummary, Slo, Spread
from baton.simulator.simulation import SimOutcome
from baton.simulator.studies import LossCost, Overload, Scaled, Way

SOURCES = ("gpu", "ram", "disk", "computed")
"""Where the KV of prompts came from."""
GOODPUT = "goodput, requests/s"
WORTH = 1.1
"""A gain below this is none."""
Cell = str | float | int
Row = Mapping[str, Cell]


def table(rows: Sequence[Row]) -> str:
    """Markdown; columns are the keys of the first row."""
    names = list(rows[0])
    cells = [names, *([_shown(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def as_json(rows: Sequence[Row]) -> str:
    return "\n".join(json.dumps(dict(row)) for row in rows)


def _shown(cell: Cell) -> str:
    if isinstance(cell, float) and math.isnan(cell):
        return "-"
    if isinstance(cell, float):
        return f"{cell:.4g}" if abs(cell) < 1000 else f"{cell:.0f}"
    return str(cell)


def summary_row(summary: RunSummary) -> dict[str, Cell]:
    """Times in milliseconds."""
    return {
        "requests": summary.requests,
        "failed": summary.failed,
        "TTFT mean": summary.ttft.mean_s * 1000,
        "p50": summary.ttft.p50_s * 1000,
        "p99": summary.ttft.p99_s * 1000,
        "TPOT p50": summary.tpot.p50_s * 1000,
        "TPOT p99": summary.tpot.p99_s * 1000,
        "E2E p50": summary.e2e.p50_s * 1000,
        "tokens/s": summary.output_tokens_per_s,
        "cached": f"{summary.cached_share:.1%}",
    }


def replay_rows(summary: RunSummary, outcome: SimOutcome, good: float, took_s: float) -> list[Row]:
    """One run, one line for each number."""
    spreads = {"TTFT": summary.ttft, "TPOT": summary.tpot, "ITL": summary.itl, "E2E": summary.e2e}
    found: dict[str, Cell] = {
        "requests": summary.requests,
        "failed": summary.failed,
        "within the SLO": f"{good:.1%}",
        **{f"{name} {key} (ms)": seconds * 1000 for name, each in spreads.items() for key, seconds in _parts(each)},
        "tokens/s": summary.output_tokens_per_s,
        "cached": f"{summary.cached_share:.1%}",
        "prefill workers busy": f"{_busy(outcome, 'p'):.1%}",
        "decode workers busy": f"{_busy(outcome, 'd'):.1%}",
        **{f"prompt tokens, {source}": outcome.work.get(f"prompt_tokens_{source}", 0.0) for source in SOURCES},
        **(_adapter_rows(outcome) if outcome.work.get("adapter_fills") else {}),
        "KV moved (GB)": outcome.moved_bytes / 1e9,
        **{name: value for name, value in outcome.counters.items() if value},
        "simulated (s)": outcome.simulated_s,
        "events": outcome.events,
        "messages": outcome.messages,
        "took (s)": took_s,
    }
    return [{"": name, "value": value} for name, value in found.items()]


def _adapter_rows(outcome: SimOutcome) -> dict[str, Cell]:
    """How many adapters had to be copied into slots and read, and on how many workers of a role one came."""
    work, named = outcome.work, {each.request.adapter for each in outcome.records}
    legs = len(outcome.records) + outcome.counters.get("routed_disaggregated_total", 0.0)
    found: dict[str, Cell] = {
        "adapters named": len(named),
        "found in a slot": f"{1 - work['adapter_fills'] / legs:.1%}",
        "adapters copied into slots": work["adapter_fills"],
        "adapters read": work["adapter_loads"],
        "waits for adapters, sum (s)": work["adapter_wait_seconds"],
    }
    for role, letter in (("prefill", "p"), ("decode", "d"), ("mixed", "m")):
        counts = [count for name, count in outcome.adapters_filled.items() if name.startswith(letter)]
        if counts:
            found[f"{role} workers an adapter was on"] = sum(counts) / len(named)
    return found


def _parts(spread: Spread) -> Iterator[tuple[str, float]]:
    yield from (("mean", spread.mean_s), ("p50", spread.p50_s), ("p99", spread.p99_s))


def _busy(outcome: SimOutcome, role: str) -> float:
    """The mean part of the time that workers of a role (the first letter of their names) spent in steps."""
    seconds = [busy_s for name, busy_s in outcome.busy.items() if name.startswith(role)]
    return sum(seconds) / len(seconds) / outcome.simulated_s if seconds else 0.0


def advice(rows: Sequence[Row]) -> str:
    """What to do, in words, from the rows of `place`."""
    kinds: dict[str, Row] = {}
    for row in rows:  # the best first
        name = str(row["split"])
        kind = "adaptive" if "adaptive" in name else "colocated" if "colocated" in name else "split"
        kinds.setdefault(kind, row)
    rate = {kind: float(row[GOODPUT]) for kind, row in kinds.items()}
    if not max(rate.values(), default=0.0):
        return "No way of serving meets the objectives at a rate that was tried: relax them, or use more workers."
    lines = []
    if rate.get("split") and rate.get("colocated"):
        gain = rate["split"] / rate["colocated"]
        names = kinds["split"]["split"], kinds["colocated"]["split"]
        if gain >= WORTH:
            lines.append(
                f"Disaggregate: {names[0]} serves {gain:.2f} times the rate of the best colocated ({names[1]})."
            )
        elif gain > 1 / WORTH:
            lines.append(f"It makes little difference: {names[0]} serves {gain:.2f} times the rate of {names[1]}.")
        else:
            lines.append(
                f"Do not disaggregate: {names[1]} serves {1 / gain:.2f} times the rate of the best split ({names[0]})."
            )
    fixed = max((each for kind, each in rate.items() if kind != "adaptive"), default=0.0)
    if rate.get("adaptive") and fixed:
        part = rate["adaptive"] / fixed
        word = "Adaptive roles need no choice and serve" if part >= 1 / WORTH else "Adaptive roles serve only"
        lines.append(f"{word} {part:.2f} times the rate of the best of these.")
    lines.append("Rates closer than a tenth are the same: each is the rate of one seed and a search of a few steps.")
    return "\n".join(lines)


def _rank_gib(profile: Profile, split: Split) -> str:
    """GiB of weights and KV on a GPU of each role."""
    each = [rank_gib(profile, size) for size in dict.fromkeys(split.sizes)]
    return ", ".join(f"{weights:.0f} + {kv:.0f}" for weights, kv in each) if profile.parallel is not None else "-"


def place_rows(found: Sequence[Goodput], profile: Profile) -> list[Row]:
    return [
        {
            "split": each.split.name,
            GOODPUT: each.rate,
            "a GPU": each.rate_per_gpu,
            "GiB a GPU, weights + KV": _rank_gib(profile, each.split),
            "within the SLO": f"{each.attained:.1%}",
            "TTFT p50": each.summary.ttft.p50_s * 1000,
            "p99": each.summary.ttft.p99_s * 1000,
            "TPOT p50": each.summary.tpot.p50_s * 1000,
            "TPOT p99": each.summary.tpot.p99_s * 1000,
            "runs": each.runs,
        }
        for each in found
    ]


def overload_rows(found: Sequence[Overload]) -> list[Row]:
    return [
        {
            "router": each.routing,
            "prefill order": each.order,
            "good": f"{each.good:.1%}",
            "good/s": each.good_per_s,
            **summary_row(each.summary),
        }
        for each in found
    ]


def loss_rows(found: Sequence[LossCost]) -> list[Row]:
    return [
        {
            "lost": each.victim,
            "retries": each.retries,
            "struck": each.struck,
            "their longest wait p50": each.struck_gap.p50_s * 1000,
            "p99 of it": each.struck_gap.p99_s * 1000,
            **summary_row(each.summary),
        }
        for each in found
    ]


def way_rows(found: Sequence[Way], slo: Slo) -> list[Row]:
    """Milliseconds. The cost of each way; the least of those with fixed roles is what adaptive roles are held to."""
    return [
        {
            "way": each.name,
            "TTFT p50": each.summary.ttft.p50_s * 1000,
            "TTFT p90": each.tails[0] * 1000,
            "TTFT p99": each.summary.ttft.p99_s * 1000,
            "TPOT p50": each.summary.tpot.p50_s * 1000,
            "TPOT p90": each.tails[1] * 1000,
            "TPOT p99": each.summary.tpot.p99_s * 1000,
            "ITL p99": each.summary.itl.p99_s * 1000,
            "within the SLO": f"{each.good:.1%}",
            "cost": each.cost(slo),
        }
        for each in found
    ]


def ramp_rows(found: Scaled) -> list[Row]:
    return [
        {
            "within the SLO": f"{found.good:.1%}",
            "workers, mean": found.mean_workers,
            "most": found.most_workers,
            **summary_row(found.summary),
        }
    ]


def tier_rows(found: Sequence[tuple[float, Hits]], token_bytes: int) -> list[Row]:
    return [
        {
            "tier, million tokens": million,
            "GB": million * 1e6 * token_bytes / 1e9,
            "hit rate": f"{hits.share:.1%}",
        }
        for million, hits in found
    ]


def fit_rows(found: Mapping[str, Fit]) -> list[Row]:
    return [
        {
            "kind": kind,
            "steps": fit.steps,
            "a (ms)": fit.cost.a * 1e3,
            "b (us)": fit.cost.b * 1e6,
            "c (us)": fit.cost.c * 1e6,
            "error p50": f"{fit.median_error:.1%}",
            "p90": f"{fit.p90_error:.1%}",
            "worst": f"{fit.worst_error:.1%}",
        }
        for kind, fit in found.items()
    ]
