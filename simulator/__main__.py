"""python -m baton.simulator COMMAND: see COMMANDS. Each has its own --help."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence

import msgspec

from baton.node.errors import SettingsError
from baton.node.settings import parse
from baton.proxy.settings import ProxySettings
from baton.simulator import report
from baton.simulator.capacity import hit_rate
from baton.simulator.fit import Fit, fit, read_steps
from baton.simulator.latency import load_profile
from baton.simulator.parallel import WorkerSize, fits, with_steps
from baton.simulator.placement import FIRST, Goodput, Split, bound_of, goodput, promising, splits, wider_splits
from baton.simulator.placement import scenario_of as split_scenario
from baton.simulator.record import attainment, summarise
from baton.simulator.searches import Searches
from baton.simulator.settings import (
    FitSettings,
    LossSettings,
    OverloadSettings,
    PlaceSettings,
    RampSettings,
    ReplaySettings,
    RolesSettings,
    TiersSettings,
)
from baton.simulator.simulation import simulate
from baton.simulator.studies import losses, overload, ramp, scenario_of, slo_of, ways, workload_of
from baton.simulator.workload import rate_of, read_trace

PROG = "baton simulate"


def replay(argv: Sequence[str]) -> None:
    """One cluster, one workload: the latencies that clients see."""
    settings = parse(ReplaySettings, argv, f"{PROG} replay", replay.__doc__ or "")
    profile = load_profile(settings.profile)
    requests = workload_of(settings, profile)
    began = time.perf_counter()
    outcome = simulate(scenario_of(settings, profile), requests)
    took_s = time.perf_counter() - began
    good = attainment(outcome.records, slo_of(settings))
    _show(report.replay_rows(summarise(outcome.records), outcome, good, took_s), settings.json)
    for error in sorted({record.error for record in outcome.records if record.error})[:5]:
        print(f"failed: {error}", file=sys.stderr)


def place(argv: Sequence[str]) -> None:
    """Every split of the workers into prefill and decode, colocated, and adaptive: the highest rate with 90 % in the
    SLO, and what to do."""
    settings = parse(PlaceSettings, argv, f"{PROG} place", place.__doc__ or "")
    profile = load_profile(settings.profile)
    sizes = [ranks for ranks in settings.tp if fits(profile, WorkerSize(ranks))]
    plain = splits(settings.gpus, settings.chunk_tokens) if 1 in sizes else []
    wider = wider_splits(settings.gpus, settings.chunk_tokens, sizes)
    wanted = [split for split in (*plain, *wider) if not settings.only or split.name in settings.only]
    if not plain and not wider:
        raise SettingsError(f"no worker of --tp ranks has room for the model, or {settings.gpus} GPUs are too few")
    if not wanted:
        raise SettingsError(f"--only: there are {', '.join(split.name for split in (*plain, *wider))}")
    if len(wanted) == 1:
        _show(report.place_rows([_search(settings, wanted[0])], profile), settings.json)
        return
    requests = workload_of(settings, profile)
    known = {split: bound_of(split, requests, profile, slo_of(settings), settings.local_prefill) for split in wanted}
    bounds = [(split, known[split]) for split in plain if split in known]
    of_wider = [(split, known[split]) for split in wider if split in known]
    bounds += of_wider if settings.only else promising(bounds, of_wider)
    searches = Searches(argv, bounds, settings.first_rate, settings.jobs or os.cpu_count() or 1)
    rows, out = searches.run(), sys.stderr if settings.json else sys.stdout
    if rows:
        _show(rows, settings.json)
    print(*(f"Not searched: {reason}" for reason in searches.skipped), report.advice(rows), sep="\n", file=out)


def _search(settings: PlaceSettings, split: Split) -> Goodput:
    profile = load_profile(settings.profile)
    requests = workload_of(settings, profile)
    base = rate_of(requests)
    bounded = bound_of(split, requests, profile, slo_of(settings), settings.local_prefill).rate
    proxy = ProxySettings(
        policy=settings.policy,
        local_prefill=settings.local_prefill,
        local_prefill_itl_weight=settings.local_prefill_itl_weight,
        max_queue=1 << 20,
        slo_ttft_ms=settings.ttft_ms,
        slo_tpot_ms=settings.tpot_ms,
    )
    return goodput(
        split_scenario(split, profile, proxy, settings.prefill_policy),
        split,
        lambda rate: workload_of(settings, profile, rate / base),
        slo_of(settings),
        bounded,
        settings.first_rate or FIRST * bounded,
        settings.rounds,
    )


def overloaded(argv: Sequence[str]) -> None:
    """Every policy of the router and of the prefill workers, under several times the rate."""
    settings = parse(OverloadSettings, argv, f"{PROG} overload", overloaded.__doc__ or "")
    _show(report.overload_rows(overload(settings, load_profile(settings.profile))), settings.json)


def loss(argv: Sequence[str]) -> None:
    """One worker of each role is killed in the middle of the workload."""
    settings = parse(LossSettings, argv, f"{PROG} loss", loss.__doc__ or "")
    _show(report.loss_rows(losses(settings, load_profile(settings.profile), settings.at)), settings.json)


def roles(argv: Sequence[str]) -> None:
    """Adaptive roles beside colocated serving and fixed splits, under one load."""
    settings = parse(RolesSettings, argv, f"{PROG} roles", roles.__doc__ or "")
    found = []
    for way in ways(settings, load_profile(settings.profile)):
        found.append(way)
        print(f"{way.name}: cost {way.cost(slo_of(settings)):.4g}", file=sys.stderr, flush=True)
    _show(report.way_rows(found, slo_of(settings)), settings.json)


def scaled(argv: Sequence[str]) -> None:
    """A load that rises and falls, by default llm-d's ramp, before workers that the proxy's gauges scale."""
    settings = parse(RampSettings, argv, f"{PROG} ramp", scaled.__doc__ or "")
    _show(report.ramp_rows(ramp(settings, load_profile(settings.profile))), settings.json)


def tiers(argv: Sequence[str]) -> None:
    """The upper bound of the hit rate of a shared LRU tier of a given size, over a trace."""
    settings = parse(TiersSettings, argv, f"{PROG} tiers", tiers.__doc__ or "")
    requests = read_trace(settings.trace, settings.seed)
    layout = load_profile(settings.profile).kv_layout()
    token_bytes = layout.block_bytes // layout.block_tokens
    sizes = [*settings.million_tokens, float("inf")]
    found = [(million, hit_rate(requests, million * 1e6)) for million in sizes]
    _show(report.tier_rows(found, token_bytes), settings.json)


def fitted(argv: Sequence[str]) -> None:
    """Coefficients of the latency model from measured steps, by least squares, with their error."""
    settings = parse(FitSettings, argv, "baton simulate fit", fitted.__doc__ or "")
    steps = [step for path in settings.steps for step in read_steps(path)]
    kinds = sorted({step.kind for step in steps}, reverse=True)
    found: dict[str, Fit] = {kind: fit([step for step in steps if step.kind == kind]) for kind in kinds}
    _show(report.fit_rows(found), as_json=False)
    if settings.out is not None:
        costs = {kind: fit.cost for kind, fit in found.items()}
        profile = with_steps(load_profile(settings.profile), settings.tp, costs)
        settings.out.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "replay": replay,
    "place": place,
    "overload": overloaded,
    "loss": loss,
    "roles": roles,
    "ramp": scaled,
    "tiers": tiers,
    "fit": fitted,
}


def _show(rows: Sequence[report.Row], as_json: bool) -> None:
    print(report.as_json(rows) if as_json else report.table(rows))


def main(argv: Sequence[str]) -> int:
    logging.basicConfig(level=logging.ERROR)
    if not argv or argv[0] not in COMMANDS:
        asked = bool(argv) and argv[0] in ("-h", "--help")
        out = sys.stdout if asked else sys.stderr
        print(f"usage: {PROG} COMMAND [options]; COMMAND --help lists them\n", file=out)
        for name, command in COMMANDS.items():
            print(f"  {name:9} {command.__doc__}", file=out)
        return 0 if asked else 2
    try:
        COMMANDS[argv[0]](argv[1:])
    except SettingsError as error:
        print(f"{PROG} {argv[0]}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
