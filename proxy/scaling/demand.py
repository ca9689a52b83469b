"""The workers of a role that the arrivals ask for, before any latency shows it. Knows no clock and no request.

A worker is full when its rows or its blocks are. A step takes a + k rows; of its time, prompts take a part R, and
answers K = k times its tokens a second, so a token takes a / (1 - R - K). With L tokens an answer, S seconds a prompt,
and h the part of a worker's rows or blocks that a request holds, r requests a second fill

    r (S + L k + L a h)   workers,  or  r (S + L k) / (1 - a / TPOT)  where the objective of TPOT is reached before

which is linear in r, while latencies are not: they say little until a worker is full, and then grow at once. The rate
says it as long before as an answer takes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from baton.proxy.routing.router import WorkerView

MEAN_S, RECENT_S = 60.0, 15.0
SIGMAS = 2.0
"""The last RECENT_S are taken for the rate where their arrivals differ by more than chance from those of MEAN_S."""
MAX_ARRIVALS = 1 << 14


class ArrivalRate:
    """Requests a second: the mean of the last minute, or of the last seconds if the rate has changed since."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=MAX_ARRIVALS)
        self._began_at = math.inf

    def add(self, now: float) -> None:
        self._began_at = min(self._began_at, now)
        self._times.append(now)

    def rate(self, now: float) -> float:
        times = self._times
        while times and times[0] < now - MEAN_S:
            times.popleft()
        if not times:
            return 0.0
        begin = times[0] if len(times) == MAX_ARRIVALS else max(self._began_at, now - MEAN_S)
        usual = len(times) / max(now - begin, 1.0)
        recent_s = min(RECENT_S, max(now - begin, 1.0))
        recent = sum(1 for _ in _newer(times, now - recent_s))
        expected = usual * recent_s
        return recent / recent_s if abs(recent - expected) > SIGMAS * math.sqrt(expected) else usual


def _newer(times: deque[float], begin: float) -> Iterable[float]:
    for at in reversed(times):
        if at < begin:
            return
        yield at


@dataclass(frozen=True, slots=True)
class RoleCapacity:
    """Of the workers of one role that take requests, together."""

    ready: int = 0
    requests: int = 0
    rows: int = 0
    blocks: int = 0
    used_blocks: int = 0
    prompt_tokens_s: float = 0.0


def capacities(view: Iterable[WorkerView]) -> Mapping[str, RoleCapacity]:
    found: dict[str, RoleCapacity] = {}
    for worker in view:
        if not worker.draining:
            known = found.get(worker.role, RoleCapacity())
            found[worker.role] = RoleCapacity(
                known.ready + 1,
                known.requests + worker.requests,
                known.rows + worker.max_num_seqs,
                known.blocks + worker.total_blocks,
                known.used_blocks + worker.total_blocks - worker.free_blocks,
                known.prompt_tokens_s + worker.tokens_s,
            )
    return found


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Requests a second, and the mean of them. `step_s` and `row_s`: a and k, 0 where no answers are computed."""

    rate: float
    prompt_tokens: float
    """To compute."""
    answer_tokens: float
    step_s: float
    row_s: float


def busy_workers(capacity: RoleCapacity, arrivals: Arrivals, tpot_s: float, *, prompts: bool, answers: bool) -> float:
    """How many workers of this kind the arrivals fill. `prompts`, `answers`: what the role computes."""
    if not (capacity.ready and arrivals.rate):
        return 0.0
    time_s = arrivals.prompt_tokens * capacity.ready / capacity.prompt_tokens_s if prompts else 0.0
    if not answers:
        return arrivals.rate * time_s
    time_s += arrivals.answer_tokens * arrivals.row_s
    held = capacity.ready / capacity.rows
    if capacity.blocks and capacity.requests:
        held = max(held, capacity.used_blocks / capacity.requests * capacity.ready / capacity.blocks)
    room = max(0.1, 1 - arrivals.step_s / tpot_s)
    return arrivals.rate * max(time_s + arrivals.answer_tokens * arrivals.step_s * held, time_s / room)
