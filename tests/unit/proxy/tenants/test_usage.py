"""Guards the limits of a tenant: what is admitted, how long a refused request is to wait, what is given back."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.node.errors import BadRequest, Overloaded
from baton.node.tenant_rules import TenantRules
from baton.proxy.tenants.bucket import Bucket
from baton.proxy.tenants.usage import TenantUsage, shown_duration

KEY = "0" * 64


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def usage(clock: Clock | None = None, divide: int = 1, **limits: int) -> TenantUsage:
    rules = TenantRules(keys_sha256=(KEY,), **limits)
    return TenantUsage(rules, lambda limit: -(-limit // divide), clock or Clock())


def refusal(made: TenantUsage, tokens: int) -> Overloaded:
    with pytest.raises(Overloaded) as raised, made.reserve(tokens):
        pass
    return raised.value


def test_a_tenant_without_limits() -> None:
    """Guards servers without tenants: nothing is refused, and no header shows."""
    free = usage()
    with ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(free.place())
            free.count_request()
            stack.enter_context(free.reserve(1 << 40))
    assert free.headers() == {} and free.inside == 0 and free.totals.requests == 1000


def test_places_come_back_on_every_path() -> None:
    """Guards against a tenant that locks itself out with requests that failed."""
    two = usage(max_concurrent=2)
    with two.place(), two.place():
        with pytest.raises(Overloaded, match="2 requests of this key are being answered"), two.place():
            pass
        assert two.inside == 2
    with pytest.raises(KeyError), two.place():
        raise KeyError
    assert two.inside == 0 and two.totals.rejected == {"concurrent": 1}


def test_requests_a_minute() -> None:
    """Guards the limit over any minute, and the wait that a client is given."""
    clock = Clock()
    made = usage(clock, requests_per_minute=6)
    for _ in range(6):
        made.count_request()
    with pytest.raises(Overloaded, match=r"Limit 6 requests a minute\. Please try again in 10s") as raised:
        made.count_request()
    assert raised.value.retry_after_s == pytest.approx(10.0)
    clock.now += 10.001
    made.count_request()
    with pytest.raises(Overloaded):
        made.count_request()
    assert made.totals.requests == 7 and made.totals.rejected["requests"] == 2


def test_tokens_are_reserved_and_given_back() -> None:
    """Guards against requests that together use more than the limit, and against a limit that unused tokens use up."""
    clock = Clock()
    made = usage(clock, tokens_per_minute=600)
    with made.reserve(500) as reservation:
        assert refusal(made, 200).retry_after_s == pytest.approx(10.0)
        reservation.use(40, 60)
    assert made.headers()["x-ratelimit-remaining-tokens"] == "500"
    assert (made.totals.prompt_tokens, made.totals.answer_tokens) == (40, 60)
    with made.reserve(500) as failed:
        pass
    assert failed.used_prompt == 0 and made.headers()["x-ratelimit-remaining-tokens"] == "500", (
        "a failure costs nothing"
    )


def test_what_was_not_expected_is_a_debt() -> None:
    """Guards the limit where a request says no max_tokens and its answer is long."""
    clock = Clock()
    made = usage(clock, tokens_per_minute=60)
    with made.reserve(10) as reservation:
        reservation.use(10, 110)
    assert made.headers()["x-ratelimit-remaining-tokens"] == "0"
    assert made.headers()["x-ratelimit-reset-tokens"] == "2m0s"
    assert refusal(made, 1).retry_after_s == pytest.approx(61.0)
    clock.now += 61.001
    with made.reserve(1):
        pass


def test_a_request_larger_than_the_limit_can_never_be_admitted() -> None:
    """Guards against a Retry-After for what will never be allowed."""
    with pytest.raises(BadRequest, match="Limit 100 tokens a minute, Requested 101") as raised:
        usage(tokens_per_minute=100).reserve(101).__enter__()
    assert (raised.value.status, raised.value.code) == (429, "rate_limit_exceeded")


def test_a_part_of_the_limit_is_no_bound_for_one_request() -> None:
    """With several proxies, each has a part of the limit; a request that the whole allows waits for a full part."""
    clock = Clock()
    made = usage(clock, divide=4, tokens_per_minute=400, requests_per_minute=2, max_concurrent=1)
    assert made.headers()["x-ratelimit-limit-tokens"] == "100"
    assert made.headers()["x-ratelimit-limit-requests"] == "1", "rounded up: each proxy answers"
    with made.reserve(350) as reservation:
        reservation.use(350, 0)
    assert refusal(made, 350).retry_after_s == pytest.approx(60 * 350 / 100)
    clock.now += 60 * 350 / 100 + 0.001
    with made.reserve(350):
        pass


def test_new_rules_keep_what_was_used() -> None:
    """Guards against a reload that fills the limits again."""
    made = usage(requests_per_minute=10, tokens_per_minute=100)
    with made.place(), made.reserve(60):
        for _ in range(4):
            made.count_request()
        made.limit(TenantRules(keys_sha256=(KEY,), requests_per_minute=20, max_concurrent=1))
        assert (
            made.headers()["x-ratelimit-remaining-requests"] == "16"
            and "x-ratelimit-limit-tokens" not in made.headers()
        )
        with pytest.raises(Overloaded), made.place():
            pass
        made.limit(TenantRules(keys_sha256=(KEY,), requests_per_minute=5))
        assert made.headers()["x-ratelimit-remaining-requests"] == "1"


@given(
    st.integers(1, 10_000),
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 500), st.integers(0, 800)), max_size=60),
)
def test_no_minute_has_more_than_the_limit_admits(per_minute: int, requests: list[tuple[float, int, int]]) -> None:
    """No order of waits, reservations and refunds admits more than the bucket, what flowed into it, and one debt."""
    now, bucket, used, debts = 0.0, Bucket(per_minute, 0.0), 0, 0
    for after_s, reserved, spent in requests:
        now += after_s
        if bucket.wait_s(reserved, now) == 0.0:
            bucket.take(reserved, now)
            bucket.take(spent - reserved, now)
            used += spent
            debts = max(debts, spent, reserved)
        assert 0 <= bucket.remaining(now) <= per_minute and bucket.full_in_s(now) >= 0.0
        assert used <= per_minute * (1 + now / 60) + debts + 1


def test_durations_have_openais_form() -> None:
    """Guards clients that parse the reset headers."""
    assert [shown_duration(s) for s in (-1, 0, 0.0124, 0.999, 1.5, 59.994, 60, 125.4)] == [
        *("0ms", "0ms", "12ms", "999ms", "1.5s", "59.99s", "1m0s", "2m5s"),
    ]
