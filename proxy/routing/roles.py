"""Which mixed workers take prompts, and how many of them: a plan for the load of the last seconds. Knows no clock.

A mixed worker can compute prompts and answers. Of n workers m take no new answers (m = 0: each computes the prompts of
its own answers). A worker that changes sides drains nothing: it goes on with what it has. From the workers' heartbeats
a step of `rows` answers is known to take a + k rows seconds where no prompt is in it. With S the seconds of a prompt, R
the prompts' load in workers, and K = k times the tokens of answers a second:

    m = 0   TPOT  a / (1 - R/n - K/n)                prompts hold up answers
            TTFT  S + wait(n, R/n) + a step
    m > 0   TPOT  a / (1 - (H + K)/(n - m))          fewer workers have more rows each
            TTFT  S + min(wait(m, R/m), w rows S)

A prompt that would wait for longer than w rows S, the weighted delay of the answers on a worker without prompts, is
computed there (decision 6); H is the load of those. The plan is the m and w for which the sum of squares of TTFT and
TPOT, each by its objective, is least, if it is less by a margin. What was measured last corrects the prediction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from baton.proxy.routing.router import RequestView, Route, RoutingRules, Wait, WorkerView, pick

MEAN_S = 8.0
"""Rates are means over about so long."""
MARGIN = 0.1
"""A plan must be better by this part to replace the one in force ..."""
DWELL_S = 4.0
"""... which lasts at least so long."""
WEIGHTS = (0.1, 0.25, 0.6, 1.5, 4.0)
"""Of a delay of answers against that of a first token; with the last one hardly any answer is delayed."""
PRIOR_ROW_PART = 0.015
"""A row takes this part of a step until it has been measured: one of 2048 tokens of an 8B model."""
PRIOR_INTERVALS = 1.0
MEMORY = 0.98
"""Weight of earlier intervals at each new one, in what is known of steps."""
TENTH = math.log(10)


@dataclass(frozen=True, slots=True)
class Progress:
    """What one worker has done between two reports."""

    seconds: float
    steps: int
    prompt_tokens: float
    answer_tokens: float
    busy: bool
    """It had answers to compute all the time."""


class StepTimes:
    """Seconds of a step by its rows, a + k n, by least squares over the intervals that were seen."""

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, rows: float, seconds: float) -> None:
        sums = (1.0, rows, seconds, rows * rows, rows * seconds)
        old = (self._n, self._x, self._y, self._xx, self._xy)
        self._n, self._x, self._y, self._xx, self._xy = (MEMORY * o + new for o, new in zip(old, sums, strict=True))

    def fit(self) -> tuple[float, float]:
        """(a, k); the prior's ratio where rows did not differ enough to say."""
        if not self._n:
            return 0.005, 0.005 * PRIOR_ROW_PART
        mean_rows, mean_s = self._x / self._n, self._y / self._n
        variance = max(0.0, self._xx / self._n - mean_rows**2)
        covariance = self._xy / self._n - mean_rows * mean_s
        prior = mean_s * PRIOR_ROW_PART / (1 + PRIOR_ROW_PART * mean_rows)
        row_s = (covariance * self._n + prior * PRIOR_INTERVALS) / (variance * self._n + PRIOR_INTERVALS)
        row_s = min(max(row_s, 0.0), 0.9 * mean_s / mean_rows if mean_rows else mean_s)
        return mean_s - row_s * mean_rows, row_s


@dataclass(frozen=True, slots=True)
class Plan:
    """How many workers take prompts alone, and the weight of the answers' delay for the others."""

    num_prompts: int
    weight: float


class MixedRoles:
    """The plan for the mixed workers of one model."""

    def __init__(self, ttft_s: float, tpot_s: float) -> None:
        """The objectives."""
        self.prompts: frozenset[str] = frozenset()
        """Workers that take no new answers."""
        self.current = Plan(0, WEIGHTS[1])
        self._ttft_s, self._tpot_s = ttft_s, tpot_s
        self._steps = StepTimes()
        self._prompt_rate: dict[str, float] = {}
        self._answer_rate: dict[str, float] = {}
        self._prompt_s = 0.0
        self._prompt_s2 = 0.0
        self._decided_at = -math.inf

    # -- what is measured

    def prompt(self, seconds: float) -> None:
        """A prompt was sent off that takes so long to compute."""
        part = 0.05 if self._prompt_s else 1.0
        self._prompt_s += part * (seconds - self._prompt_s)
        self._prompt_s2 += part * (seconds**2 - self._prompt_s2)

    def progress(self, worker: str, done: Progress, tokens_s: float) -> None:
        """A worker's report; `tokens_s` is its speed of prompts."""
        if done.seconds <= 0:
            return
        part = 1 - math.exp(-done.seconds / MEAN_S)
        for rates, tokens in ((self._prompt_rate, done.prompt_tokens), (self._answer_rate, done.answer_tokens)):
            rate = tokens / done.seconds
            rates[worker] = rates.get(worker, rate) + part * (rate - rates.get(worker, rate))
        decoding_s = done.seconds - done.prompt_tokens / tokens_s
        if done.busy and done.steps and decoding_s > 0.5 * done.seconds:
            self._steps.add(done.answer_tokens / done.steps, decoding_s / done.steps)

    # -- what is planned

    def plan(self, view: Sequence[WorkerView], slack: tuple[float, float], now: float) -> None:
        """Choose the workers for prompts. `slack`: TTFT and TPOT of the last seconds, by their objectives."""
        mixed = [worker for worker in view if worker.role == "mixed" and not worker.draining]
        names = {worker.identity for worker in mixed}
        for rates in (self._prompt_rate, self._answer_rate):
            for gone in rates.keys() - names:
                del rates[gone]
        self.prompts &= names
        if len(mixed) > 1 and self._prompt_s and now - self._decided_at >= DWELL_S:
            best = self._best(mixed, slack)
            if best != self.current:
                self._decided_at, self.current = now, best
        self._fill(mixed)

    def _fill(self, mixed: Sequence[WorkerView]) -> None:
        """As many workers for prompts as planned, those with the fewest requests; one is left for answers."""
        num_prompts = max(0, min(self.current.num_prompts, len(mixed) - 1))
        if len(self.prompts) != num_prompts:
            order = sorted(mixed, key=lambda each: (each.identity not in self.prompts, each.requests, each.identity))
            self.prompts = frozenset(worker.identity for worker in order[:num_prompts])

    def _best(self, mixed: Sequence[WorkerView], slack: tuple[float, float]) -> Plan:
        tokens_s = sum(worker.tokens_s for worker in mixed) / len(mixed)
        backlog = sum(worker.tokens for worker in mixed)
        load, n = (sum(self._prompt_rate.values()) + backlog / MEAN_S) / tokens_s, len(mixed)
        plans = [Plan(0, self.current.weight)]
        plans += [Plan(num_prompts, weight) for num_prompts in range(1, n) for weight in WEIGHTS]
        expected = self.predict(self.current, n, load)
        measured = (slack[0] * self._ttft_s, slack[1] * self._tpot_s)
        factors = [min(max(m / e, 0.5), 2.0) if m else 1.0 for m, e in zip(measured, expected, strict=True)]

        def cost(plan: Plan) -> float:
            ttft_s, tpot_s = self.predict(plan, n, load)
            return (factors[0] * ttft_s / self._ttft_s) ** 2 + (factors[1] * tpot_s / self._tpot_s) ** 2

        best = min(plans, key=cost)
        return best if cost(best) < (1 - MARGIN) * cost(self.current) else self.current

    def predict(self, plan: Plan, n: int, load: float) -> tuple[float, float]:
        """(TTFT, TPOT) in seconds, with n workers; `load` of prompts, in workers."""
        (a, k), answers, m = self._steps.fit(), sum(self._answer_rate.values()), min(plan.num_prompts, n - 1)
        spread = self._prompt_s2 / self._prompt_s**2 / 2 if self._prompt_s else 0.5
        if m == 0:
            tpot_s = a / _room((load + k * answers) / n)
            return self._prompt_s * (1 + spread * _wait(n, load / n)) + tpot_s, tpot_s
        tpot_s, longest, helped = a / _room(k * answers / (n - m)), 0.0, 0.0
        for _ in range(2):  # rows depend on TPOT, which depends on the prompts that rows keep away
            longest = plan.weight * answers * tpot_s / (n - m)
            helped = load * _overflow(load / m, m * (1 + longest))
            tpot_s = a / _room((helped + k * answers) / (n - m))
        return self._prompt_s * (1 + min(longest, spread * _wait(m, (load - helped) / m))), tpot_s


def pick_mixed(
    view: Sequence[WorkerView], request: RequestView, rules: RoutingRules, mixed: MixedRoles
) -> Route | Wait:
    """As `pick`, where mixed workers have the roles of the plan. Those for prompts take answers where the others have
    no room."""
    if not any(worker.role == "mixed" for worker in view):
        return pick(view, request, rules)
    if mixed.prompts:
        weighted = replace(rules, local_prefill="auto", local_prefill_itl_weight=mixed.current.weight)
        route = pick(_assigned(view, mixed.prompts), request, weighted)
        if isinstance(route, Route):
            return route
    return pick(_assigned(view, frozenset()), request, replace(rules, local_prefill="always"))


def _assigned(view: Sequence[WorkerView], prompts: frozenset[str]) -> list[WorkerView]:
    """The view with a role for each mixed worker."""
    return [
        replace(worker, role="prefill" if worker.identity in prompts else "decode")
        if worker.role == "mixed"
        else worker
        for worker in view
    ]


def _room(used: float) -> float:
    """What is left of a worker; never nothing, so that worse plans stay comparable."""
    return 1 - used if used < 0.95 else 0.05 * math.exp(-8 * (used - 0.95))


def _wait(servers: int, used: float) -> float:
    """90th percentile of the wait of M/M/c in services; the chance of a wait is Sakasegawa's approximation (1977)."""
    used = min(max(used, 1e-6), 0.98)
    waits = used ** (math.sqrt(2 * (servers + 1)) - 1)
    return max(0.0, TENTH + math.log(waits)) / (servers * (1 - used))


def _overflow(used: float, places: float) -> float:
    """The part that finds M/M/1 with so many places full."""
    if abs(used - 1) < 1e-6:
        return 1 / (1 + places)
    if used > 1:  # the same, without large powers
        return (used - 1) / (used - used**-places)
    return (1 - used) * used**places / (1 - used ** (places + 1))
