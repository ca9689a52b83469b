"""Guards the arithmetic of `baton bench tenants`: which requests are sent and counted, and what is divided by what."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from baton.benchmark.cluster import tenants as bench
from baton.benchmark.harness.errors import BenchmarkFailed
from baton.node.tenant_rules import read_tenants
from baton.simulator.workload import SimRequest


def options(**changed: object) -> argparse.Namespace:
    given = {"rate": 2.0, "factor": 10.0, "seconds": 5.0, "prompt_tokens": 8, "heavy_prompt_tokens": 0, "max_tokens": 4}
    return argparse.Namespace(**given | changed)


def answered(tenant: str, *ttfts_s: float | None) -> list[bench.Answered]:
    """The first comes at time 0, the others each a second later."""
    requests = [SimRequest(number, float(number), 8, 4, (number,), tenant=tenant) for number in range(len(ttfts_s))]
    return [bench.Answered(request, ttft_s) for request, ttft_s in zip(requests, ttfts_s, strict=True)]


def test_both_runs_have_the_same_light_requests() -> None:
    """Other arrivals, or other lengths, would be compared; equal prompts would be served from a cache."""
    light, both = bench.workload(options(heavy_prompt_tokens=32), seed=3)

    def sent(requests: Sequence[SimRequest]) -> list[SimRequest]:
        return [replace(each, number=0, prefix=(0,)) for each in requests if each.tenant == bench.LIGHT]

    assert sent(light) == sent(both) and len(light) == 1 + 10 and len(both) == 2 + 10 + 100
    assert {each.prompt_tokens for each in both if each.tenant == bench.HEAVY} == {32}
    assert [each.number for each in both] == list(range(len(both))) and len({each.prefix for each in both}) == len(both)
    assert [each.arrival_s for each in both] == sorted(each.arrival_s for each in both)
    assert bench.workload(options(), seed=4)[0] != light


def test_ratios_are_of_beside_and_alone_without_the_first() -> None:
    """The first request of a tenant finds the other alone, and would be the p99 of every short run."""
    alone = answered(bench.LIGHT, 9.0, 0.1, 0.1)
    beside = [*answered(bench.LIGHT, 9.0, 0.2, None, 0.2), *answered(bench.HEAVY, 99.0, 3.0, 3.0)]
    found = bench.compare(alone, beside)
    assert (found["alone_p99_ms"], found["beside_p50_ms"]) == (pytest.approx(100), pytest.approx(200))
    assert (found["p50_ratio"], found["p99_ratio"]) == (pytest.approx(2), pytest.approx(2))
    assert (found["heavy_p50_ms"], found["light_requests"], found["failed"]) == (pytest.approx(3000), 3, 1)
    assert "2.00 (2.00 .. 2.00)" in bench.report([found])


def test_no_answer_is_no_figure() -> None:
    """A tenant whose requests all failed has no p99."""
    with pytest.raises(BenchmarkFailed, match="light tenant"):
        bench.ttft_ms(answered(bench.LIGHT, 0.1, None), bench.LIGHT)


def test_the_tenants_file_can_be_read(tmp_path: Path) -> None:
    """The server would refuse it after the start of all processes."""
    assert set(read_tenants(bench._tenants_file(tmp_path))) == {bench.LIGHT, bench.HEAVY}


def test_a_simulated_round(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the way from the command line to the table, with tenants and without."""
    short = ["--simulate", "--seconds", "1", "--rounds", "1", "--rate", "4", "--prompt-tokens", "64"]
    for more in ([], ["--one-key"]):
        assert bench.main([*short, *more]) == 0
        assert '"light_requests": 4, "failed": 0' in capsys.readouterr().out
