"""Traces: lines in the formats of Mooncake and Azure, made up here; the real files are not in the repository."""

from __future__ import annotations

import pytest

from baton.benchmark.load.traces import TraceRequest, quantum_of, read_trace
from baton.node.errors import SettingsError

MOONCAKE = [
    '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}',
    '{"timestamp": 2999, "input_length": 512, "output_length": 7, "hash_ids": [0]}',
    "",
    '{"timestamp": 6000, "input_length": 1025, "output_length": 0, "hash_ids": [0, 1, 2]}',
]
AZURE = [
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n",
    "2023-11-16 23:59:59.7500000,374,44\r\n",
    "2023-11-17 00:00:01.0000001,91,16\r\n",
    "2023-11-17 00:00:00,200,1\r\n",
]


def test_mooncake_lines() -> None:
    """Milliseconds read as seconds would replay a trace a thousand times too slowly."""
    assert read_trace(MOONCAKE) == [
        TraceRequest(0.0, 600, 5, (0, 1)),
        TraceRequest(2.999, 512, 7, (0,)),
        TraceRequest(6.0, 1025, 0, (0, 1, 2)),
    ]


def test_azure_lines() -> None:
    """Seven digits after the point, a midnight in between, lines that are out of order."""
    first, second, third = read_trace(AZURE)
    assert (first.at_s, first.input_tokens, first.output_tokens, first.blocks) == (0.0, 374, 44, ())
    assert second.at_s == pytest.approx(0.25) and second.input_tokens == 200
    assert third.at_s == pytest.approx(1.2500001, abs=1e-6) and third.output_tokens == 16


def test_the_tick_of_a_clock_is_seen() -> None:
    """Spreading an exact trace would blur it; not spreading a ticking one sends bursts that never were."""
    ticking = [TraceRequest(at_s, 1, 1, ()) for at_s in (0.0, 2.999, 3.0, 9.001, 12.0)]
    assert quantum_of(ticking) == 3.0 and quantum_of(read_trace(AZURE)) == 0.0
    assert quantum_of([TraceRequest(0.0, 1, 1, ())]) == 0.0 and quantum_of([]) == 0.0


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "empty"),
        (["a,b,c"], "neither JSON lines nor a CSV"),
        (AZURE[:1], "no request"),
        ([*AZURE, "2023-11-17 00:00:00,x,1"], "line 5 .* is no request"),
        ([*AZURE, "yesterday,1,1"], "line 5 .* is no request"),
        ([*AZURE, "2023-11-17 00:00:00,1"], "line 5 .* is no request"),
        ([*MOONCAKE, "{"], "line 5 of the trace"),
        ([*MOONCAKE, '{"timestamp": 1, "input_length": 0, "output_length": 1}'], "line 5 .* lengths 0 and 1"),
        (['{"timestamp": 1, "input_length": 513, "output_length": 1, "hash_ids": [1]}'], "1 blocks for 513 tokens"),
    ],
)
def test_a_wrong_line_is_told_with_its_number(lines: list[str], said: str) -> None:
    """A file of 12,000 lines is not searched by eye."""
    with pytest.raises(SettingsError, match=said):
        read_trace(lines)
