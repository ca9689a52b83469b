"""The best split into prefill and decode workers: DistServe's search over all splits, with the rate bisected.

Goodput is the highest rate at which 90 % of requests meet both SLOs (DistServe, OSDI'24, section 4). A colocated
cluster (no prefill worker, every decode worker computes its prompts itself) is one more candidate, adaptive roles
another. Workers may have several GPUs each, those of the two roles different numbers. All rates have the same requests,
faster or slower; a run ends as soon as too many of them have missed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import msgspec

from baton.proxy.settings import ProxySettings
from baton.simulator.bounds import Bound, bound, mean_work
from baton.simulator.latency import Profile
from baton.simulator.parallel import WorkerSize, of_size
from baton.simulator.record import ENOUGH, MissLimit, RunSummary, Slo, attainment, summarise
from baton.simulator.simulation import Scenario, simulate
from baton.simulator.workload import SimRequest

MOST_WIDER = {"split": 2, "colocated": 1, "adaptive": 1}
"""By kind of split. A search takes half a minute."""
FIRST = 0.75
"""Of a split's bound: the first rate to try. Most are good at a half and not at all of it."""
MOST = 1e6
Workload = Callable[[float], Sequence[SimRequest]]
"""Requests at a rate of so many a second."""


@dataclass(frozen=True, slots=True)
class Split:
    """`prefill` 0 is colocated serving: prompts are computed in chunks of `chunk_tokens`, beside decoding. With `mixed`
    workers, roles follow the load. The tensor parallel sizes are those of a worker, decode_tp of all but prefill ones.
    """

    prefill: int
    decode: int
    chunk_tokens: int = 0
    mixed: int = 0
    prefill_tp: int = 1
    decode_tp: int = 1

    @property
    def kind(self) -> str:
        """One of those of MOST_WIDER."""
        if self.mixed:
            return "adaptive"
        return "split" if self.prefill else "colocated"

    @property
    def name(self) -> str:
        tp = f" tp{self.decode_tp}" if self.decode_tp > 1 else ""
        if self.mixed:
            return f"{self.mixed} adaptive{tp}"
        if not self.prefill:
            return f"{self.decode} colocated{tp}, chunks of {self.chunk_tokens}"
        sizes = f" tp{self.prefill_tp}/{self.decode_tp}" if max(self.prefill_tp, self.decode_tp) > 1 else ""
        return f"{self.prefill}P{self.decode}D{sizes}"

    @property
    def sizes(self) -> tuple[WorkerSize, WorkerSize]:
        """Of prefill workers, or of those that prefill, and of the others."""
        decode = WorkerSize(self.decode_tp)
        return WorkerSize(self.prefill_tp) if self.prefill else decode, decode

    @property
    def gpus(self) -> int:
        return self.prefill * self.prefill_tp + (self.decode + self.mixed) * self.decode_tp


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
        return self.rate / self.split.gpus


def splits(gpus: int, chunks: Sequence[int]) -> list[Split]:
    """Adaptive roles, every split, and colocated serving with each chunk size: small chunks delay decoding less."""
    return [
        Split(0, 0, mixed=gpus),
        *(Split(prefill, gpus - prefill) for prefill in range(1, gpus)),
        *(Split(0, gpus, chunk) for chunk in chunks),
    ]


def wider_splits(gpus: int, chunks: Sequence[int], sizes: Sequence[int]) -> list[Split]:
    """The same of workers of which some have several GPUs, where these use all GPUs."""
    found = []
    for prefill_tp, decode_tp in product(sizes, repeat=2):
        if max(prefill_tp, decode_tp) == 1:
            continue
        for prefill in range(1, gpus // prefill_tp + 1):
            decode, left = divmod(gpus - prefill * prefill_tp, decode_tp)
            if decode and not left:
                found.append(Split(prefill, decode, prefill_tp=prefill_tp, decode_tp=decode_tp))
    for tp in (size for size in sizes if size > 1 and gpus % size == 0):
        found += [Split(0, gpus // tp, chunk, decode_tp=tp) for chunk in chunks]
        if gpus // tp > 1:
            found.append(Split(0, 0, mixed=gpus // tp, decode_tp=tp))
    return found


def promising(plain: Sequence[tuple[Split, Bound]], wider: Sequence[tuple[Split, Bound]]) -> list[tuple[Split, Bound]]:
    """Of workers of several GPUs those of the highest bounds, MOST_WIDER of a kind, where the model needs them or gains
    by them: no split of workers of one GPU has a bound as high."""
    found = []
    for kind, most in MOST_WIDER.items():
        limit = max((bound.rate for split, bound in plain if split.kind == kind), default=0.0)
        better = [each for each in wider if each[0].kind == kind and each[1].rate > limit]
        found += sorted(better, key=lambda each: -each[1].rate)[:most]
    return found


def scenario_of(split: Split, profile: Profile, proxy: ProxySettings, prefill_policy: str) -> Scenario:
    """`proxy` for splits that have prefill workers."""
    if split.kind == "colocated":
        proxy = replace(proxy, local_prefill="always")
    return Scenario(
        profile=_chunked(split, profile),
        prefill=split.prefill,
        decode=split.decode,
        mixed=split.mixed,
        prefill_size=split.sizes[0],
        decode_size=split.sizes[1],
        proxy=proxy,
        prefill_policy=prefill_policy,
        late_events=True,
    )


def bound_of(split: Split, requests: Sequence[SimRequest], profile: Profile, slo: Slo, local: str) -> Bound:
    """`local` for splits that have prefill workers. Adaptive roles have the best bound of all splits."""
    if split.mixed:
        n = split.mixed
        same = replace(split, mixed=0, chunk_tokens=0, prefill_tp=split.decode_tp)
        others = [replace(same, prefill=m, decode=n - m) for m in range(n)]
        return max((bound_of(each, requests, profile, slo, "auto") for each in others), key=lambda each: each.rate)
    profile = _chunked(split, profile)
    prefill, sized = (of_size(profile, size) for size in split.sizes)
    work = mean_work(requests, sized, slo, prefill)
    return bound(split.prefill, split.decode, local, work, sized, slo)


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
