"""The best split into prefill and decode workers: DistServe's search over all splits, with the rate bisected.

Goodput is the highest rate at which 90 % of requests meet both SLOs (DistServe, OSDI'24, section 4). A colocated
cluster (no prefill worker, every decode worker computes its prompts itself) is one more candidate.
"""

from __future__ import annotations

import math
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
    """`prefill` 0 is colocated serving: prompts are computed in chunks of `chunk_tokens`, beside decoding. With `mixed`
    workers, roles follow the load."""

    prefill: int
    decode: int
    chunk_tokens: int = 0
    mixed: int = 0

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
    if split.decode and not split.prefill:
        chunk = split.chunk_tokens
        profile = msgspec.structs.replace(profile, decode_chunk_tokens=chunk, decode_budget_tokens=chunk)
        proxy = replace(proxy, local_prefill="always")
    return Scenario(
        profile=profile,
        prefill=split.prefill,
        decode=split.decode,
        mixed=split.mixed,
        proxy=proxy,
        prefill_policy=prefill_policy,
    )


def goodput(scenario: Scenario, split: Split, workload: Workload, slo: Slo, first_rate: float, rounds: int) -> Goodput:
    """Double the rate, or halve it, until one is good and one is not; then bisect, `rounds` times. Of a split that is
    not good at a quarter of the first rate no rate is found."""
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
    for _ in range(2):
        rate /= 2
        if good(rate):
            return rate, rate * 2
    return 0.0, rate


def first_guess(requests: Sequence[SimRequest], profile: Profile, gpus: int) -> float:
    """Requests a second that so many workers may serve: where prompts, and steps of 32 rows, take half of the time."""
    prompt = math.fsum(profile.prefill.seconds(r.prompt_tokens, r.prompt_tokens**2) for r in requests)
    context = [r.prompt_tokens + r.output_tokens / 2 for r in requests]
    step_s = profile.decode.seconds(32 * math.fsum(context) / len(context), 32)
    answer = math.fsum(r.output_tokens for r in requests) * step_s / 32
    return gpus * len(requests) / (prompt + answer) / 2
