"""Guards what cluster benchmarks share: metrics read and subtracted, processes ended."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from baton.benchmark.cluster.cluster import BenchmarkFailed, Cluster
from baton.benchmark.cluster.metrics import Histogram, Metrics
from baton.launch.supervisor import ChildSpec

PAGE = """\
# TYPE baton:request_stage_seconds histogram
baton:request_stage_seconds_bucket{stage="transfer",until="second_token",le="0.001"} 2
baton:request_stage_seconds_bucket{stage="transfer",until="second_token",le="0.002"} 6
baton:request_stage_seconds_bucket{stage="transfer",until="second_token",le="+Inf"} 8
baton:request_stage_seconds_sum{stage="transfer",until="second_token"} 0.4
baton:request_stage_seconds_count{stage="transfer",until="second_token"} 8
# TYPE baton:prompt_tokens counter
baton:prompt_tokens_total{source="ram",model_name="a"} 3
baton:prompt_tokens_total{source="ram",model_name="b"} 4
baton:prompt_tokens_total{source="disk",model_name="a"} 5
"""


def test_sums_over_the_series_that_have_the_labels() -> None:
    """A source's tokens taken for another's would prove a tier that was not used."""
    page = Metrics(PAGE)
    assert page.total("baton:prompt_tokens_total", source="ram") == 7
    assert page.by("baton:prompt_tokens_total", "source") == {"ram": 7, "disk": 5}
    assert page.total("baton:prompt_tokens_total", source="peer") == page.total("no such name") == 0


def test_a_histogram_of_what_came_between() -> None:
    """Percentiles over all that the process has seen would mix the warm-up, and other cells, into a cell."""
    stage = Metrics(PAGE).histogram("baton:request_stage_seconds", until="second_token", stage="transfer")
    assert (stage.count, stage.mean, stage.quantile(0.5)) == (8, 0.05, pytest.approx(0.0015))
    assert stage.quantile(0.9) == 0.002  # above the last bound nothing is known
    later = stage.since(Histogram(((0.001, 2.0), (0.002, 2.0), (float("inf"), 2.0)), 0.1))
    assert (later.count, later.mean) == (6, pytest.approx(0.05))
    assert later.quantile(0.5) == pytest.approx(0.00175)


def test_a_histogram_that_saw_nothing_is_zero() -> None:
    """A colocated system hands nothing over; that must not divide by zero."""
    empty = Metrics(PAGE).histogram("baton:request_stage_seconds", stage="retry")
    assert (empty.count, empty.mean, empty.quantile(0.99)) == (0, 0, 0)


def spec(name: str, code: str) -> ChildSpec:
    return ChildSpec(name=name, group=name, argv=(sys.executable, "-c", code), env=dict(os.environ))


STUBBORN = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); signal.pause()"


def test_a_child_that_dies_at_the_start_is_told_and_the_others_are_ended(tmp_path: Path) -> None:
    """A benchmark that waits for a dead worker wastes the machine that it was lent."""
    specs = (spec("proxy", "import signal; signal.pause()"), spec("decode-0", "raise SystemExit('no GPU')"))
    made = Cluster(specs, 1, tmp_path, start_timeout_s=20.0)
    with pytest.raises(BenchmarkFailed, match=r"(?s)decode-0 has ended.*no GPU"):
        made.start()
    made.stop()
    assert [child.poll() for child in made._children.values()] == [-signal.SIGTERM, 1]


def test_a_child_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left behind, it would hold the GPU's memory against the next system."""
    monkeypatch.setattr("baton.benchmark.cluster.cluster.STOP_TIMEOUT_S", 0.5)
    made = Cluster((spec("proxy", STUBBORN),), 1, tmp_path, start_timeout_s=20.0)
    made._spawn("proxy")
    made.wait_until(lambda: b"on" in (tmp_path / "proxy").read_bytes(), "the child", 20.0)
    made.stop()
    assert made._children["proxy"].poll() == -signal.SIGKILL
