"""The best split into prefill and decode workers: DistServe's search over all splits, with the rate bisected.

Goodput is the highest rate at which 90 % of requests meet both SLOs (DistServe, OSDI'24, section 4). A colocated
cluster (no prefill worker, every decode worker computes its prompts itself) is one more candidate, adaptive roles
another. All rates have the same requests, faster or slower; a run ends as soon as too many of them have missed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec

from baton.proxy.settings import ProxySettings
from baton.simulator.bounds import Bound, bound, mean_work
from baton.simulator.latency import Profile
from baton.simulator.record import ENOUGH, MissLimit, RunSummary, Slo, attainment, summarise
from baton.simulator.simulation import Scenario, simulate
from baton.simulator.workload import SimRequest

FIRST = 0.75
"""Of a split's bound: the first rate to try. Most are good at a half and not at all of it."""
MOST = 1e6
Workload = Callable[[float], Sequence[SimRequest]]
"""Requests at a rate of so many a second."""


@dataclass(frozen=True, slots=True)
class Split:
    """`prefill` 0 is colocated serving: prompts are computed in chunks of `chunk_tokens`, beside decoding. With `mixed`
    workers, roles follow the load."""

    prefill: int
    decode: int
    chunk_tokens: int = 0
    mixed: int = 0

    @property
    def kind(self) -> str:
        if self.mixed:
            return "adaptive"
        return "split" if self.prefill else "colocated"

    @property
    def name(self) -> str:
        if self.mixed:
            return f"{self.mixed} adaptive"
        colocated = f"{self.decode} colocated, chunks of {self.chunk_tokens}"
        return f"{self.prefill}P{self.decode}D" if self.prefill else colocated


@dataclass(frozen=True, slots=True)
class Goodput:
    """The highest rate that meets the SLO, and the run's summary at that rate."""

    split: Split
    rate: float
    summary: RunSummary
    attained: float
    runs: int

    @property
    def rate_per_gpu(self) -> float:
        return self.rate / (self.split.prefill + self.split.decode + self.split.mixed)


def splits(gpus: int, chunks: Sequence[int]) -> list[Split]:
    """Adaptive roles, every split, and colocated serving with each chunk size: small chunks delay decoding less."""
    return [
        Split(0, 0, mixed=gpus),
        *(Split(prefill, gpus - prefill) for prefill in range(1, gpus)),
        *(Split(0, gpus, chunk) for chunk in chunks),
    ]


def scenario_of(split: Split, profile: Profile, proxy: ProxySettings, prefill_policy: str) -> Scenario:
    """`proxy` for splits that have prefill workers."""
    if split.kind == "colocated":
        proxy = replace(proxy, local_prefill="always")
    return Scenario(
        profile=_chunked(split, profile),
        prefill=split.prefill,
        decode=split.decode,
        mixed=split.mixed,
        proxy=proxy,
        prefill_policy=prefill_policy,
        late_events=True,
    )


def bound_of(split: Split, requests: Sequence[SimRequest], profile: Profile, slo: Slo, local: str) -> Bound:
    """`local` for splits that have prefill workers. Adaptive roles have the best bound of all splits."""
    if split.mixed:
        n = split.mixed
        others = [replace(split, mixed=0, prefill=m, decode=n - m, chunk_tokens=0) for m in range(n)]
        return max((bound_of(each, requests, profile, slo, "auto") for each in others), key=lambda each: each.rate)
    profile = _chunked(split, profile)
    return bound(split.prefill, split.decode, local, mean_work(requests, profile, slo), profile, slo)


def _chunked(split: Split, profile: Profile) -> Profile:
    chunk = split.chunk_tokens
    return msgspec.structs.replace(profile, decode_chunk_tokens=chunk, decode_budget_tokens=chunk) if chunk else profile


def goodput(
    scenario: Scenario, split: Split, workload: Workload, slo: Slo, bounded: float, first_rate: float, rounds: int
) -> Goodput:
    """The search between 0 and `bounded`, from `first_rate` on, until good and bad rates differ by 1/2^rounds. A split
    that is not good at a quarter of the first rate is given up."""
    runs = 0
    best: tuple[float, RunSummary, float] | None = None

    def good(rate: float) -> bool:
        nonlocal runs, best
        runs += 1
        requests = workload(rate)
        outcome = simulate(scenario, requests, MissLimit(slo, len(requests)))
        attained = 0.0 if outcome.stopped else attainment(outcome.records, slo)
        if attained >= ENOUGH and (best is None or rate > best[0]):
            best = (rate, summarise(outcome.records), attained)
        return attained >= ENOUGH

    low, high = _bracket(good, min(first_rate, bounded), bounded)
    while low and high - low > low * 0.5**rounds:
        middle = (low + high) / 2
        low, high = (middle, high) if good(middle) else (low, middle)
    rate, summary, attained = best or (0.0, summarise([]), 0.0)
    return Goodput(split, rate, summary, attained, runs)


def _bracket(good: Callable[[float], bool], rate: float, bounded: float) -> tuple[float, float]:
    """A rate that is good and a higher one that is not, at most a factor of two apart; 0 counts as good, and what is
    above the bound as not good."""
    if not rate:
        return 0.0, 0.0
    if good(rate):
        while rate * 2 < min(bounded, MOST) and good(rate * 2):
            rate *= 2
        return rate, max(rate, min(rate * 2, bounded))
    for _ in range(2):
        rate /= 2
        if good(rate):
            return rate, rate * 2
    return 0.0, rate
