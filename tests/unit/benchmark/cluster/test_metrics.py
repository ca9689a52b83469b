"""Guards the reading of /metrics: series summed by label, histograms subtracted."""

from __future__ import annotations

import pytest

from baton.benchmark.cluster.metrics import Histogram, MetricsPage

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
    page = MetricsPage(PAGE)
    assert page.total("baton:prompt_tokens_total", source="ram") == 7
    assert page.by("baton:prompt_tokens_total", "source") == {"ram": 7, "disk": 5}
    assert page.total("baton:prompt_tokens_total", source="peer") == page.total("no such name") == 0


def test_a_histogram_of_what_came_between() -> None:
    """Percentiles over all that the process has seen would mix the warm-up, and other cells, into a cell."""
    stage = MetricsPage(PAGE).histogram("baton:request_stage_seconds", until="second_token", stage="transfer")
    assert (stage.count, stage.mean, stage.quantile(0.5)) == (8, 0.05, pytest.approx(0.0015))
    assert stage.quantile(0.9) == 0.002  # above the last bound nothing is known
    later = stage.since(Histogram(((0.001, 2.0), (0.002, 2.0), (float("inf"), 2.0)), 0.1))
    assert (later.count, later.mean) == (6, pytest.approx(0.05))
    assert later.quantile(0.5) == pytest.approx(0.00175)


def test_a_histogram_that_saw_nothing_is_zero() -> None:
    """A colocated system hands nothing over; that must not divide by zero."""
    empty = MetricsPage(PAGE).histogram("baton:request_stage_seconds", stage="retry")
    assert (empty.count, empty.mean, empty.quantile(0.99)) == (0, 0, 0)
