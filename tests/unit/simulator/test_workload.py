"""simulator.workload, record and capacity: requests from seeds and traces, and their metrics."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.node.errors import SettingsError
from baton.simulator.capacity import hit_rate
from baton.simulator.record import RequestRecord, Slo, Spread, attainment, summarise
from baton.simulator.workload import LengthSampler, SimRequest, poisson, read_trace, speed_up

LINE = '{{"timestamp": {at}, "input_length": {n}, "output_length": 3, "hash_ids": {ids}}}\n'


def _trace(path: Path, *lines: tuple[int, int, list[int]]) -> Path:
    path.write_text("".join(LINE.format(at=at, n=n, ids=ids) for at, n, ids in lines))
    return path


def test_prompts_share_exactly_the_prefix_of_the_trace(tmp_path: Path) -> None:
    """Guards the hit rate of a replay's prefix cache."""
    trace = _trace(tmp_path / "t", (0, 1200, [7, 8, 9]), (3000, 1030, [7, 8, 5]))
    first, second = (request.prompt_ids() for request in read_trace(trace, 0))
    assert (len(first), len(second)) == (1200, 1030)
    assert first[:1024] == second[:1024] and first[1024] != second[1024]


def test_a_trace_is_spread_within_its_quantum_by_its_seed(tmp_path: Path) -> None:
    """Guards arrivals: time stamps are rounded to 3 s, and replaying them as bursts would be unrealistic."""
    trace = _trace(tmp_path / "t", *[(3000 * (n // 10), 100, [n]) for n in range(40)])
    one, again, other = read_trace(trace, 1), read_trace(trace, 1), read_trace(trace, 2)
    assert one == again != other
    assert [request.arrival_s for request in one] == sorted(request.arrival_s for request in one)
    assert all(
        3.0 * (request.prefix[0] // 10) <= request.arrival_s <= 3.0 * (request.prefix[0] // 10 + 1) for request in one
    )
    assert speed_up(one, 3.0)[9].arrival_s == one[9].arrival_s / 3.0


@pytest.mark.parametrize("line", ["{}", LINE.format(at=0, n=1000, ids=[1]), LINE.format(at=0, n=10, ids=[-1]), "x"])
def test_an_invalid_trace_is_an_error(tmp_path: Path, line: str) -> None:
    """Guards the command line against a traceback, and against a run on invalid input."""
    (tmp_path / "t").write_text(line + "\n")
    with pytest.raises(SettingsError, match="t"):
        read_trace(tmp_path / "t", 0)


def test_poisson_has_its_rate_and_lengths() -> None:
    """Guards the distributions of generated workloads."""
    requests = poisson(4000, 5.0, LengthSampler(1000, 0.5), LengthSampler(100), seed=1)
    assert requests == poisson(4000, 5.0, LengthSampler(1000, 0.5), LengthSampler(100), seed=1)
    assert requests[-1].arrival_s == pytest.approx(800, rel=0.1)
    assert statistics.mean(request.prompt_tokens for request in requests) == pytest.approx(1000, rel=0.1)
    assert {request.output_tokens for request in requests} == {100}
    assert len({request.prompt_ids()[:1] for request in requests}) == 4000


def _record(arrival_s: float, *token_s: float, error: str = "") -> RequestRecord:
    return RequestRecord(SimRequest(0, arrival_s, 10, max(1, len(token_s)), (0,)), list(token_s), 0, error)


def test_latencies_follow_the_usual_definitions() -> None:
    """Guards the definitions: TTFT from arrival, TPOT without the first token, goodput over all arrivals."""
    record = _record(1.0, 1.5, 1.6, 1.9)
    assert (record.ttft_s, record.e2e_s) == (0.5, pytest.approx(0.9))
    assert record.tpot_s == pytest.approx(0.2) and record.longest_wait_s == 0.5
    records = [record, _record(2.0, 4.0), _record(3.0, error="Overloaded: full")]
    assert attainment(records, Slo(1.0, 0.25)) == pytest.approx(1 / 3)
    summary = summarise(records)
    assert (summary.requests, summary.failed, summary.output_tokens) == (3, 1, 4)
    assert summary.duration_s == pytest.approx(3.0)
    assert summary.itl.p50_s == pytest.approx(0.2)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=50))
def test_percentiles_equal_numpys(values: list[float]) -> None:
    """Guards the interpolation between ranks."""
    spread = Spread.of(values)
    assert spread.p50_s == pytest.approx(np.percentile(values, 50), rel=1e-9, abs=1e-9)
    assert spread.p99_s == pytest.approx(np.percentile(values, 99), rel=1e-9, abs=1e-9)


def _prompts(*prefixes: tuple[int, ...]) -> list[SimRequest]:
    return [SimRequest(n, float(n), 512 * len(prefix), 1, prefix) for n, prefix in enumerate(prefixes)]


def test_hit_rate_of_a_tier() -> None:
    """Guards the LRU: hits are prefixes, the oldest block is evicted first, a tail before its head."""
    requests = _prompts((1, 2, 3), (4,), (1, 2, 3), (2, 3))
    assert hit_rate(requests, float("inf")).hit_tokens == 3 * 512 + 2 * 512
    assert hit_rate(requests, 3 * 512).hit_tokens == 2 * 512 + 2 * 512
    assert hit_rate(requests, 512).hit_tokens == 0


def test_a_larger_tier_never_hits_less() -> None:
    """Guards the inclusion property of LRU."""
    chance = random.Random(0)
    requests = _prompts(
        *(
            tuple(range(family * 10, family * 10 + chance.randint(1, 9)))
            for family in (chance.randint(0, 30) for _ in range(300))
        )
    )
    shares = [hit_rate(requests, blocks * 512).share for blocks in range(0, 300, 10)]
    assert shares == sorted(shares) and shares[-1] > 0.5
