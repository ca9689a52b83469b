"""Workers of this machine that follow the proxy's gauges."""

from __future__ import annotations

from baton.launch.autoscale import Bounds, changes, desired_replicas
from baton.launch.supervisor import ChildSpec

SPECS = [ChildSpec(name=f"{role}-{n}", group=role, argv=(), env={}) for role in ("prefill", "decode") for n in range(4)]
BOUNDS = Bounds(1, 3)


def _names(desired: dict[str, int], running: set[str], retired: set[str] | None = None) -> tuple[list[str], list[str]]:
    start, drain = changes(desired, SPECS, running, retired or set(), BOUNDS)
    return [spec.name for spec in start], drain


def test_the_gauges_of_all_proxies_are_read() -> None:
    page = (
        "# TYPE baton:desired_replicas gauge\n"
        'baton:desired_replicas{model_name="demo",role="decode",proxy="proxy-0"} 2.0\n'
        'baton:desired_replicas{model_name="demo",role="decode",proxy="proxy-1"} 3.0\n'
        'baton:desired_replicas{model_name="demo",role="prefill"} 1.0\n'
        'baton:slo_saturation{model_name="demo",role="decode"} 9.0\n'
    )
    assert desired_replicas(page) == {"decode": 3, "prefill": 1}
    assert desired_replicas("") == {}


def test_workers_are_added_and_drained_to_what_is_asked_for() -> None:
    assert _names({"decode": 3}, {"decode-0", "prefill-0"}) == (["decode-1", "decode-2"], [])
    assert _names({"decode": 1}, {"decode-0", "decode-1", "decode-2"}) == ([], ["decode-2", "decode-1"])


def test_bounds_hold_whatever_is_asked_for() -> None:
    assert _names({"decode": 9}, {"decode-0", "decode-1"}) == (["decode-2"], [])
    assert _names({"decode": 0}, {"decode-0"}) == ([], [])


def test_a_worker_that_drains_is_not_counted_nor_started_twice() -> None:
    """Its name is taken until it has ended, and it takes no requests: another one starts."""
    assert _names({"decode": 2}, {"decode-0", "decode-1"}, {"decode-1"}) == (["decode-2"], [])
    assert _names({"decode": 1}, {"decode-0", "decode-1"}, {"decode-1"}) == ([], [])


def test_no_answer_changes_nothing() -> None:
    """The proxy restarts, or a role has had no worker yet."""
    assert _names({}, {"decode-0"}) == ([], [])
