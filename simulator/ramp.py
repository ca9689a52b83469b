"""A load that rises and falls, served by workers that an autoscaler starts and drains by the proxy's gauges.

The law is the proxy's (proxy/scaling); here are the autoscaler's bounds and the time that a worker takes to start, and
the load: stages of constant rates, as in llm-d's benchmark of its SLO law for KEDA (llm-d/llm-d,
guides/workload-autoscaling/slo-aware/benchmark-templates/BENCHMARK.md).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from baton.simulator.workload import LengthSampler, SimRequest


@dataclass(frozen=True, slots=True)
class Autoscale:
    """Bounds of an autoscaler of one role's workers."""

    least: int
    most: int
    start_s: float
    """From the decision until a worker takes requests."""


def staged(
    stages: Sequence[tuple[float, float]],
    prompt: LengthSampler,
    output: LengthSampler,
    chance: random.Random | None = None,
) -> list[SimRequest]:
    """Stages of so many requests a second for so many seconds: at even intervals, or by chance."""
    lengths, requests, begin_s = chance or random.Random(0), list[SimRequest](), 0.0
    for rate, seconds in stages:
        for at_s in _even(rate, seconds) if chance is None else _by_chance(rate, seconds, chance):
            number, tokens = len(requests), prompt.draw(lengths)
            requests.append(SimRequest(number, begin_s + at_s, tokens, output.draw(lengths), (number,), tokens))
        begin_s += seconds
    return requests


def _even(rate: float, seconds: float) -> Iterator[float]:
    return (number / rate for number in range(round(rate * seconds)))


def _by_chance(rate: float, seconds: float, chance: random.Random) -> Iterator[float]:
    at_s = chance.expovariate(rate)
    while at_s < seconds:
        yield at_s
        at_s += chance.expovariate(rate)


def mean_level(levels: Sequence[tuple[float, int]], end_s: float) -> float:
    """Of a count that changes at these times, from the first of them on."""
    times = [at for at, _ in levels] + [end_s]
    area = sum(count * (after - at) for (at, count), after in zip(levels, times[1:], strict=True))
    return area / (end_s - times[0])
