"""What a client sees of each request, and the usual metrics: TTFT, TPOT, ITL, E2E, goodput. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.simulator.workload import SimRequest, gaps

ENOUGH = 0.9
"""The part of the requests that must meet the SLO."""


@dataclass(slots=True)
class RequestRecord:
    """One request. Times are in seconds of the simulated clock; `error` is "" for one that was served."""

    request: SimRequest
    token_s: list[float] = field(default_factory=list)
    """When the client had each token."""
    cached_tokens: int = 0
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def longest_wait_s(self) -> float:
        """For a token, the first included."""
        return max(gaps((self.request.arrival_s, *self.token_s)), default=0.0)

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.request.arrival_s

    @property
    def e2e_s(self) -> float:
        return self.token_s[-1] - self.request.arrival_s

    @property
    def tpot_s(self) -> float:
        """Mean time of a token after the first; 0 where there is only one."""
        return (self.token_s[-1] - self.token_s[0]) / max(1, len(self.token_s) - 1)


@dataclass(frozen=True, slots=True)
class Slo:
    """Bounds of TTFT and TPOT: a request meets the SLO if it is served within both."""

    ttft_s: float
    tpot_s: float

    def met_by(self, record: RequestRecord) -> bool:
        return record.ok and record.ttft_s <= self.ttft_s and record.tpot_s <= self.tpot_s


class MissLimit:
    """Says of a run in progress that fewer than ENOUGH of its requests can meet the SLO."""

    def __init__(self, slo: Slo, num_requests: int) -> None:
        self._slo = slo
        self._most = num_requests - math.ceil(ENOUGH * num_requests)

    def __call__(self, records: Sequence[RequestRecord], now_s: float) -> bool:
        """`now_s` on the clock of the records."""
        return sum(self._misses(record, now_s) for record in records) > self._most

    def _misses(self, record: RequestRecord, now_s: float) -> bool:
        slo, request, times = self._slo, record.request, record.token_s
        if record.error or (times[0] if times else now_s) - request.arrival_s > slo.ttft_s:
            return True
        later = request.output_tokens - 1
        return bool(times) and (times[-1] if len(times) > later else now_s) - times[0] > later * slo.tpot_s


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of some durations; all nan if there are none."""

    mean_s: float
    p50_s: float
    p99_s: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            return cls(math.nan, math.nan, math.nan)
        ordered = sorted(values)
        return cls(math.fsum(ordered) / len(ordered), percentile(ordered, 50), percentile(ordered, 99))


def percentile(ordered: Sequence[float], percent: float) -> float:
    """With linear interpolation between the two nearest ranks, as numpy's default."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class RunSummary:
    """The summary of a run."""

    requests: int
    failed: int
    duration_s: float
    """From the first arrival to the last token."""
    ttft: Spread
    tpot: Spread
    itl: Spread
    e2e: Spread
    output_tokens: int
    cached_share: float
    """Of the prompt tokens, those that were not computed."""

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.duration_s if self.duration_s else 0.0


def summarise(records: Sequence[RequestRecord]) -> RunSummary:
    """Latencies of the requests that were served; the duration is from the first arrival to the last token."""
    served = [record for record in records if record.ok]
    first = min((record.request.arrival_s for record in records), default=0.0)
    last = max((record.token_s[-1] for record in served), default=first)
    prompt = sum(record.request.prompt_tokens for record in served)
    return RunSummary(
        requests=len(records),
        failed=len(records) - len(served),
        duration_s=last - first,
        ttft=Spread.of([record.ttft_s for record in served]),
        tpot=Spread.of([record.tpot_s for record in served if len(record.token_s) > 1]),
        itl=Spread.of([gap for record in served for gap in gaps(record.token_s)]),
        e2e=Spread.of([record.e2e_s for record in served]),
        output_tokens=sum(len(record.token_s) for record in served),
        cached_share=sum(record.cached_tokens for record in served) / prompt if prompt else 0.0,
    )


def attainment(records: Sequence[RequestRecord], slo: Slo) -> float:
    """The part of all requests, failed ones included, that met the SLO."""
    return sum(slo.met_by(record) for record in records) / len(records) if records else 0.0
