"""Prefill that reaches no decode worker while both send heartbeats: requests go on, and the pair is avoided."""

from __future__ import annotations

from pathlib import Path

from baton.tests.integration.cluster import Cluster
from baton.tests.integration.test_failures import GREEDY, begin, demand_undisturbed, mixed, new_prompt

DISAGGREGATE = ("--local-prefill", "short", "--local-prefill-tokens", "0")
"""Decode computes prompts only where it must."""


def test_requests_whose_kv_does_not_arrive_go_on_and_later_ones_avoid_the_pair(tmp_path: Path) -> None:
    """Guards against clients that wait for the deadline of ten minutes, and against retries of every later request."""
    cut_off = tmp_path / "cut-off"
    with Cluster(prefill=1, decode=1, proxy_args=DISAGGREGATE, cut_off_file=cut_off) as cluster:
        cluster.wait_workers("prefill-0", "decode-0")
        cluster.complete(new_prompt(), **GREEDY)
        assert cluster.counter("routed_local_transfer_failed") == 0
        cut_off.touch()
        requests = mixed(4)
        streams = begin(cluster, requests)
        for stream in streams:
            stream.join()
        assert cluster.gauge("failed_pairs") == 1
        retries, handed_over = cluster.retries(), cluster.counter("routed_disaggregated")
        assert 1 <= retries <= len(requests)
        later = mixed(2)
        later_streams = begin(cluster, later)
        for stream in later_streams:
            stream.join()
        assert (cluster.retries(), cluster.counter("routed_disaggregated")) == (retries, handed_over)
        cut_off.unlink()
        cluster.wait_until(lambda: cluster.gauge("failed_pairs") == 0, "the pair to be tried again")
        cluster.complete(new_prompt(), **GREEDY)
        assert cluster.counter("routed_disaggregated") == handed_over + 1
        assert cluster.retries() == retries
        demand_undisturbed(cluster, requests + later, streams + later_streams)
        cluster.wait_idle()


def test_a_link_that_is_cut_while_idle_is_avoided_before_a_request_needs_it(tmp_path: Path) -> None:
    """Guards the first request after a link was cut: its transfer had to stall before anything was known."""
    cut_off = tmp_path / "cut-off"
    with Cluster(prefill=1, decode=1, proxy_args=DISAGGREGATE, cut_off_file=cut_off) as cluster:
        cluster.wait_workers("prefill-0", "decode-0")
        cluster.complete(new_prompt(), **GREEDY)
        handed_over = cluster.counter("routed_disaggregated")
        cut_off.touch()
        cluster.wait_until(lambda: cluster.gauge("failed_pairs") == 1, "the cut to be noticed")
        requests = mixed(2)
        streams = begin(cluster, requests)
        demand_undisturbed(cluster, requests, streams)
        assert (cluster.retries(), cluster.counter("routed_disaggregated")) == (0, handed_over)
        cut_off.unlink()
        cluster.wait_until(lambda: cluster.gauge("failed_pairs") == 0, "the pair to answer again")
        cluster.complete(new_prompt(), **GREEDY)
        assert (cluster.retries(), cluster.counter("routed_disaggregated")) == (0, handed_over + 1)
        cluster.wait_idle()
