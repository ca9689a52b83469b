"""The best split into prefill and decode workers: DistServe's search over all splits, with the rate bisected.

Goodput is the highest rate at which 90 % of requests meet both SLOs (DistServe, OSDI'24, section 4). A colocated
cluster (no prefill worker, every decode worker computes its prompts itself) is one more candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec

from baton.proxy.settings import ProxySettings
from baton.simulator.latency import Profile
from baton.simulator.record import RunSummary, Slo, attainment, summarise
from baton.simulator.simulation import Scenario, simulate
from baton.simulator.workload import SimRequest

ENOUGH = 0.9
Workload = Callable[[float], Sequence[SimRequest]]
"""Requests at a rate of so many a second."""


@dataclass(frozen=True, slots=True)
class Split:
    """`prefill` 0 is colocated serving: prompts are computed in chunks of `chunk_tokens`, beside decoding."""

    prefill: int
    decode: int
    chunk_tokens: int = 0

    @property
    def name(self) -> str:
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
        return self.rate / (self.split.prefill + self.split.decode)


def splits(gpus: int, chunks: Sequence[int]) -> list[Split]:
    """Every split, then colocated serving with each chunk size: small chunks delay decoding less."""
    return [
        *(Split(prefill, gpus - prefill) for prefill in range(1, gpus)),
        *(Split(0, gpus, chunk) for chunk in chunks),
    ]


def scenario_of(split: Split, profile: Profile, proxy: ProxySettings, prefill_policy: str) -> Scenario:
    """`proxy` for splits that have prefill workers."""
    if not split.prefill:
        chunk = split.chunk_tokens
        profile = msgspec.structs.replace(profile, decode_chunk_tokens=chunk, decode_budget_tokens=chunk)
        proxy = replace(proxy, local_prefill="always")
    return Scenario(
        profile=profile,
        prefill=split.prefill,
        decode=split.decode,
        proxy=proxy,
        prefill_policy=prefill_policy,
    )


def goodput(scenario: Scenario, split: Split, workload: Workload, slo: Slo, first_rate: float, rounds: int) -> Goodput:
    """Double the rate, or halve it, until one is good and one is not; then bisect, `rounds` times."""
    runs = 0
    best: tuple[float, RunSummary, float] | None = None

    def good(rate: float) -> bool:
        nonlocal runs, best
        runs += 1
        records = simulate(scenario, workload(rate)).records
        attained = attainment(records, slo)
        if attained >= ENOUGH and (best is None or rate > best[0]):
            best = (rate, summarise(records), attained)
        return attained >= ENOUGH

    low, high = _bracket(good, first_rate)
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (middle, high) if good(middle) else (low, middle)
    rate, summary, attained = best or (0.0, summarise([]), 0.0)
    return Goodput(split, rate, summary, attained, runs)


def _bracket(good: Callable[[float], bool], rate: float) -> tuple[float, float]:
    """A rate that is good and one that is not, a factor of two apart; 0 counts as good."""
    if good(rate):
        while good(rate * 2) and rate < 1e6:
            rate *= 2
        return rate, rate * 2
    for _ in range(6):
        rate /= 2
        if good(rate):
            return rate, rate * 2
    return 0.0, rate
