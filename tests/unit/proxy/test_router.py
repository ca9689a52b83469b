"""proxy.router: the right worker, the reason for each choice, and waiting instead of overloading."""

from __future__ import annotations

from dataclasses import replace

import pytest

from proxy.router import RequestView, Route, Rules, Wait, WorkerView, pick


def _worker(identity: str, role: str = "decode", **changes: object) -> WorkerView:
    base = WorkerView(
        identity=identity,
        address=f"tcp://{identity}",
        role=role,
        draining=False,
        requests=1,
        tokens=0,
        free_blocks=100,
        total_blocks=100,
        max_num_seqs=8,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


RULES = Rules("least-loaded", "never", 16)
REQUEST = RequestView(num_tokens=50, num_blocks=4, turn=0)
P0, P1, D0, D1 = _worker("p0", "prefill"), _worker("p1", "prefill"), _worker("d0"), _worker("d1")


def _route(view: list[WorkerView], request: RequestView = REQUEST, rules: Rules = RULES) -> Route:
    route = pick(view, request, rules)
    assert isinstance(route, Route), route
    return route


def test_least_loaded_looks_at_tokens_then_requests_then_blocks() -> None:
    """Guards the order of the criteria, on both roles."""
    assert _route([replace(P0, tokens=9), P1, D0]).prefill == P1
    assert _route([P0, replace(D0, requests=3), D1]).decode == D1
    assert _route([P0, replace(D0, free_blocks=90), D1]).decode == D1


@pytest.mark.parametrize("policy", ["least-loaded", "round-robin"])
def test_equal_workers_take_turns(policy: str) -> None:
    """Guards against herding: a burst on idle workers is spread."""
    rules = Rules(policy, "never", 16)
    chosen = [_route([P0, P1, D0, D1], replace(REQUEST, turn=t), rules) for t in range(4)]
    assert [r.decode.identity for r in chosen] == ["d0", "d1", "d0", "d1"]
    assert [r.prefill and r.prefill.identity for r in chosen] == ["p0", "p1", "p0", "p1"]


@pytest.mark.parametrize(
    ("mode", "num_tokens", "prefills", "reason"),
    [
        ("never", 5, True, "disaggregated"),
        ("short", 15, True, "local_short"),
        ("short", 16, True, "disaggregated"),
        ("short", 16, False, "local_no_prefill_worker"),
        ("always", 500, True, "local_always"),
    ],
)
def test_conditional_disaggregation(mode: str, num_tokens: int, prefills: bool, reason: str) -> None:
    """Guards the rule for local prefill, and that its reason is visible."""
    view = [P0, D0] if prefills else [D0]
    route = _route(view, replace(REQUEST, num_tokens=num_tokens), Rules("least-loaded", mode, 16))
    assert route.reason == reason
    assert (route.prefill is None) == reason.startswith("local")


def test_missing_roles_are_named() -> None:
    """Guards the error of a cluster without a role: it says which."""
    assert pick([P0], REQUEST, RULES) == Wait("no decode worker is there", missing="decode")
    assert pick([D0], REQUEST, RULES) == Wait("no prefill worker is there", missing="prefill")
    draining = replace(D0, draining=True)
    assert isinstance(pick([P0, draining], REQUEST, RULES), Wait)


def test_full_workers_make_it_wait() -> None:
    """Guards admission: no rows or too few blocks is a wait, not a route that bounces."""
    for full in (replace(D0, requests=8), replace(D0, free_blocks=3)):
        waiting = pick([P0, full], REQUEST, RULES)
        assert isinstance(waiting, Wait) and not waiting.missing


def test_an_idle_worker_gets_even_what_it_must_refuse() -> None:
    """Guards against an endless wait: a request larger than the pool is refused by the worker, with its reason."""
    assert _route([P0, replace(D0, requests=0, free_blocks=3)]).decode.identity == "d0"


def test_workers_that_failed_the_request_are_avoided_if_possible() -> None:
    """Guards retries: another worker if there is one, the same one rather than none."""
    request = replace(REQUEST, avoid=frozenset({"d0"}))
    assert _route([P0, D0, D1], request).decode == D1
    assert _route([P0, D0], request).decode == D0
