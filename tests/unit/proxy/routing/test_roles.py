"""The plan for mixed workers: what it predicts, how it follows the load, and the routes that come of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.proxy.routing.roles import (
    DWELL_S,
    WEIGHTS,
    Demand,
    MixedRoles,
    RolePlan,
    StepTimes,
    WorkerInterval,
    pick_mixed,
)
from baton.proxy.routing.router import RequestView, Route, RoutingRules, Wait, WorkerView

TOKENS_S = 40_000.0
A_S, K_S = 0.004, 0.00008
"""A step of the workers below."""
RULES = RoutingRules("least-loaded", "auto", 16, 0.25)
WORKER = WorkerView("m0/1", "tcp://m0", "mixed", False, 0, 0, 1000, 1000, 64, TOKENS_S)


def _workers(count: int, **fields: int) -> list[WorkerView]:
    return [replace(WORKER, identity=f"m{n}/1", **fields) for n in range(count)]  # type: ignore[arg-type]


def _loaded(count: int, prompt_tokens: int, rate: float, answer_tokens: int) -> MixedRoles:
    """Workers that have computed `rate` such requests a second, evenly."""
    roles = MixedRoles(1.0, 0.015)
    share = rate / count
    for second in range(200):
        for number in range(round(rate)):
            roles.prompt(prompt_tokens, second + number / round(rate) - 200)
        for _ in range(count):
            prompts_s = share * prompt_tokens / TOKENS_S
            rows = share * answer_tokens * A_S / (1 - prompts_s - K_S * share * answer_tokens)
            steps = round((1 - prompts_s) / (A_S + K_S * rows))
            done = WorkerInterval(1.0, steps, share * prompt_tokens, rows * steps, True)
            roles.progress(done, TOKENS_S)
    return roles


def _planned(roles: MixedRoles, view: list[WorkerView], answer_tokens: int) -> RolePlan:
    roles.plan(view, (0.0, 0.0), answer_tokens, 0.0)
    return roles.current


def test_step_times_are_found_in_reports() -> None:
    times = StepTimes()
    for rows in (4, 8, 16, 32, 64) * 4:
        times.add(rows, A_S + K_S * rows)
    assert times.fit() == (pytest.approx(A_S, rel=0.02), pytest.approx(K_S, rel=0.05))


@given(
    st.integers(1, 64),
    st.integers(0, 64),
    st.sampled_from(WEIGHTS),
    st.floats(0, 1e4),
    st.floats(0, 1e6),
    st.floats(0.5, 50),
)
def test_any_load_has_a_finite_prediction(
    n: int, num_prompts: int, weight: float, load: float, answers: float, spread: float
) -> None:
    """Guards the proxy: an overload of many times what workers can do must not end in an overflow."""
    demand = Demand(load, 0.2, 0.3, spread, answers)
    for latency in MixedRoles(1.0, 0.015).predict(RolePlan(num_prompts, weight), n, demand):
        assert 0 < latency < float("inf")


def test_one_size_of_steps_says_nothing_of_another() -> None:
    """Rows that never differed: a plan that doubles them must not look free."""
    times = StepTimes()
    for _ in range(50):
        times.add(10.0, 0.005)
    a, k = times.fit()
    assert a + 10 * k == pytest.approx(0.005) and k > 0


def test_a_pause_is_not_taken_for_a_slow_step() -> None:
    """A worker that had nothing to do for a part of the interval: one such report would make answers look dear."""
    times = StepTimes()
    for rows in (4, 8, 16, 32) * 10:
        times.add(rows, A_S + K_S * rows)
    times.add(2.0, 0.1)
    a, _ = times.fit()
    assert a == pytest.approx(A_S, rel=0.05)


def test_prompts_of_other_proxies_count() -> None:
    """Each of several proxies sees its own requests alone, and plans for the workers of all."""
    roles = _loaded(8, 8192, 5.0, 128)
    alone = _planned(roles, _workers(8), 128).num_prompts
    roles.progress(WorkerInterval(100.0, 0, 3 * roles._all_tokens, 0.0, False), TOKENS_S)
    roles.plan(_workers(8), (0.0, 0.0), 128, DWELL_S)
    assert roles.current.num_prompts > alone


def test_long_prompts_get_workers_of_their_own() -> None:
    assert _planned(_loaded(4, 8192, 7.0, 256), _workers(4), 256).num_prompts >= 1


def test_short_prompts_of_long_answers_are_computed_everywhere() -> None:
    """Answers are the load: a worker that takes none of them would be missed."""
    assert _planned(_loaded(2, 256, 10.0, 700), _workers(2), 700).num_prompts == 0


def test_half_of_the_workers_take_prompts_before_an_answer_has_ended() -> None:
    """Measured on two GPUs: answers taken for shorter than they are left too few workers for them, and workers that
    began with answers kept them beside all of the prompts."""
    for prompt_tokens, rate, answer_tokens in ((8192, 7.0, 256), (256, 10.0, 700)):
        roles = _loaded(4, prompt_tokens, rate, answer_tokens)
        assert _planned(roles, _workers(4), 0).num_prompts == 2


def test_a_plan_that_is_slower_than_it_promised_is_left_and_not_taken_again() -> None:
    """Measured on two GPUs: steps of many rows took longer than few rows said. What plans with hand-overs showed must
    not make the other kind look as slow."""
    roles, view, plans = _loaded(4, 8192, 7.0, 256), _workers(4), []
    for number in range(7 * 100):
        now = number / 7
        roles.prompt(8192, now)
        roles.plan(view, (1.5, 1.6) if roles.current.num_prompts else (0.3, 0.7), 256, now)
        plans.append(roles.current.num_prompts > 0)
    assert plans[0] and not plans[-1]
    assert sum(before != after for before, after in pairwise(plans)) == 1


def test_a_start_of_few_rows_says_little_of_a_row() -> None:
    """Guards the first plan: a worker that was idle for a part of the interval made rows look free, and all answers
    went to one of eight workers."""
    times = StepTimes()
    for rows, seconds in ((1, 0.0062), (2, 0.0055), (3, 0.0053), (5, 0.0051)):
        times.add(rows, seconds)
    a, k = times.fit()
    assert k > 0.005 * a


def test_workers_for_prompts_are_given_up_as_soon_as_colocated_serving_costs_less() -> None:
    """Hand-overs must pay: no margin holds them."""
    roles = _loaded(2, 256, 10.0, 700)
    roles.current = RolePlan(1, 0.25)
    assert _planned(roles, _workers(2), 700).num_prompts == 0


def test_half_the_load_needs_fewer_workers_for_prompts() -> None:
    many = _planned(_loaded(8, 8192, 20.0, 128), _workers(8), 128).num_prompts
    few = _planned(_loaded(8, 8192, 5.0, 128), _workers(8), 128).num_prompts
    assert few < many


def test_a_plan_lasts() -> None:
    """Else a burst of each kind would turn workers over and over."""
    roles = _loaded(2, 8192, 4.0, 256)
    roles.plan(_workers(2), (0.0, 0.0), 256, 0.0)
    first, roles.current = roles.current, RolePlan(1 - roles.current.num_prompts, 0.25)
    roles.plan(_workers(2), (0.0, 0.0), 256, DWELL_S / 2)
    assert roles.current != first


def test_the_workers_with_the_fewest_requests_take_the_prompts() -> None:
    roles = _loaded(2, 8192, 4.5, 256)
    view = _workers(2)
    view[0] = replace(view[0], requests=9)
    roles.current = RolePlan(1, 0.25)
    roles._fill(view)
    assert roles.prompts == {"m1/1"}
    view[1] = replace(view[1], requests=20)  # prompts that wait for it: it stays
    roles._fill(view)
    assert roles.prompts == {"m1/1"}


@given(st.integers(0, 6), st.integers(0, 6), st.floats(0, 9), st.floats(0, 9), st.integers(0, 12))
def test_one_worker_is_left_for_answers(count: int, gone: int, ttft: float, tpot: float, num_prompts: int) -> None:
    """Whatever is planned, and whichever workers leave: answers have a place."""
    roles = _loaded(2, 8192, 4.0, 256)
    roles.current = RolePlan(num_prompts, 0.25)
    roles.plan(_workers(count), (ttft, tpot), 256, 0.0)
    left = _workers(count)[gone:]
    roles.plan(left, (ttft, tpot), 256, 0.25)
    assert roles.prompts <= {worker.identity for worker in left}
    assert len(roles.prompts) < len(left) or not left
    route = pick_mixed(left, RequestView(8192, 10, 0), RULES, roles)
    assert isinstance(route, Route) == bool(left)


def test_prompts_go_to_their_workers_and_answers_to_the_others() -> None:
    roles = MixedRoles(1.0, 0.05)
    roles.prompts = frozenset({"m0/1"})
    route = pick_mixed(_workers(2), RequestView(8192, 10, 0), RULES, roles)
    assert isinstance(route, Route) and route.prefill is not None
    assert (route.prefill.identity, route.decode.identity) == ("m0/1", "m1/1")
    roles.prompts = frozenset()
    route = pick_mixed(_workers(2), RequestView(8192, 10, 0), RULES, roles)
    assert isinstance(route, Route) and route.prefill is None


def test_workers_for_prompts_take_answers_where_the_others_are_full() -> None:
    """A plan is made for speed; it must not refuse what fits."""
    roles = MixedRoles(1.0, 0.05)
    roles.prompts = frozenset({"m0/1"})
    view = _workers(2)
    view[1] = replace(view[1], requests=64)
    route = pick_mixed(view, RequestView(8192, 10, 0), RULES, roles)
    assert isinstance(route, Route) and route.decode.identity == "m0/1"


def test_fixed_roles_are_left_alone() -> None:
    view = [replace(WORKER, role="prefill"), replace(WORKER, identity="d0/1", role="decode", requests=9)]
    route = pick_mixed(view, RequestView(8192, 10, 0), RULES, MixedRoles(1.0, 0.05))
    assert isinstance(route, Route) and route.reason == "disaggregated"
    assert isinstance(pick_mixed([], RequestView(8, 1, 0), RULES, MixedRoles(1.0, 0.05)), Wait)
