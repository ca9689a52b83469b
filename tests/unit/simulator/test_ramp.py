"""Workers that come and go with the load: the autoscaler's bounds, and no request lost when one is drained."""

from __future__ import annotations

import msgspec

from baton.proxy.settings import ProxySettings
from baton.simulator.latency import load_profile
from baton.simulator.ramp import Autoscale, mean_level, staged
from baton.simulator.simulation import Scenario, simulate
from baton.simulator.workload import LengthSampler

PROFILE = msgspec.structs.replace(load_profile("h200-baton-8b"), num_blocks=400, max_num_seqs=16)


def test_stages_are_even_and_follow_each_other() -> None:
    requests = staged(((2.0, 4.0), (1.0, 2.0)), LengthSampler(100), LengthSampler(10))
    assert [request.arrival_s for request in requests] == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5]
    assert [request.number for request in requests] == list(range(10))


def test_the_mean_of_a_level_is_over_time() -> None:
    assert mean_level(((0.0, 2), (10.0, 4)), 20.0) == 3.0


def test_workers_are_added_and_drained_under_load() -> None:
    """Guards the whole way: gauges, start, drain; a worker that leaves ends what it has."""
    load = staged(((1.0, 12.0), (14.0, 20.0), (0.2, 420.0)), LengthSampler(2000), LengthSampler(80))
    proxy = ProxySettings(policy="least-loaded", local_prefill="always", slo_ttft_ms=300, slo_tpot_ms=12)
    scenario = Scenario(profile=PROFILE, mixed=1, proxy=proxy, autoscale=Autoscale(1, 3, 5.0))
    outcome = simulate(scenario, load)
    assert [record.error for record in outcome.records] == [""] * len(load)
    counts = [count for _, count in outcome.levels]
    assert max(counts) == 3 and counts[0] == counts[-1] == 1
