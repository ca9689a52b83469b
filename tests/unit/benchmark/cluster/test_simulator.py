"""Guards `baton bench simulator`: what it takes from the real answers, none of it from the load that is simulated."""

from __future__ import annotations

import msgspec
import pytest

from baton.benchmark.cluster import simulator as bench
from baton.benchmark.cluster.completions import Streamed
from baton.benchmark.load.client import StreamOutcome
from baton.benchmark.load.meter import Usage
from baton.simulator.latency import load_profile
from baton.simulator.workload import LengthSampler, poisson

(REQUEST,) = poisson(1, 1.0, LengthSampler(32), LengthSampler(3), seed=0)
PROFILE = load_profile("cpu-demo")


def streamed(error: str = "") -> Streamed:
    first_s = None if error else 10.5
    return Streamed(10.0, StreamOutcome(error, False, first_s, 10.9, (0.3, 0.1), 3, Usage(32, 3), ""))


def test_a_record_has_the_times_of_its_own_arrival() -> None:
    """TTFT from another moment would be compared with the simulator's."""
    record = bench._record(REQUEST, streamed())
    assert (record.ttft_s, record.tpot_s) == (pytest.approx(0.5), pytest.approx(0.2))


def test_a_request_that_failed_has_no_times() -> None:
    """It would count as the fastest of all."""
    record = bench._record(REQUEST, streamed("HTTP 503"))
    assert not record.ok and record.error == "HTTP 503"


def test_the_loop_is_what_an_idle_cluster_takes_beyond_its_steps() -> None:
    """Added twice, or below zero, it would hide an error of the model."""
    record = bench._record(REQUEST, streamed())
    fitted = bench.with_loops(PROFILE, PROFILE, [record])
    messages = PROFILE.request_s + PROFILE.stream_s + 2 * PROFILE.message_s
    assert fitted.prefill.seconds(32, 32**2) + messages == pytest.approx(record.ttft_s)
    assert fitted.decode.seconds(32 + 1.5, 1) == pytest.approx(record.tpot_s)
    slow = msgspec.structs.replace(PROFILE, message_s=60.0)
    assert bench.with_loops(slow, slow, [record]).prefill == slow.prefill


XS = (0.02, 0.03, 0.05, 0.1)


@pytest.mark.parametrize(
    ("ys", "a", "b"),
    [
        ([0.004 + 0.3 * x for x in XS], 0.004, 0.3),
        ([0.3 * x - 0.001 * (x == 0.02) for x in XS], 0.0, 0.2986),
        ([0.01 - 0.05 * x for x in XS], 0.0075, 0.0),
        ([-0.01] * 4, 0.0, 0.0),
        ([0.01 * x - 0.5 for x in XS], 0.0, 0.0),
    ],
)
def test_the_line_is_the_nearest_that_is_never_negative(ys, a, b):
    """Guards against a step that is simulated faster than it was measured, or time that is counted twice."""
    assert bench.line(list(zip(XS, ys, strict=True))) == pytest.approx((a, b), rel=1e-3, abs=1e-9)


def test_steps_of_one_length_have_a_constant():
    """Guards against a division by zero where all prompts are equally long."""
    assert bench.line([(0.05, 0.004), (0.05, 0.006)]) == pytest.approx((0.005, 0.0))
