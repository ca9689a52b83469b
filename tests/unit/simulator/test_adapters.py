"""Adapters in the simulator: the worker's and the router's own code, with reads and copies that take their time."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import msgspec
import pytest

from baton.proxy.settings import ProxySettings
from baton.simulator.adapters import AdapterTraffic
from baton.simulator.latency import load_profile
from baton.simulator.simulation import Scenario, SimOutcome, simulate
from baton.simulator.workload import LengthSampler, poisson

PROFILE = msgspec.structs.replace(load_profile("h200-llama-8b"), num_blocks=600, max_num_seqs=24)
LOAD = poisson(80, 20.0, LengthSampler(300, 0.5, 2000), LengthSampler(20, 0.5, 100), seed=5)
TRAFFIC = AdapterTraffic(count=12, num_slots=3, max_in_memory=6)


def run(traffic: AdapterTraffic | None, policy: str = "kv-aware") -> SimOutcome:
    proxy = ProxySettings(local_prefill="never", policy=policy)
    requests = LOAD if traffic is None else traffic.named(LOAD, 1)
    outcome = simulate(Scenario(profile=PROFILE, prefill=2, decode=3, proxy=proxy, adapters=traffic), requests)
    assert not [record.error for record in outcome.records if record.error]
    return outcome


def test_the_first_are_named_most() -> None:
    named = Counter(each.adapter for each in replace(TRAFFIC, zipf=1.5).named(LOAD * 20, 1))
    assert named[0] > 2 * named[1] > named[5] > 0
    even = Counter(each.adapter for each in replace(TRAFFIC, zipf=0.0).named(LOAD * 20, 1))
    assert max(even.values()) < 2 * min(even.values())


def test_every_request_waits_for_its_adapter() -> None:
    """Guards against answers of a worker that did not have the adapter yet."""
    outcome, calm = run(TRAFFIC), run(None)
    work = outcome.work
    assert work["adapter_fills"] >= work["adapter_loads"] >= len({each.request.adapter for each in outcome.records})
    read_s = TRAFFIC.size_bytes / TRAFFIC.read_bytes_s
    first = outcome.records[0]
    assert first.ttft_s > read_s > calm.records[0].ttft_s, "the first of all has nothing but its own read to wait for"
    assert work["adapter_wait_seconds"] > read_s


@pytest.mark.parametrize("policy", ["least-loaded", "round-robin"])
def test_the_routers_cost_keeps_adapters_on_few_workers(policy: str) -> None:
    """Guards the term of the router's cost: without it, workers read and copy the same adapters in turns."""
    aware, other = run(TRAFFIC), run(TRAFFIC, policy)
    for counter in ("adapter_loads", "adapter_fills", "adapter_wait_seconds"):
        assert aware.work[counter] < 0.8 * other.work[counter]
    assert sum(aware.adapters_filled.values()) < sum(other.adapters_filled.values())
