"""TTFT and TPOT of one model's requests against their objectives, and the workers of each role that these ask for.

A prefill worker answers for TTFT, a decode worker for TPOT, and for both where there is no prefill worker. Requests
that still wait for their first token count with the time that they have waited, if that is longer than what others
took: under overload the requests that end say too little. Arrivals (`demand`) say how many workers they fill. It knows
no clock and no request's content.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

from baton.proxy.scaling.demand import ArrivalRate, Arrivals, RoleCapacity, busy_workers
from baton.proxy.scaling.law import RoleScaler, ScalingRules

WINDOW_S = 60.0
PERCENTILE = 0.9
MAX_SAMPLES = 4096
"""Of each latency: at 1,000 requests a second, the last four seconds."""
NEWEST = 0.05
"""Weight of the last answer in the mean of their lengths."""
RECENT_S, MAX_RECENT = 10.0, 256
EVERY_S = 1.0
"""Between two looks."""


@dataclass(frozen=True, slots=True)
class LatencyObjectives:
    """What a request should take: its time to the first token, and the mean time of each later one."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class RoleScale:
    """What is asked for of one role."""

    role: str
    saturation: float
    """P90 of the role's latency by its objective, smoothed; above 1 the objective is missed."""
    desired: int


class Window:
    """Durations of the last WINDOW_S."""

    def __init__(self) -> None:
        self._values: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)

    def add(self, value_s: float, now: float) -> None:
        self._values.append((now, value_s))

    def values(self, now: float) -> list[float]:
        while self._values and self._values[0][0] < now - WINDOW_S:
            self._values.popleft()
        return [value_s for _, value_s in self._values]

    def recent(self, now: float) -> list[float]:
        """Of the last RECENT_S, at most MAX_RECENT."""
        newest = islice(reversed(self._values), MAX_RECENT)
        return [value_s for _, value_s in takewhile(lambda each: each[0] >= now - RECENT_S, newest)]


class ScaleMonitor:
    """Measures one model's latencies. `observe`, called when it is `due`, makes desired replicas of them."""

    def __init__(self, objectives: LatencyObjectives, rules: ScalingRules | None = None) -> None:
        self._objectives = objectives
        self._rules = rules
        self._ttft, self._tpot = Window(), Window()
        self._waiting: dict[str, float] = {}  # since when, by request id; the oldest first
        self._scalers: dict[str, RoleScaler] = {}
        self._observe_at = float("-inf")
        self._rate = ArrivalRate()
        self._num_open = 0
        self._prompt_tokens = 0.0  # as answer_tokens
        self.answer_tokens = 0.0
        """Of a mean answer, the last ones weighing most; 0 until one has ended."""

    def begin(self, request_id: str, now: float) -> None:
        """A request waits for its first token."""
        self._waiting[request_id] = now
        self._rate.add(now)
        self._num_open += 1

    def first_token(self, request_id: str, computed_tokens: int, now: float) -> None:
        """`computed_tokens` of its prompt were in no cache."""
        self._prompt_tokens = _mean_with(self._prompt_tokens, computed_tokens)
        if (began_at := self._waiting.pop(request_id, None)) is not None:
            self._ttft.add(now - began_at, now)

    def end(self, request_id: str, num_tokens: int, decoding_s: float, now: float) -> None:
        """The request has ended, in whatever way: its last token came `decoding_s` after its first."""
        self._waiting.pop(request_id, None)
        self._num_open -= 1
        if num_tokens:
            self.answer_tokens = _mean_with(self.answer_tokens, num_tokens)
        if num_tokens > 1:
            self._tpot.add(decoding_s / (num_tokens - 1), now)

    def due(self, now: float) -> bool:
        """Whether it is time to observe."""
        return now >= self._observe_at

    def observe(self, workers: Mapping[str, RoleCapacity], step: tuple[float, float], now: float) -> None:
        """`workers` that take requests, by role; `step`: seconds of a step of answers, without rows and of each row."""
        self._observe_at = now + EVERY_S
        ttft, tpot = self.saturations(now)
        split, arrivals = "prefill" in workers, self._arrivals(workers, step, now)
        decode = tpot if split else max(ttft, tpot)
        for role, saturation in (("prefill", ttft), ("decode", decode), ("mixed", max(ttft, tpot))):
            capacity = workers.get(role, RoleCapacity())
            if capacity.ready or role in self._scalers:
                scaler = self._scalers.setdefault(role, RoleScaler(self._rules))
                prompts = role != "decode" or not split
                tpot_s = self._objectives.tpot_s
                busy = busy_workers(capacity, arrivals, tpot_s, prompts=prompts, answers=role != "prefill")
                scaler.observe(saturation, capacity.ready, now, busy)

    def _arrivals(self, workers: Mapping[str, RoleCapacity], step: tuple[float, float], now: float) -> Arrivals:
        """Of all proxies: the workers have the requests of the others too. Nothing before an answer has ended."""
        at_workers = max((each.requests for each in workers.values()), default=0)
        rate = self._rate.rate(now) * max(1.0, at_workers / self._num_open if self._num_open else 1.0)
        return Arrivals(rate if self.answer_tokens else 0.0, self._prompt_tokens, self.answer_tokens, *step)

    def saturations(self, now: float) -> tuple[float, float]:
        """P90 of TTFT and of TPOT, each by its objective; 0 where nothing was measured."""
        first = self._ttft.values(now)
        usual = _percentile(first)
        first += [now - began_at for began_at in self._waiting.values() if now - began_at > usual]
        return (
            _percentile(first) / self._objectives.ttft_s,
            _percentile(self._tpot.values(now)) / self._objectives.tpot_s,
        )

    def recent(self, now: float) -> tuple[float, float]:
        """As `saturations`, of the last RECENT_S and of requests that have their tokens."""
        return (
            _percentile(self._ttft.recent(now)) / self._objectives.ttft_s,
            _percentile(self._tpot.recent(now)) / self._objectives.tpot_s,
        )

    def scales(self) -> tuple[RoleScale, ...]:
        return tuple(RoleScale(role, each.saturation, each.desired) for role, each in self._scalers.items())


def _mean_with(mean: float, value: float) -> float:
    """The mean with a new value, which weighs NEWEST."""
    return mean + (NEWEST if mean else 1.0) * (value - mean)


def _percentile(values: Sequence[float]) -> float:
    """The nearest rank; 0 of none."""
    return sorted(values)[min(len(values) - 1, int(PERCENTILE * len(values)))] if values else 0.0
