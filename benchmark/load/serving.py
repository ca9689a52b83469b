"""A load test from its settings to its exit status: runs it, prints tables, writes files."""

from __future__ import annotations

import asyncio
import os
import platform
import resource
import secrets
import shlex
import sys
import time
from collections.abc import Sequence

from uvicorn.loops.auto import auto_loop_factory

from baton.benchmark.load import self_test, table
from baton.benchmark.load.experiment import Experiment, Run, Server
from baton.benchmark.load.planner import read_inputs
from baton.benchmark.load.results import Circumstances, rate_text, save
from baton.benchmark.load.settings import ServingSettings
from baton.node.errors import SettingsError
from baton.node.settings import parse

PROG = "baton bench serving"


def main(argv: Sequence[str]) -> int:
    """The exit status. Raises SettingsError."""
    settings = parse(ServingSettings, argv, PROG, "Load tests a server that speaks OpenAI's API.")
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:  # uvloop where it is installed
        return runner.run(serving(settings, argv))


async def serving(settings: ServingSettings, argv: Sequence[str]) -> int:
    """0 where every run had a request that did not fail, else 1. Raises SettingsError before anything was sent."""
    if settings.self_test:
        return await self_test.run()
    _check_html(settings)
    _allow_connections()
    salt = secrets.randbits(32) if settings.prompt_salt is None else settings.prompt_salt
    about = Circumstances(command_line(argv), time.strftime("%Y-%m-%d %H:%M:%S"), _machine(), salt)
    experiment = Experiment(settings, read_inputs(settings), salt, sys.stderr if sys.stderr.isatty() else None)
    servers = await experiment.find_servers()
    runs: list[Run] = []

    def on_run(run: Run) -> None:
        runs.append(run)
        _show(run, settings, about, last=not _are_many(settings, servers))

    if settings.find_rate:
        found = [_sentence(server, await experiment.find_rate(server, on_run), settings) for server in servers]
    else:
        await experiment.run_all(servers, on_run)
        found = []
    _finish(runs, settings, about, found)
    return 0 if runs and all(run.summary.completed or run.summary.cancelled for run in runs) else 1


def command_line(argv: Sequence[str]) -> str:
    """As it was typed, but for the key."""
    words = list(argv)
    for place, word in enumerate(words):
        if word == "--api-key" and place + 1 < len(words):
            words[place + 1] = "..."
        elif word.startswith("--api-key="):
            words[place] = "--api-key=..."
    return shlex.join([*PROG.split(), *words])


def _are_many(settings: ServingSettings, servers: Sequence[Server]) -> bool:
    return settings.find_rate or len(servers) * len(settings.rates) * len(settings.seed) > 1


def _show(run: Run, settings: ServingSettings, about: Circumstances, last: bool) -> None:
    for line in table.warnings(run):
        print(f"warning: {line}", file=sys.stderr)
    if last:
        print(table.of_run(run, settings), flush=True)
    else:
        latencies = run.summary.latencies
        name = " ".join(filter(None, (run.server.name, f"{rate_text(run.rate)} req/s, seed {run.seed}")))
        kept = f", {100 * run.summary.attainment:.0f} % kept" if settings.goodput else ""
        print(
            f"{name}: {run.summary.completed}/{run.num_requests}{kept}, TTFT p50 {latencies['ttft'].at(50):.1f} "
            f"p99 {latencies['ttft'].at(99):.1f} ms, TPOT p50 {latencies['tpot'].at(50):.2f} ms",
            flush=True,
        )
    for path in save(run, settings, about):
        print(f"wrote {path}", file=sys.stderr)


def _sentence(server: Server, rate: float | None, settings: ServingSettings) -> str:
    name = f"{server.name}: " if server.name else ""
    wanted = f"{100 * settings.attainment:g} % of requests keep {settings.objectives}"
    return f"{name}no rate at which {wanted}" if rate is None else f"{name}up to {rate:.3g} requests/s, {wanted}"


def _finish(runs: Sequence[Run], settings: ServingSettings, about: Circumstances, found: Sequence[str]) -> None:
    if len(runs) > 1:
        print(f"\n{table.of_runs(runs, settings)}")
    if settings.compare and not settings.find_rate:
        print(f"\n{table.side_by_side(runs)}")
    for line in found:
        print(line)
    print(f"prompts: --prompt-salt {about.prompt_salt}; {about.machine}; {about.date}")
    if settings.html is not None:
        from baton.benchmark.load.report import render  # needs matplotlib, which only this needs

        settings.html.parent.mkdir(parents=True, exist_ok=True)
        settings.html.write_text(render(runs, settings, about, found), encoding="utf-8")
        print(f"wrote {settings.html}", file=sys.stderr)


def _check_html(settings: ServingSettings) -> None:
    """Before the runs, not after them."""
    if settings.html is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise SettingsError("--html needs matplotlib: pip install 'baton-serve[bench]'") from None


def _allow_connections() -> None:
    """As many open files as the system allows this user: each request under way needs one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _machine() -> str:
    load = os.getloadavg()[0]
    return f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} before the first run"
