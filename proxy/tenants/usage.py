"""What a tenant uses at the moment, held against its limits; and what it has used since the start.

A request takes a place and one of the requests a minute when it begins, and the tokens that it may come to when its
prompts are known; what it has not used of these comes back when it ends. A token that is streamed costs nothing here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from baton.node.errors import BadRequest, Overloaded
from baton.node.tenant_rules import TenantRules
from baton.proxy.tenants.bucket import MINUTE_S, Bucket


@dataclass(slots=True)
class Reservation:
    """The tokens that one request has used; those that it may come to are taken from the limit until it ends."""

    used_prompt: int = 0
    used_answer: int = 0

    def use(self, prompt: int, answer: int) -> None:
        self.used_prompt += prompt
        self.used_answer += answer


@dataclass(slots=True)
class Totals:
    """Since the start; they only grow."""

    requests: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """By one of REJECTED."""


REJECTED = ("concurrent", "requests", "tokens", "share", "queue")
"""Which limit a request was refused for: the tenant's own three, its share of the server's requests, its queue."""


class TenantUsage:
    """One tenant's use of one proxy. `divide` makes this proxy's part of a limit that several keep together."""

    def __init__(self, rules: TenantRules, divide: Callable[[int], int], clock: Callable[[], float]) -> None:
        self.totals = Totals()
        self.inside = 0
        """Requests that are being answered."""
        self._divide = divide
        self._clock = clock
        self._max_inside: int | None = None
        self._tokens_limit: int | None = None
        """Of all proxies."""
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self.limit(rules)

    def limit(self, rules: TenantRules) -> None:
        """From now on. What is in use stays in use."""
        self._max_inside = None if rules.max_concurrent is None else self._divide(rules.max_concurrent)
        self._tokens_limit = rules.tokens_per_minute
        self._requests = self._bucket(self._requests, rules.requests_per_minute)
        self._tokens = self._bucket(self._tokens, rules.tokens_per_minute)

    @contextmanager
    def place(self) -> Iterator[None]:
        """For a request while it is answered. Raises Overloaded where the tenant has too many."""
        if self._max_inside is not None and self.inside >= self._max_inside:
            raise self.refused("concurrent", f"{self._max_inside} requests of this key are being answered already", 1.0)
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def count_request(self) -> None:
        """One more that generates. Raises Overloaded where there were too many within a minute."""
        if self._requests is not None:
            now = self._clock()
            if wait_s := self._requests.wait_s(1, now):
                limit = f"Limit {self._requests.per_minute} requests a minute"
                raise self.refused("requests", f"Rate limit reached: {limit}. {_again(wait_s)}", wait_s)
            self._requests.take(1, now)
        self.totals.requests += 1

    @contextmanager
    def reserve(self, tokens: int) -> Iterator[Reservation]:
        """For a request that may come to so many. Raises Overloaded, or BadRequest where no minute has so many."""
        self._check_tokens(tokens)
        reservation = Reservation()
        self._take(tokens)
        try:
            yield reservation
        finally:
            self._take(reservation.used_prompt + reservation.used_answer - tokens)
            self.totals.prompt_tokens += reservation.used_prompt
            self.totals.answer_tokens += reservation.used_answer

    def refused(self, why: str, message: str, retry_after_s: float) -> Overloaded:
        self.totals.rejected[why] += 1
        return Overloaded(message, retry_after_s=retry_after_s)

    def headers(self) -> dict[str, str]:
        """OpenAI's, of the limits that there are."""
        now, found = self._clock(), {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
                found[f"x-ratelimit-remaining-{name}"] = str(bucket.remaining(now))
                found[f"x-ratelimit-reset-{name}"] = shown_duration(bucket.full_in_s(now))
        return found

    def _check_tokens(self, tokens: int) -> None:
        if self._tokens is None or self._tokens_limit is None:
            return
        if tokens > self._tokens_limit:
            self.totals.rejected["tokens"] += 1
            message = (
                f"Request too large: Limit {self._tokens_limit} tokens a minute, Requested {tokens} with max_tokens."
            )
            raise BadRequest(message, status=429, code="rate_limit_exceeded")
        now = self._clock()
        if wait_s := self._tokens.wait_s(tokens, now):
            limit = f"Limit {self._tokens.per_minute} tokens a minute, Remaining {self._tokens.remaining(now)}"
            message = f"Rate limit reached: {limit}, Requested {tokens}. {_again(wait_s)}"
            raise self.refused("tokens", message, wait_s)

    def _take(self, tokens: int) -> None:
        if self._tokens is not None:
            self._tokens.take(tokens, self._clock())

    def _bucket(self, bucket: Bucket | None, per_minute: int | None) -> Bucket | None:
        if per_minute is None:
            return None
        if bucket is None:
            return Bucket(self._divide(per_minute), self._clock())
        bucket.resize(self._divide(per_minute), self._clock())
        return bucket


def _again(wait_s: float) -> str:
    return f"Please try again in {shown_duration(wait_s)}."


def shown_duration(duration_s: float) -> str:
    """As OpenAI's headers have it: 12ms, 1.5s, 2m0s."""
    if duration_s < 1.0:
        return f"{round(1000 * max(0.0, duration_s))}ms"
    if duration_s < MINUTE_S:
        return f"{round(duration_s, 2):g}s"
    minutes, seconds = divmod(round(duration_s), 60)
    return f"{minutes}m{seconds}s"
