"""The plots of a report, each an SVG as text. Drawn by matplotlib without a display; text stays text: files stay small.

Lines are thinned to a few hundred points: quantiles of a distribution, an even choice of requests in a timeline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from io import StringIO

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from baton.benchmark.load.experiment import Run
from baton.benchmark.load.record import Record
from baton.benchmark.load.results import rate_text
from baton.benchmark.load.summary import Summary

MAX_LINES = 10
MAX_POINTS = 150
MAX_TIMELINE = 150

Curve = tuple[str, Sequence[Run]]


def curves(runs: Sequence[Run]) -> list[Curve]:
    """Runs that belong to one line of a distribution: a server at a rate, all seeds together."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        name = " ".join(filter(None, (run.server.name, f"{rate_text(run.rate)} req/s")))
        found.setdefault(name, []).append(run)
    return list(found.items())


def distribution(runs: Sequence[Run], title: str, values: Callable[[Record], Sequence[float]]) -> str:
    """Part of all values below x, in ms on a logarithmic axis; `values` gives a record's, in seconds."""
    figure, axes = _figure(title, "ms", "part of all, at most x")
    for name, group in _thinned(curves(runs)):
        found = [value for run in group for record in run.records if record.completed for value in values(record)]
        if found:
            parts = np.linspace(0, 1, min(MAX_POINTS, len(found) + 1))
            axes.plot(1000 * np.quantile(np.asarray(found), parts), parts, label=name, linewidth=1.2)
    _logarithmic(axes.xaxis, axes.set_xscale)
    axes.set_ylim(0, 1.01)
    return _svg(figure, axes)


def ladder(runs: Sequence[Run], title: str, metric: str) -> str:
    """A latency's median (full) and p99 (dashed) by the rate that was offered, one point the median of the seeds."""
    figure, axes = _figure(title, "offered, requests/s", "ms")
    for place, (name, group) in enumerate(_by_server(runs)):
        median = _points(group, lambda summary: summary.latencies[metric].at(50))
        p99 = _points(group, lambda summary: summary.latencies[metric].at(99))
        axes.plot(*median, "o-", color=f"C{place}", label=f"{name} p50".strip(), markersize=3)
        axes.plot(*p99, "o--", color=f"C{place}", label=f"{name} p99".strip(), markersize=3)
    _logarithmic(axes.yaxis, axes.set_yscale)
    return _svg(figure, axes)


def goodput(runs: Sequence[Run], attainment: float) -> str:
    """Requests/s that met the objectives, by the rate that was offered; grey is all of them."""
    figure, axes = _figure("Goodput", "offered, requests/s", "requests/s that met the objectives")
    most = 0.0
    for name, group in _by_server(runs):
        rates, values = _points(group, lambda summary: summary.request_goodput)
        axes.plot(rates, values, "o-", label=name or "kept", markersize=3)
        most = max([most, *rates])
    axes.plot([0, most], [0, most], color="0.7", linewidth=0.8, label="all")
    axes.plot(
        [0, most], [0, attainment * most], color="0.7", linewidth=0.8, linestyle=":", label=f"{100 * attainment:g} %"
    )
    return _svg(figure, axes)


def timeline(run: Run, title: str) -> str:
    """Requests as bars: grey until sent, orange until the first token, blue until the last; red did not end well."""
    figure, axes = _figure(title, "s from the start", "request", height=3.6)
    step = max(1, math.ceil(len(run.records) / MAX_TIMELINE))
    chosen = run.records[::step]
    rows = [record.index for record in chosen]
    firsts = [record.last_s if record.first_s is None else record.first_s for record in chosen]
    well = ["tab:blue" if record.completed else "tab:red" for record in chosen]
    axes.hlines(rows, [r.due_s for r in chosen], [r.sent_s for r in chosen], color="0.75", linewidth=1)
    axes.hlines(rows, [r.sent_s for r in chosen], firsts, color="tab:orange", linewidth=1)
    axes.hlines(rows, firsts, [r.last_s for r in chosen], color=well, linewidth=1)
    axes.invert_yaxis()
    return _svg(figure, axes)


def _figure(title: str, x: str, y: str, height: float = 3.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, color="0.92", linewidth=0.6)
    return figure, axes


def _logarithmic(axis: Axis, set_scale: Callable[[str], None]) -> None:
    """With plain numbers at 1, 2, 5, 10 and so on."""
    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _svg(figure: Figure, axes: Axes) -> str:
    handles, labels = axes.get_legend_handles_labels()
    if any(labels):
        axes.legend(handles, labels, fontsize=7, frameon=False)
    out = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": axes.get_title()}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def _thinned(groups: Sequence[Curve]) -> Sequence[Curve]:
    """At most MAX_LINES of them, evenly chosen: more cannot be distinguished."""
    if len(groups) <= MAX_LINES:
        return groups
    return [groups[round(place)] for place in np.linspace(0, len(groups) - 1, MAX_LINES)]


def _by_server(runs: Sequence[Run]) -> list[Curve]:
    names = list(dict.fromkeys(run.server.name for run in runs))
    return [(name, [run for run in runs if run.server.name == name]) for name in names]


def _points(runs: Sequence[Run], value: Callable[[Summary], float]) -> tuple[list[float], list[float]]:
    """(rate, median of the seeds' values), by rate; runs without a finite rate are no part of a ladder."""
    found: dict[float, list[float]] = {}
    for run in runs:
        if run.rate is not None and math.isfinite(run.rate):
            found.setdefault(run.rate, []).append(value(run.summary))
    return sorted(found), [float(np.median(found[rate])) for rate in sorted(found)]
