"""Which mixed workers take prompts, and how many of them: a plan for the load of the last seconds. Knows no clock.

A mixed worker can compute prompts and answers. Of n workers m take no new answers (m = 0: each computes the prompts of
its own answers). A worker that changes sides drains nothing: it goes on with what it has. From the workers' heartbeats
a step of `rows` answers is known to take a + k rows seconds where no prompt is in it. With S the seconds of a prompt, R
the prompts' load in workers, and K = k times the tokens of answers a second:

    m = 0   TPOT  a / (1 - R/n - K/n)                prompts hold up answers
            TTFT  S + wait(n, R/n) + a step
    m > 0   TPOT  a / (1 - (H + K)/(n - m))          fewer workers have more rows each
            TTFT  S + wait(m, R/m), but at most w rows S

A prompt that would wait for longer than w rows S, the weighted delay of the answers on a worker without prompts, is
computed there (decision 6); H is the load of those. The plan is the m and w for which the sum of squares of the 90th
percentiles of TTFT and TPOT, each by its objective, is least, if it is less by a margin. Until an answer has ended,
half of the workers take prompts: a worker that has no answers changes sides without cost. What was measured under plans
with hand-overs, and under the one without, corrects the predictions of each: that steps of many rows are slower shows
only where such are.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from baton.proxy.routing.router import RequestView, Route, RoutingRules, Wait, WorkerView, pick

MEAN_S, MEAN_ARRIVALS, LONGEST_MEAN_S = 8.0, 64, 30.0
"""Rates are means over so long, or over so many prompts if that is longer, at most the last: a mean of few prompts is
often far from the rate, and where workers are nearly full, costs are not linear in it."""
MAX_ARRIVALS = 4096
SETTLED_ANSWERS = 3.0
"""What is measured before a plan, or the first request, is so many answers old says little of the plan."""
CORRECTION = 0.05
"""Weight of a new measurement in a correction; four are made in a second."""
FORGET_S = 120.0
"""A correction of plans that are not in force is good for so long."""
MARGIN = 0.1
"""A plan must be better by this part to replace the one in force ..."""
DWELL_S, DWELL_ANSWERS = 4.0, 1.5
"""... which lasts at least so long, and so many times as long as an answer: a worker that changes sides keeps its
answers, beside all of the prompts."""
WEIGHTS = (0.1, 0.25, 0.6, 1.5, 4.0)
"""Of a delay of answers against that of a first token; with the last one hardly any answer is delayed."""
PRIOR_ROW_PART, PRIOR_CONTEXT = 0.015, 2048
"""A row of so many tokens takes this part of a step until it has been measured: with an 8B model."""
PRIOR_WEIGHT = 100.0
"""Intervals times the variance of their rows: with less, chance says more of a row than the steps that were seen."""
SURE, OUTLIER = 10.0, 1.2
"""From so many intervals on, a step counts as at most this many times as long as expected."""
MEMORY = 0.995
"""Weight of earlier intervals at each new one, in what is known of steps."""
TENTH = math.log(10)
NINETIETH = 1.2816
"""Standard deviations up to the 90th percentile."""


@dataclass(frozen=True, slots=True)
class WorkerInterval:
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
        self.row_part = PRIOR_ROW_PART
        """Of a step, by what is known of the rows' contexts."""
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, rows: float, seconds: float, weight: float = 1.0) -> None:
        """A step of so many rows took so long; what is far longer than expected was not all the step's."""
        if self._n > SURE:
            a, k = self.fit()
            seconds = min(seconds, OUTLIER * (a + k * rows))
        sums = (weight, weight * rows, weight * seconds, weight * rows * rows, weight * rows * seconds)
        old = (self._n, self._x, self._y, self._xx, self._xy)
        self._n, self._x, self._y, self._xx, self._xy = (MEMORY * o + new for o, new in zip(old, sums, strict=True))

    def fit(self) -> tuple[float, float]:
        """(a, k); the prior's ratio where rows did not differ enough to say."""
        if not self._n:
            return 0.005, 0.005 * self.row_part
        mean_rows, mean_s = self._x / self._n, self._y / self._n
        variance = max(0.0, self._xx / self._n - mean_rows**2)
        covariance = self._xy / self._n - mean_rows * mean_s
        prior = mean_s * self.row_part / (1 + self.row_part * mean_rows)
        row_s = (covariance * self._n + prior * PRIOR_WEIGHT) / (variance * self._n + PRIOR_WEIGHT)
        row_s = min(max(row_s, 0.0), 0.9 * mean_s / mean_rows if mean_rows else mean_s)
        return mean_s - row_s * mean_rows, row_s


@dataclass(frozen=True, slots=True)
class Demand:
    """What the requests ask of the workers."""

    load: float
    """Prompts, in workers that compute nothing else."""
    prompt_s: float
    """Of a mean one."""
    long_s: float
    """Of the longest but for a tenth."""
    spread: float
    """E[s^2] / 2 E[s]^2 of the seconds of prompts: 0.5 where all are equal."""
    answers: float
    """Tokens of answers a second."""


@dataclass(frozen=True, slots=True)
class RolePlan:
    """How many workers take prompts alone, and the weight of the answers' delay for the others."""

    num_prompts: int
    weight: float


@dataclass(slots=True)
class Correction:
    """Measured TTFT and TPOT by the predicted ones."""

    ttft: float = 1.0
    tpot: float = 1.0
    seen_at: float = -math.inf

    def learn(self, measured: tuple[float, float], expected: tuple[float, float], now: float) -> None:
        """A measured 0 says nothing."""
        part = CORRECTION if now - self.seen_at < FORGET_S else 1.0
        ratios = [min(max(m / e, 0.5), 2.0) if m else None for m, e in zip(measured, expected, strict=True)]
        self.ttft += part * ((ratios[0] or self.ttft) - self.ttft)
        self.tpot += part * ((ratios[1] or self.tpot) - self.tpot)
        self.seen_at = now


class MixedRoles:
    """The plan for the mixed workers of one model."""

    def __init__(self, ttft_s: float, tpot_s: float) -> None:
        """The objectives."""
        self.prompts: frozenset[str] = frozenset()
        """Workers that take no new answers."""
        self.current = RolePlan(0, WEIGHTS[1])
        self._ttft_s, self._tpot_s = ttft_s, tpot_s
        self.steps = StepTimes()
        """Of all workers that compute answers."""
        self._arrivals: deque[tuple[float, int]] = deque(maxlen=MAX_ARRIVALS)
        self._began_at = math.inf
        self._own_tokens = self._all_tokens = 0.0  # of prompts: sent off here, computed by the workers
        self._decided_at = -math.inf
        self._corrections = {False: Correction(), True: Correction()}  # without and with workers for prompts

    # -- what is measured

    def prompt(self, num_tokens: int, now: float) -> None:
        """A prompt was sent off, with so many tokens to compute."""
        self._began_at = min(self._began_at, now)
        self._arrivals.append((now, num_tokens))
        self._own_tokens += num_tokens

    def progress(self, done: WorkerInterval, tokens_s: float) -> None:
        """A worker's report; `tokens_s` is its speed of prompts."""
        if done.seconds <= 0:
            return
        self._all_tokens += done.prompt_tokens
        decoding = 1 - done.prompt_tokens / tokens_s / done.seconds
        if done.busy and done.steps and decoding > 0.3:
            seconds = decoding * done.seconds / done.steps
            self.steps.add(done.answer_tokens / done.steps, seconds, decoding**4)

    # -- what is planned

    def plan(self, view: Sequence[WorkerView], slack: tuple[float, float], answer_tokens: float, now: float) -> None:
        """Choose the workers for prompts. `slack`: TTFT and TPOT of the last seconds, by their objectives, 0 where none
        is known; `answer_tokens`: of a mean answer. Nothing is chosen while that is 0, for none has ended."""
        mixed = [worker for worker in view if worker.role == "mixed" and not worker.draining]
        self.prompts &= {worker.identity for worker in mixed}
        self._forget(now)
        if not answer_tokens:
            self.current = RolePlan(len(mixed) // 2, WEIGHTS[1])
        if len(mixed) > 1 and self._arrivals and answer_tokens:
            demand = self._demand(mixed, answer_tokens, now)
            expected = self.predict(self.current, len(mixed), demand)
            measured = (slack[0] * self._ttft_s, slack[1] * self._tpot_s)
            answer_s = answer_tokens * (measured[1] or expected[1])
            if now - max(self._decided_at, self._began_at) >= MEAN_S + SETTLED_ANSWERS * answer_s:
                self._corrections[self.current.num_prompts > 0].learn(measured, expected, now)
            if now - self._decided_at >= max(DWELL_S, DWELL_ANSWERS * answer_s):
                best = self._best(len(mixed), demand, now)
                if best != self.current:
                    self._decided_at, self.current = now, best
        self._fill(mixed)

    def _forget(self, now: float) -> None:
        """Prompts that are too old for the mean."""
        arrivals = self._arrivals
        while arrivals and arrivals[0][0] < now - (MEAN_S if len(arrivals) > MEAN_ARRIVALS else LONGEST_MEAN_S):
            arrivals.popleft()

    def _fill(self, mixed: Sequence[WorkerView]) -> None:
        """As many workers for prompts as planned, those with the fewest requests; one is left for answers."""
        num_prompts = max(0, min(self.current.num_prompts, len(mixed) - 1))
        if len(self.prompts) != num_prompts:
            order = sorted(mixed, key=lambda each: (each.identity not in self.prompts, each.requests, each.identity))
            self.prompts = frozenset(worker.identity for worker in order[:num_prompts])

    def _best(self, n: int, demand: Demand, now: float) -> RolePlan:
        plans = [RolePlan(0, self.current.weight)]
        plans += [RolePlan(num_prompts, weight) for num_prompts in range(1, n) for weight in WEIGHTS]
        here = self.current.num_prompts > 0
        known = {each: self._corrections[each] for each in (False, True)}
        if now - known[not here].seen_at > FORGET_S:
            known[not here] = known[here]

        def cost(plan: RolePlan) -> float:
            (ttft_s, tpot_s), ratio = self.predict(plan, n, demand), known[plan.num_prompts > 0]
            return (ratio.ttft * ttft_s / self._ttft_s) ** 2 + (ratio.tpot * tpot_s / self._tpot_s) ** 2

        best = min(plans, key=cost)
        return best if cost(best) < (1 - MARGIN) * cost(self.current) else self.current

    def _demand(self, mixed: Sequence[WorkerView], answer_tokens: float, now: float) -> Demand:
        """Of the requests of the last seconds; those of other proxies are taken to be like this one's."""
        seconds = max(now - max(self._arrivals[0][0], self._began_at), 1.0)
        tokens_s = sum(worker.tokens_s for worker in mixed) / len(mixed)
        lengths = [num_tokens / tokens_s for _, num_tokens in self._arrivals]
        context = sum(num_tokens for _, num_tokens in self._arrivals) / len(lengths) + answer_tokens / 2
        self.steps.row_part = PRIOR_ROW_PART * context / PRIOR_CONTEXT
        mean_s = sum(lengths) / len(lengths)
        spread = sum(each * each for each in lengths) / len(lengths) / (2 * mean_s * mean_s) if mean_s else 0.5
        rate = len(lengths) / seconds * self._proxies()
        answers = rate * answer_tokens
        long_s = sorted(lengths)[int(0.9 * len(lengths))]
        return Demand(rate * mean_s, mean_s, long_s, spread, answers)

    def _proxies(self) -> float:
        """How many times the prompts of this proxy the workers compute."""
        return max(1.0, self._all_tokens / self._own_tokens) if self._own_tokens else 1.0

    def predict(self, plan: RolePlan, n: int, demand: Demand) -> tuple[float, float]:
        """90th percentiles of TTFT and TPOT in seconds, with n workers."""
        (a, k), m, load = self.steps.fit(), min(plan.num_prompts, n - 1), demand.load
        if m == 0:
            tpot_s = a / _room((load + k * demand.answers) / n)
            ttft_s = demand.long_s + demand.prompt_s * demand.spread * _wait(n, load / n) + tpot_s
            return ttft_s, tpot_s + k * _more(demand.answers * tpot_s / n)
        tpot_s, longest, helped = a / _room(k * demand.answers / (n - m)), 0.0, 0.0
        for _ in range(2):  # rows depend on TPOT, which depends on the prompts that rows keep away
            longest = plan.weight * demand.answers * tpot_s / (n - m)
            helped = load * _overflow(load / m, m * (1 + longest))
            tpot_s = a / _room((helped + k * demand.answers) / (n - m))
        ttft_s = demand.long_s + demand.prompt_s * _bounded_wait(m, load / m, demand.spread, longest)
        return ttft_s, tpot_s + k * _more(demand.answers * tpot_s / (n - m))


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
    return 1 - used if used < 0.95 else 0.05 * math.exp(-8 * min(used - 0.95, 4.0))


def _more(rows: float) -> float:
    """Rows beyond the mean a tenth of the time, if they come by chance."""
    return NINETIETH * math.sqrt(rows)


def _wait(servers: int, used: float) -> float:
    """90th percentile of the wait of M/M/c in services; the chance of a wait is Sakasegawa's approximation (1977)."""
    used = min(max(used, 1e-6), 0.98)
    return max(0.0, TENTH + math.log(_waits(servers, used))) / (servers * (1 - used))


def _waits(servers: int, used: float) -> float:
    return min(1.0, used ** (math.sqrt(2 * (servers + 1)) - 1))


def _bounded_wait(servers: int, used: float, spread: float, longest: float) -> float:
    """The same, where what would wait for longer goes elsewhere: the tail is cut off, and not all of it is as long."""
    waits, rate = _waits(servers, max(used, 1e-6)), servers * (1 - used) / spread
    if abs(rate * longest) < 1e-3:
        return max(0.0, longest * (1 - 0.1 / waits))
    rest = math.exp(-abs(rate) * longest)
    if rate < 0:  # the queue is full, or nearly
        return max(0.0, longest - math.log(0.9 + 0.1 * rest) / rate)
    return min(longest, max(0.0, -math.log(rest + 0.1 * (1 - waits * rest) / waits) / rate))


def _overflow(used: float, places: float) -> float:
    """The part that finds M/M/1 with so many places full."""
    if abs(used - 1) < 1e-6:
        return 1 / (1 + places)
    if used > 1:  # the same, without large powers
        return (used - 1) / (used - used**-places)
    return (1 - used) * used**places / (1 - used ** (places + 1))
