"""The figures of a run, out of its records. Pure; definitions and names are those of `vllm bench serve`.

TTFT, ITL and E2EL as `meter` and `record` define them, TPOT = (E2EL - TTFT) / (output tokens - 1), all in ms and over
completed requests only; percentiles are linearly interpolated; std is the population's. Goodput counts completed
requests that keep every objective, one without a second token having TPOT 0. Latencies begin when a request was due.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from baton.benchmark.load.record import CANCELLED, FAILED, Record
from baton.node.errors import SettingsError

METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclass(frozen=True, slots=True)
class Objectives:
    """Limits in ms by metric, of a request: ttft, tpot, e2el."""

    limits_ms: Mapping[str, float]

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Objectives:
        """From "ttft:1000" and the like; raises SettingsError."""
        limits: dict[str, float] = {}
        for text in texts:
            name, _, value = text.partition(":")
            try:
                limits[name] = float(value)
            except ValueError:
                limits[name] = -1.0
            if name not in ("ttft", "tpot", "e2el") or not limits[name] >= 0:
                raise SettingsError(f"objective {text!r}: ttft, tpot or e2el, a colon, and a number of milliseconds")
        return cls(limits)

    def keeps(self, record: Record) -> bool:
        """Completed, and within every limit."""
        values = {"ttft": record.ttft_s, "tpot": record.tpot_s, "e2el": record.e2el_s}
        return record.completed and all(1000 * (values[name] or 0.0) <= ms for name, ms in self.limits_ms.items())

    def __str__(self) -> str:
        return ", ".join(f"{name} ≤ {ms:g} ms" for name, ms in self.limits_ms.items())


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of a latency, in ms; zeros where there is no value, as vLLM prints them."""

    count: int
    mean: float
    median: float
    std: float
    percentiles: tuple[tuple[float, float], ...]
    """(percentile, value)"""

    @classmethod
    def of(cls, values_s: Sequence[float], percentiles: Sequence[float]) -> Distribution:
        values = np.asarray(values_s if len(values_s) else (0.0,)) * 1000
        at = [(p, float(np.percentile(values, p))) for p in percentiles]
        return cls(len(values_s), float(values.mean()), float(np.median(values)), float(values.std()), tuple(at))

    def at(self, percentile: float) -> float:
        """One of the percentiles that were asked for."""
        return dict(self.percentiles)[percentile]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The figures of one run."""

    duration_s: float
    completed: int
    failed: int
    cancelled: int
    unsent: int
    failures: tuple[tuple[str, int], ...]
    """(reason, requests), the most frequent first."""
    good: int
    """Completed requests that kept the objectives; all completed ones where there are none."""
    total_input_tokens: int
    total_cached_tokens: int
    total_output_tokens: int
    tokens_counted: bool
    """By the server, for every completed request."""
    tokens_per_chunk: float
    max_concurrent_requests: int
    max_output_tokens_per_s: float
    latencies: Mapping[str, Distribution]
    """By the names in METRICS."""
    schedule_lag: Distribution
    client_queue: Distribution

    @property
    def request_throughput(self) -> float:
        return self._rate(self.completed)

    @property
    def request_goodput(self) -> float:
        return self._rate(self.good)

    @property
    def output_throughput(self) -> float:
        return self._rate(self.total_output_tokens)

    @property
    def total_token_throughput(self) -> float:
        return self._rate(self.total_input_tokens + self.total_output_tokens)

    @property
    def attainment(self) -> float:
        """Part of the requests, but those this client cancelled, that kept the objectives."""
        judged = self.completed + self.failed + self.unsent
        return self.good / judged if judged else 0.0

    def _rate(self, count: int) -> float:
        return count / self.duration_s if self.duration_s > 0 else 0.0


def summarize(
    records: Sequence[Record],
    duration_s: float,
    num_unsent: int,
    objectives: Objectives,
    percentiles: Sequence[float],
) -> Summary:
    done = [record for record in records if record.completed]
    chunks = sum(1 + len(record.gaps_s) for record in done)
    tokens = sum(record.output_tokens for record in done)
    values = {
        "ttft": [record.ttft_s for record in done if record.ttft_s is not None],
        "tpot": [record.tpot_s for record in done if record.tpot_s is not None],
        "itl": [gap for record in done for gap in record.gaps_s],
        "e2el": [record.e2el_s for record in done],
    }
    return Summary(
        duration_s=duration_s,
        completed=len(done),
        failed=sum(record.status == FAILED for record in records),
        cancelled=sum(record.status == CANCELLED for record in records),
        unsent=num_unsent,
        failures=tuple(Counter(record.error for record in records if record.error).most_common()),
        good=sum(map(objectives.keeps, done)),
        total_input_tokens=sum(record.prompt_tokens for record in done),
        total_cached_tokens=sum(record.cached_tokens for record in done),
        total_output_tokens=tokens,
        tokens_counted=all(record.counted for record in done),
        tokens_per_chunk=tokens / chunks if chunks else 0.0,
        max_concurrent_requests=_peak_concurrency(records),
        max_output_tokens_per_s=_peak_tokens(done),
        latencies={name: Distribution.of(found, percentiles) for name, found in values.items()},
        schedule_lag=Distribution.of([record.lag_s for record in records], percentiles),
        client_queue=Distribution.of([record.queue_s for record in records], percentiles),
    )


def _peak_concurrency(records: Sequence[Record]) -> int:
    """Most requests between sending and end at one time; one that ends as another begins is not beside it."""
    steps = [(r.sent_s, 1) for r in records] + [(max(r.last_s, r.sent_s), -1) for r in records]
    peak = running = 0
    for _, step in sorted(steps):
        running += step
        peak = max(peak, running)
    return peak


def _peak_tokens(done: Sequence[Record]) -> float:
    """Most output tokens in one whole second from the start; those of an answer are spread evenly over its chunks."""
    tokens: dict[int, float] = {}
    for record in done:
        if record.first_s is None:
            continue
        weight = record.output_tokens / (1 + len(record.gaps_s))
        times_s = record.first_s + np.cumsum((0.0, *record.gaps_s))
        for second, chunks in Counter(times_s.astype(int).tolist()).items():
            tokens[second] = tokens.get(second, 0.0) + weight * chunks
    return max(tokens.values(), default=0.0)
