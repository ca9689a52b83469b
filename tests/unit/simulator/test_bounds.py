"""simulator.bounds: the rates that no search finds exceeded, and the reasons that `place` prints for them."""

from __future__ import annotations

import math

import msgspec
import pytest

from baton.proxy.settings import ProxySettings
from baton.simulator.bounds import bound, mean_work
from baton.simulator.latency import load_profile
from baton.simulator.placement import Split, bound_of, goodput, scenario_of
from baton.simulator.record import MissLimit, RequestRecord, Slo
from baton.simulator.workload import LengthSampler, SimRequest, poisson

PROFILE = load_profile("h200-baton-8b")
SLO = Slo(0.5, 0.01)
REQUESTS = poisson(40, 1.0, LengthSampler(2048), LengthSampler(64), seed=1)


def _bound(prefill: int, decode: int, local: str = "auto", slo: Slo = SLO) -> tuple[float, str]:
    found = bound(prefill, decode, local, mean_work(REQUESTS, PROFILE, slo), PROFILE, slo)
    return found.rate, found.reason


def test_what_runs_out_is_named() -> None:
    """Guards the skipping of splits, which says why: too few prefill workers, or too few decode workers."""
    assert "prompts take all of 1 prefill workers" in _bound(1, 7, "never")[1]
    assert "answers within the TPOT take all of 1 decode workers" in _bound(7, 1)[1]
    assert _bound(1, 7, "auto")[0] > _bound(1, 7, "never")[0]
    assert _bound(4, 4, slo=Slo(0.01, 0.01)) == (0.0, "100% of the prompts take longer than the TTFT by themselves")
    assert _bound(4, 4, slo=Slo(0.5, 0.001)) == (0.0, "a decode step of one answer takes longer than the TPOT")


def test_a_prompt_that_was_computed_costs_only_what_is_new() -> None:
    """Guards traces with common prefixes against a bound that is too low."""
    shared = [SimRequest(n, float(n), 5120, 8, (*range(9), 100 + n)) for n in range(10)]
    apart = [SimRequest(n, float(n), 5120, 8, tuple(range(10 * n, 10 * n + 10))) for n in range(10)]
    assert mean_work(shared, PROFILE, SLO).prompt_s < mean_work(apart, PROFILE, SLO).prompt_s / 4


@pytest.mark.parametrize("split", [Split(1, 1), Split(0, 2, 512), Split(0, 0, mixed=2)])
def test_no_rate_beyond_the_bound_is_good(split: Split) -> None:
    """Guards the bound by a search that may go far beyond it."""

    def workload(rate: float) -> list[SimRequest]:
        return poisson(100, rate, LengthSampler(2048), LengthSampler(64), seed=1)

    most = bound_of(split, REQUESTS, PROFILE, SLO, "auto").rate
    scenario = scenario_of(split, PROFILE, ProxySettings(policy="least-loaded", max_queue=1 << 20), "fcfs")
    assert 0 < goodput(scenario, split, workload, SLO, math.inf, most, rounds=1).rate < most


def test_a_miss_counts_as_soon_as_it_is_certain() -> None:
    """Guards the end of runs that are lost: a request without its first token, and one whose last tokens are late."""
    limit = MissLimit(Slo(1.0, 0.1), 10)
    requests = [SimRequest(n, 0.0, 8, 11, (n,)) for n in range(2)]
    waiting, slow = RequestRecord(requests[0]), RequestRecord(requests[1], [0.5])
    assert not limit([waiting, slow], 1.2) and not limit([slow], 9.0), "one of ten may miss"
    assert limit([waiting, slow], 1.6)
    done = RequestRecord(requests[1], [0.5 + 0.1 * n for n in range(11)])
    assert not limit([waiting, done], 9.0)
    assert limit([waiting, RequestRecord(requests[1], error="PeerLost")], 1.2)


def test_blocks_bound_the_rows() -> None:
    """Guards small pools: few blocks serve less."""
    slo, small = Slo(0.5, 10.0), msgspec.structs.replace(PROFILE, num_blocks=100)
    work = mean_work(REQUESTS, PROFILE, slo)
    found = bound(7, 1, "auto", work, small, slo)
    assert found.rate < bound(7, 1, "auto", work, PROFILE, slo).rate
    assert found.reason == "answers take all of the rows or blocks of 1 decode workers"
