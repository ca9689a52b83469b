"""When requests are due: seconds from the start of a run, drawn ahead of it. Pure and seeded.

Gaps between arrivals are gamma distributed with shape `burstiness`, so 1 is a Poisson process, below 1 comes in
bursts, above 1 is more even; or they are constant. As in `vllm bench serve` the sum is scaled to the time that the rate
implies, so that two seeds offer the same load; a ramp, whose rate changes with each request, is left as it was drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Ramp:
    """From one rate to another over the requests of a run, in requests/s."""

    start_rps: float
    end_rps: float
    exponential: bool

    def rates(self, count: int) -> np.ndarray:
        """The rate at each of `count` requests. [count]"""
        progress = np.linspace(0.0, 1.0, count) if count > 1 else np.zeros(count)
        if self.exponential:
            return self.start_rps * (self.end_rps / self.start_rps) ** progress
        return self.start_rps + (self.end_rps - self.start_rps) * progress


def all_at_once(count: int) -> list[float]:
    return [0.0] * count


def constant(count: int, rate: float) -> list[float]:
    """The same gap between any two; the first comes one gap after the start."""
    return [(number + 1) / rate for number in range(count)]


def gamma(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """`count` arrivals, the last after exactly count / rate seconds."""
    gaps = np.random.default_rng(seed).gamma(burstiness, 1.0 / (rate * burstiness), count)
    times = np.cumsum(gaps)
    if count and times[-1] > 0:
        times *= count / rate / times[-1]
    return [float(time) for time in times]


def ramp(count: int, shape: Ramp, burstiness: float, seed: int) -> list[float]:
    """Arrivals whose rate follows `shape`."""
    unit_gaps = np.random.default_rng(seed).gamma(burstiness, 1.0 / burstiness, count)
    return [float(time) for time in np.cumsum(unit_gaps / shape.rates(count))]


def scaled_to_rate(times_s: list[float], rate: float) -> list[float]:
    """The same pattern, faster or slower, so that its mean rate is `rate`."""
    span_s = max(times_s, default=0.0)
    if span_s == 0:
        return list(times_s)
    factor = len(times_s) / rate / span_s
    return [time * factor for time in times_s]


def spread(times_s: list[float], quantum_s: float, seed: int) -> list[float]:
    """Arrivals that were rounded down to `quantum_s`, each moved to a random place within it; the order is by time."""
    moves = np.random.default_rng(seed).uniform(0.0, quantum_s, len(times_s)) if quantum_s else np.zeros(len(times_s))
    return [float(time + move) for time, move in zip(times_s, moves, strict=True)]
