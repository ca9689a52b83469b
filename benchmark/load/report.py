"""The HTML report: one file that opens without a network. Tables and plots of all runs, and how they were made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from baton.benchmark.load import plots, table
from baton.benchmark.load.experiment import Run
from baton.benchmark.load.results import Circumstances, rate_text
from baton.benchmark.load.settings import ServingSettings

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 86em; padding: 0 1em; color: #222 }
pre, code { background: #f5f5f5; padding: .2em .4em; overflow-x: auto; font-size: 13px }
pre { padding: .8em; white-space: pre-wrap }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0 }
td, th { border: 1px solid #ddd; padding: .25em .6em; text-align: left; font-variant-numeric: tabular-nums }
th { background: #f5f5f5 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(28em, 1fr)); gap: 1em }
.plots svg { width: 100%; height: auto }
.warn { color: #a40000 }
"""


def render(runs: Sequence[Run], settings: ServingSettings, about: Circumstances, found: Sequence[str]) -> str:
    """The whole page; `found` are sentences that stand at its top, such as what a search came to."""
    several = len(runs) > 1
    parts = [
        f"<h1>Serving benchmark: {escape(', '.join(dict.fromkeys(run.server.model for run in runs)))}</h1>",
        f"<p>{escape(about.date)}; {escape(about.machine)}; prompts by salt {about.prompt_salt}</p>",
        f"<pre>{escape(about.command)}</pre>",
        *(f"<p><b>{escape(line)}</b></p>" for line in found),
        *_warnings(runs),
        "<h2>Runs</h2>" + html_table(table.of_runs(runs, settings)) if several else "",
        "<h2>Side by side</h2>" + html_table(table.side_by_side(runs)) if settings.compare else "",
        f"<h2>Plots</h2><div class=plots>{''.join(_plots(runs, settings))}</div>",
        *(_details(run, settings, several) for run in runs),
    ]
    head = f"<meta charset=utf-8><title>Serving benchmark</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def html_table(text: str) -> str:
    """A table of `table`, from Markdown to HTML."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()]

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{row(rows[0], 'th')}{''.join(row(cells, 'td') for cells in rows[2:])}</table>"


def _plots(runs: Sequence[Run], settings: ServingSettings) -> list[str]:
    drawn = [
        plots.distribution(runs, "TTFT", lambda record: () if record.ttft_s is None else (record.ttft_s,)),
        plots.distribution(runs, "Time between tokens (gaps between chunks)", lambda record: record.gaps_s),
    ]
    rates = {run.rate for run in runs if run.rate is not None and math.isfinite(run.rate)}
    if len(rates) > 1:
        drawn += [plots.ladder(runs, "TTFT by rate", "ttft"), plots.ladder(runs, "TPOT by rate", "tpot")]
        if settings.goodput:
            drawn.append(plots.goodput(runs, settings.attainment))
    drawn.append(plots.timeline(runs[0], f"Timeline: {_name(runs[0])}"))
    if len(runs) > 1:
        drawn.append(plots.timeline(runs[-1], f"Timeline: {_name(runs[-1])}"))
    return [f"<div>{svg}</div>" for svg in drawn]


def _warnings(runs: Sequence[Run]) -> list[str]:
    lines = [f"{_name(run)}: {line}" for run in runs for line in table.warnings(run)]
    return [f"<p class=warn>{escape(line)}</p>" for line in lines]


def _details(run: Run, settings: ServingSettings, folded: bool) -> str:
    body = html_table(table.of_run(run, settings))
    return f"<details{'' if folded else ' open'}><summary>{escape(_name(run))}</summary>{body}</details>"


def _name(run: Run) -> str:
    return " ".join(filter(None, (run.server.name, f"{rate_text(run.rate)} req/s, seed {run.seed}")))
