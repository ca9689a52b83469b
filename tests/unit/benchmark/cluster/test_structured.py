"""Guards `baton bench structured`: the schemas are long enough and differ, and the line of a turn is counted right."""

from __future__ import annotations

import json

import pytest

from baton.benchmark.cluster import structured as bench
from baton.benchmark.cluster.completions import Streamed
from baton.benchmark.harness.errors import BenchmarkFailed
from baton.benchmark.load.client import StreamOutcome
from baton.benchmark.load.meter import Usage


def outcome(first_s: float, last_s: float, tokens: int, error: str = "") -> Streamed:
    usage = Usage(prompt_tokens=4, completion_tokens=tokens)
    return Streamed(1.0, StreamOutcome(error, False, first_s, last_s, (0.01, 0.03), 3, usage, ""))


def test_every_schema_is_new_and_longer_than_the_answer() -> None:
    """A schema that the server knows, or an answer that ends early, would measure something else."""
    texts = {json.dumps(bench.schema(number, 1, bounded=True)) for number in range(50)}
    assert len(texts) == 50
    asked = bench.constrained(3, 256, bounded=False)["structured_outputs"]
    assert isinstance(asked, dict) and asked["json"]["minItems"] == 256


def test_a_turn_counts_what_was_answered() -> None:
    line = bench.stream_line([outcome(1.5, 3.0, 100), outcome(2.0, 5.0, 100), outcome(2.0, 9.0, 7, "timeout")])
    assert (line["completed"], line["failed"], line["tokens"]) == (2, 1, 200)
    assert line["tokens_per_s"] == pytest.approx(200 / 4)
    assert line["ttft_p50_ms"] == pytest.approx(750) and line["itl_p50_ms"] == pytest.approx(20)


def test_a_turn_without_an_answer_fails() -> None:
    with pytest.raises(BenchmarkFailed, match="timeout"):
        bench.stream_line([outcome(2.0, 9.0, 7, "timeout")])
