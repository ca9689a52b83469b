"""Studies of a few runs each: policies under overload, the loss of a worker. Prints nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from baton.node.errors import SettingsError
from baton.proxy.settings import ProxySettings
from baton.simulator.adapters import AdapterTraffic
from baton.simulator.latency import Profile
from baton.simulator.parallel import WorkerSize
from baton.simulator.ramp import Autoscale, mean_level, staged
from baton.simulator.record import RunSummary, Slo, Spread, attainment, percentile, summarise
from baton.simulator.settings import (
    ORDERS,
    ROUTING,
    OverloadSettings,
    RampSettings,
    ReplaySettings,
    RolesSettings,
    SloSettings,
    WorkloadSettings,
)
from baton.simulator.simulation import Loss, Scenario, SimOutcome, simulate
from baton.simulator.store import Capacity
from baton.simulator.workload import LengthSampler, SimRequest, poisson, read_trace, speed_up

HICCUP_S = 0.05
"""A request was struck if its longest wait for a token grew by more than this."""


def workload_of(settings: WorkloadSettings, profile: Profile, factor: float = 1.0) -> list[SimRequest]:
    """The requests of the settings at `factor` times the rate, without those that exceed every worker's limits."""
    longest = profile.max_model_len - 1
    if settings.trace is not None:
        requests = read_trace(settings.trace, settings.seed)
        requests = requests[: settings.requests or None]
        requests = speed_up(requests, settings.speed * factor)
    else:
        requests = poisson(
            settings.requests,
            settings.rate * factor,
            LengthSampler(settings.prompt_tokens, settings.prompt_spread, longest),
            LengthSampler(settings.output_tokens, settings.output_spread, longest),
            settings.seed,
        )
    fitting = [request for request in requests if request.prompt_tokens + request.output_tokens <= longest]
    if not fitting:
        raise SettingsError(f"no request of the workload fits into {profile.max_model_len} tokens")
    traffic = _adapters_of(settings) if isinstance(settings, ReplaySettings) else None
    return fitting if traffic is None else traffic.named(fitting, settings.seed)


def slo_of(settings: SloSettings) -> Slo:
    """In seconds."""
    return Slo(settings.ttft_ms / 1000, settings.tpot_ms / 1000)


def scenario_of(settings: ReplaySettings, profile: Profile) -> Scenario:
    proxy = ProxySettings(
        policy=settings.policy,
        local_prefill=settings.local_prefill,
        local_prefill_tokens=settings.local_prefill_tokens,
        local_prefill_itl_weight=settings.local_prefill_itl_weight,
        max_queue=settings.max_queue,
        request_timeout_s=settings.request_timeout_s,
        slo_ttft_ms=settings.ttft_ms,
        slo_tpot_ms=settings.tpot_ms,
    )
    return Scenario(
        profile=profile,
        prefill=settings.prefill,
        decode=settings.decode,
        mixed=settings.mixed,
        prefill_size=WorkerSize(settings.prefill_tp, settings.prefill_pp),
        decode_size=WorkerSize(settings.decode_tp),
        proxy=proxy,
        prefill_policy=settings.prefill_policy,
        store=_capacity_of(settings),
        store_loads=settings.store_loads,
        adapters=_adapters_of(settings),
        ahead=not settings.step_by_step,
    )


def _adapters_of(settings: ReplaySettings) -> AdapterTraffic | None:
    if not settings.adapters:
        return None
    return AdapterTraffic(
        count=settings.adapters,
        zipf=settings.adapter_zipf,
        size_bytes=int(settings.adapter_mb * 1e6),
        num_slots=settings.max_loras,
        max_in_memory=settings.max_cpu_loras,
    )


def _capacity_of(settings: ReplaySettings) -> Capacity | None:
    if settings.store_disk_gib and not settings.store_ram_gib:
        raise SettingsError("--store-disk-gib needs --store-ram-gib: blocks go to the disk and come back through RAM")
    ram_bytes, disk_bytes = int(settings.store_ram_gib * (1 << 30)), int(settings.store_disk_gib * (1 << 30))
    return Capacity(ram_bytes, disk_bytes) if ram_bytes else None


@dataclass(frozen=True, slots=True)
class Overload:
    """One pair of policies: the proxy's routing, and the prefill workers' order of prompts."""

    routing: str
    order: str
    summary: RunSummary
    good: float
    """Part of all requests within the SLO."""
    good_per_s: float


def overload(settings: OverloadSettings, profile: Profile) -> list[Overload]:
    """Every pair of policies under `factor` times the workload's rate."""
    requests = workload_of(settings, profile, settings.factor)
    slo, found = slo_of(settings), []
    for routing in ROUTING:
        for order in ORDERS:
            scenario = scenario_of(replace(settings, policy=routing, prefill_policy=order), profile)
            records = simulate(scenario, requests).records
            summary, good = summarise(records), attainment(records, slo)
            good_per_s = good * len(records) / summary.duration_s if summary.duration_s else 0.0
            found.append(Overload(routing, order, summary, good, good_per_s))
    return found


@dataclass(frozen=True, slots=True)
class LossCost:
    """One run with or without a worker killed in the middle; `struck` counts the requests that were delayed."""

    victim: str
    summary: RunSummary
    struck: int
    struck_gap: Spread
    """The longest wait for a token that each of those saw."""
    retries: float


def losses(settings: ReplaySettings, profile: Profile, at: float) -> list[LossCost]:
    """Three runs: no loss, a prefill worker or a decode worker lost at the fraction `at` of the arrivals' time."""
    requests = workload_of(settings, profile)
    scenario = scenario_of(settings, profile)
    moment = at * (requests[-1].arrival_s - requests[0].arrival_s)
    calm = simulate(scenario, requests)
    found = [LossCost("none", summarise(calm.records), 0, Spread.of([]), calm.counters["retries_total"])]
    for victim in (["p0"] if settings.prefill > 1 else []) + (["d0"] if settings.decode > 1 else []):
        outcome = simulate(replace(scenario, losses=(Loss(moment, victim),)), requests)
        found.append(_cost(victim, outcome, calm))
    return found


def _cost(victim: str, outcome: SimOutcome, calm: SimOutcome) -> LossCost:
    pairs = zip(outcome.records, calm.records, strict=True)
    struck = [after for after, before in pairs if after.longest_wait_s > before.longest_wait_s + HICCUP_S]
    return LossCost(
        victim,
        summarise(outcome.records),
        len(struck),
        Spread.of([record.longest_wait_s for record in struck]),
        outcome.counters["retries_total"],
    )


@dataclass(frozen=True, slots=True)
class Way:
    """One way to use the same workers, and what it gave."""

    name: str
    summary: RunSummary
    tails: tuple[float, float]
    """90th percentiles of TTFT and TPOT, in seconds."""
    good: float

    def cost(self, slo: Slo) -> float:
        """Sum of squares of the tails, each by its objective: what the plan for mixed workers minimises."""
        return (self.tails[0] / slo.ttft_s) ** 2 + (self.tails[1] / slo.tpot_s) ** 2


def ways(settings: RolesSettings, profile: Profile) -> Iterator[Way]:
    """The same load with adaptive roles, colocated, and split, with and without help from decode workers."""
    requests, slo, n = workload_of(settings, profile), slo_of(settings), settings.gpus
    given = settings.prefill or sorted({max(1, n // 4), n // 2, n - max(1, n // 4)})
    proxy = ProxySettings(
        policy=settings.policy, max_queue=1 << 20, slo_ttft_ms=settings.ttft_ms, slo_tpot_ms=settings.tpot_ms
    )
    scenarios = {
        "adaptive": Scenario(profile=profile, mixed=n, proxy=proxy),
        "colocated": Scenario(profile=profile, decode=n, proxy=replace(proxy, local_prefill="always")),
    }
    for prefill, local in product(given, ("never", "auto")):
        name = f"{prefill}P{n - prefill}D {local}"
        one = replace(proxy, local_prefill=local)
        scenarios[name] = Scenario(profile=profile, prefill=prefill, decode=n - prefill, proxy=one)
    for name, scenario in scenarios.items():
        records = simulate(scenario, requests).records
        served = [record for record in records if record.ok]
        tails = (
            percentile(sorted(record.ttft_s for record in served), 90),
            percentile(sorted(record.tpot_s for record in served), 90),
        )
        yield Way(name, summarise(records), tails, attainment(records, slo))


@dataclass(frozen=True, slots=True)
class Scaled:
    """A load that rises and falls, before workers that come and go with it."""

    summary: RunSummary
    good: float
    mean_workers: float
    """Until as few are left as at the begin, those that start or drain included."""
    most_workers: int


def ramp(settings: RampSettings, profile: Profile) -> Scaled:
    """llm-d's ramp, scaled by the proxy's gauges."""
    proxy = ProxySettings(
        policy="least-loaded",
        local_prefill="auto" if settings.mixed else "always",
        max_queue=1 << 20,
        slo_ttft_ms=settings.ttft_ms,
        slo_tpot_ms=settings.tpot_ms,
    )
    scenario = Scenario(
        profile=profile,
        decode=0 if settings.mixed else settings.least,
        mixed=settings.least if settings.mixed else 0,
        proxy=proxy,
        autoscale=Autoscale(settings.least, settings.most, settings.start_s),
    )
    requests = staged(
        [(rate, seconds * settings.part) for rate, seconds in zip(settings.rates, settings.stage_s, strict=True)],
        LengthSampler(settings.prompt_tokens, settings.spread),
        LengthSampler(settings.output_tokens, settings.spread),
        random.Random(settings.seed) if settings.poisson else None,
    )
    outcome = simulate(scenario, requests)
    slo = Slo(settings.ttft_ms / 1000, settings.tpot_ms / 1000)
    return Scaled(
        summarise(outcome.records),
        attainment(outcome.records, slo),
        mean_level(outcome.levels, outcome.levels[-1][0]),
        max(count for _, count in outcome.levels),
    )
