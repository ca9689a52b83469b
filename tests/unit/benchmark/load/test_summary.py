"""The figures of a run: worked out by hand, and compared with what vLLM's formulas give for any records."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.benchmark.load.record import CANCELLED, COMPLETED, FAILED, Record
from baton.benchmark.load.summary import Distribution, Objectives, summarize
from baton.node.errors import SettingsError


def record(
    index: int = 0,
    status: str = COMPLETED,
    due_s: float = 0.0,
    sent_s: float | None = None,
    ttft_s: float | None = 1.0,
    gaps_s: tuple[float, ...] = (),
    output_tokens: int | None = None,
    error: str = "",
) -> Record:
    first_s = None if ttft_s is None else due_s + ttft_s
    return Record(
        index=index,
        conversation=index,
        turn=0,
        status=status,
        error=error,
        due_s=due_s,
        begun_s=due_s,
        sent_s=due_s if sent_s is None else sent_s,
        first_s=first_s,
        last_s=due_s + 1.0 if first_s is None else first_s + sum(gaps_s),
        gaps_s=gaps_s,
        prompt_tokens=10,
        cached_tokens=4,
        output_tokens=1 + len(gaps_s) if output_tokens is None else output_tokens,
        counted=True,
    )


NONE = Objectives({})


def test_a_run_by_hand() -> None:
    """Three requests with round numbers: one late in the client, one with several tokens a chunk, one that failed."""
    records = [
        record(0, due_s=0.0, ttft_s=0.1, gaps_s=(0.02, 0.04)),
        record(1, due_s=1.0, sent_s=1.2, ttft_s=0.5, gaps_s=(0.1,), output_tokens=5),
        record(2, FAILED, due_s=1.5, ttft_s=None, error="HTTP 503: busy"),
        record(3, CANCELLED, due_s=2.0, ttft_s=0.3),
    ]
    found = summarize(records, 4.0, 1, Objectives({"ttft": 200.0, "tpot": 30.0}), (50.0, 99.0))
    assert (found.completed, found.failed, found.cancelled, found.unsent) == (2, 1, 1, 1)
    assert found.failures == (("HTTP 503: busy", 1),)
    assert (found.total_input_tokens, found.total_cached_tokens, found.total_output_tokens) == (20, 8, 8)
    assert (found.request_throughput, found.output_throughput, found.total_token_throughput) == (0.5, 2.0, 7.0)
    assert found.tokens_per_chunk == 8 / 5
    ttft, tpot, itl, e2el = (found.latencies[name] for name in ("ttft", "tpot", "itl", "e2el"))
    assert (ttft.mean, ttft.median, ttft.std) == pytest.approx((300, 300, 200))
    assert (tpot.mean, tpot.count) == (pytest.approx((30 + 25) / 2), 2)
    assert (itl.count, itl.mean) == (3, pytest.approx(160 / 3))
    assert e2el.at(99) == pytest.approx(160 + 0.99 * 440)
    assert found.client_queue.mean == pytest.approx(50)
    assert found.good == 1 and found.request_goodput == 0.25
    assert found.attainment == 1 / 4  # of those completed, failed and not sent
    assert found.max_concurrent_requests == 2
    assert found.max_output_tokens_per_s == 5.0


RECORDS = st.lists(
    st.builds(
        record,
        status=st.sampled_from([COMPLETED, COMPLETED, FAILED]),
        due_s=st.floats(0, 100),
        ttft_s=st.floats(0, 10),
        gaps_s=st.lists(st.floats(0, 2), max_size=5).map(tuple),
        output_tokens=st.integers(1, 12),
    ),
    max_size=20,
)


@given(RECORDS, st.floats(0, 5000), st.floats(0, 500))
def test_it_is_what_vllm_computes(records: list[Record], ttft_ms: float, tpot_ms: float) -> None:
    """vLLM's definitions, written out over lists as its client holds them: latency, ttft, itl, output_tokens."""
    outputs = [
        (r.last_s - r.due_s, (r.first_s or 0) - r.due_s, list(r.gaps_s), r.output_tokens)
        for r in records
        if r.completed
    ]
    tpots_of_all = [(latency - ttft) / (tokens - 1) if tokens > 1 else 0.0 for latency, ttft, _, tokens in outputs]
    tpots = [tpot for tpot, output in zip(tpots_of_all, outputs, strict=True) if output[3] > 1]
    lists = {
        "ttft": [ttft for _, ttft, _, _ in outputs],
        "tpot": tpots,
        "itl": [gap for _, _, itl, _ in outputs for gap in itl],
        "e2el": [latency for latency, _, _, _ in outputs],
    }
    good = sum(
        ttft <= ttft_ms / 1000 and tpot <= tpot_ms / 1000
        for (_, ttft, _, _), tpot in zip(outputs, tpots_of_all, strict=True)
    )
    found = summarize(records, 7.0, 0, Objectives({"ttft": ttft_ms, "tpot": tpot_ms}), (90.0, 99.5))
    for name, values in lists.items():
        distribution = found.latencies[name]
        assert distribution.mean == pytest.approx(np.mean(values or 0) * 1000)
        assert distribution.std == pytest.approx(np.std(values or 0) * 1000, abs=1e-6)  # 0, but for rounding
        assert distribution.median == pytest.approx(np.median(values or 0) * 1000)
        assert dict(distribution.percentiles)[99.5] == pytest.approx(np.percentile(values or 0, 99.5) * 1000)
    assert found.output_throughput == sum(tokens for _, _, _, tokens in outputs) / 7.0
    assert abs(found.good - good) <= _ties(records, ttft_ms, tpot_ms)


def _ties(records: list[Record], ttft_ms: float, tpot_ms: float) -> int:
    """Requests so near to a limit that the order of two roundings decides."""
    near = 0
    for r in records:
        ttft_off, tpot_off = 1000 * (r.ttft_s or 0) - ttft_ms, 1000 * (r.tpot_s or 0) - tpot_ms
        near += abs(ttft_off) < 1e-6 or abs(tpot_off) < 1e-6
    return near


def test_nothing_is_no_division_by_zero() -> None:
    """A run in which all failed must still be summarised."""
    found = summarize([], 0.0, 0, NONE, (50.0, 99.0))
    assert (found.request_throughput, found.attainment, found.tokens_per_chunk) == (0, 0, 0)
    assert found.latencies["ttft"] == Distribution(0, 0, 0, 0, ((50.0, 0), (99.0, 0)))


def test_one_that_ends_as_another_begins_is_not_beside_it() -> None:
    """Counted as two at once, one by one looks like a concurrency of two."""
    one_by_one = [record(n, due_s=float(n), ttft_s=0.5, gaps_s=(0.5,)) for n in range(5)]
    assert summarize(one_by_one, 5.0, 0, NONE, (50.0,)).max_concurrent_requests == 1


def test_goodput_counts_one_token_answers_by_ttft_alone() -> None:
    """As vLLM does: without a second token there is no TPOT to miss."""
    objectives = Objectives({"tpot": 0.0, "ttft": 1000.0})
    assert objectives.keeps(record(gaps_s=())) and not objectives.keeps(record(gaps_s=(0.1,)))
    assert not objectives.keeps(record(status=FAILED))
    assert Objectives({"e2el": 1100.0}).keeps(record(gaps_s=(0.1,))) is True


def test_objectives_are_read_as_vllm_writes_them() -> None:
    assert Objectives.parse(["ttft:1000", "tpot:15.5"]).limits_ms == {"ttft": 1000.0, "tpot": 15.5}
    for wrong in ("itl:5", "ttft", "ttft:", "ttft:-1", "ttft:x", "ttft:nan"):
        with pytest.raises(SettingsError, match="objective"):
            Objectives.parse([wrong])
