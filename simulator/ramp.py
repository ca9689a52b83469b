"""A load that rises and falls, served by workers that an autoscaler starts and drains by the proxy's gauges.

The law is the proxy's (proxy/scaling); here are the autoscaler's bounds and the time that a worker takes to start, and
the load: stages of constant rates, as in llm-d's benchmark of its SLO law for KEDA (llm-d/llm-d,
guides/workload-autoscaling/slo-aware/benchmark-templates/BENCHMARK.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.simulator.workload import SimRequest

LLMD_STAGES = ((2.0, 330.0), (4.0, 360.0), (6.0, 360.0), (8.0, 360.0), (10.0, 360.0), (4.0, 360.0), (1.0, 300.0))
"""Requests a second, and for how many seconds."""


@dataclass(frozen=True, slots=True)
class Autoscale:
    """Bounds of an autoscaler of one role's workers."""

    least: int
    most: int
    start_s: float
    """From the decision until a worker takes requests."""


def staged(
    stages: Sequence[tuple[float, float]], prompt_tokens: int, output_tokens: int, part: float = 1.0
) -> list[SimRequest]:
    """Requests at even intervals; `part` of each stage's time."""
    requests: list[SimRequest] = []
    begin_s = 0.0
    for rate, seconds in stages:
        for number in range(round(rate * seconds * part)):
            at_s = begin_s + number / rate
            requests.append(
                SimRequest(len(requests), at_s, prompt_tokens, output_tokens, (len(requests),), prompt_tokens)
            )
        begin_s += seconds * part
    return requests


def mean_level(levels: Sequence[tuple[float, int]], end_s: float) -> float:
    """Of a count that changes at these times, from the first of them on."""
    times = [at for at, _ in levels] + [end_s]
    area = sum(count * (after - at) for (at, count), after in zip(levels, times[1:], strict=True))
    return area / (end_s - times[0])
