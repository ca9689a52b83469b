"""Guards `baton bench routing`: the prompts that a trace becomes, the hit rate that is possible, and the table."""

from __future__ import annotations

import pytest

from baton.benchmark.cluster import routing as bench
from baton.benchmark.cluster.completions import Streamed
from baton.benchmark.cluster.metrics import MetricsPage
from baton.benchmark.cluster.routing import PolicyResult, ReplayedRequest, ideal_hit_rate, slice_of, table
from baton.benchmark.load.client import StreamOutcome
from baton.benchmark.load.meter import Usage
from baton.benchmark.load.traces import TraceRequest

TRACE = [
    TraceRequest(0.0, 1024, 128, (0, 1)),
    TraceRequest(0.0, 1000, 128, (0, 2)),
    TraceRequest(30.0, 512 * 400, 128, tuple(range(400))),  # longer than the context
    TraceRequest(60.0, 1500, 128, (0, 2, 3)),
]


def options(*more: str) -> bench.argparse.Namespace:
    return bench._options(["--trace", "unused", "--speed", "2", *more])


def test_equal_blocks_are_equal_tokens_at_shrunk_lengths() -> None:
    """Prefixes that are not shared would make all policies equal."""
    requests, left_out = slice_of(TRACE, options())
    by_length = {len(request.ids): request for request in requests}
    assert sorted(by_length) == [1000 // 64, 1024 // 64, 1500 // 64] and left_out == 1
    first, second, last = by_length[1024 // 64], by_length[1000 // 64], by_length[1500 // 64]
    assert first.ids[:8] == second.ids[:8] == last.ids[:8] and first.ids[8:15] != second.ids[8:15] == last.ids[8:15]
    assert (first.session, second.session, last.session) == ("1", "2", "2") and first.max_tokens == 2
    assert requests[0].due_s == 0.0 and 28.0 < requests[-1].due_s < 31.5  # twice as fast, within the trace's tick


def test_the_ideal_hit_rate_counts_whole_blocks_but_the_last_token() -> None:
    """The last token is always computed: a prompt that was seen is never a whole hit."""
    requests = [ReplayedRequest(0.0, tuple(range(16)), 1, ""), ReplayedRequest(1.0, tuple(range(16)), 1, "")]
    assert ideal_hit_rate(requests, 8) == 8 / 32
    assert ideal_hit_rate(requests, 4) == 12 / 32


def answer(ttft_s: float) -> Streamed:
    usage = Usage(prompt_tokens=10, completion_tokens=1)
    return Streamed(1.0, StreamOutcome("", False, 1.0 + ttft_s, 1.0 + ttft_s, (), 1, usage, ""))


def test_policies_are_compared_within_a_round() -> None:
    """A round on a busy machine would decide for the policy that ran in the other."""
    page = MetricsPage("# TYPE baton:kv_hit_missed_tokens counter\nbaton:kv_hit_missed_tokens_total 5\n")
    rounds = [("round-robin", 0.1), ("kv-aware", 0.05), ("round-robin", 0.4), ("kv-aware", 0.2)]
    results = [PolicyResult(policy, (answer(ttft_s),), 0, 1.0, page) for policy, ttft_s in rounds]
    last_row = table(results, ideal=0.5).splitlines()[-1]
    assert last_row.startswith("| kv-aware") and last_row.endswith(" 0.50                 |")
    values = results[0].values()
    assert (values["missed_tokens"], values["failed"]) == (5, 0) and values["ttft_p50_ms"] == pytest.approx(100)
