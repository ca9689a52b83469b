"""Plans: what settings, a rate and a seed come to."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from baton.benchmark.load.plan import Plan
from baton.benchmark.load.planner import make_plan, read_inputs
from baton.benchmark.load.settings import ServingSettings
from baton.node.errors import SettingsError


def planned(rate: float | None = math.inf, seed: int = 0, **options: object) -> Plan:
    settings = ServingSettings(**options)  # type: ignore[arg-type]  # of many types, checked by the test
    return make_plan(settings, read_inputs(settings), rate, seed)


def times(plan: Plan) -> list[float]:
    return [conversation.due_s for conversation in plan.conversations]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Ten requests a second apart, on a clock that ticks every second."""
    path = tmp_path / "trace.jsonl"
    line = '{{"timestamp": {}, "input_length": 100, "output_length": 10}}\n'
    path.write_text("".join(line.format(1000 * number) for number in range(10)))
    return path


def test_a_rate_is_a_schedule_and_infinity_is_none() -> None:
    """Latencies of a closed loop begin elsewhere: the two must not be mixed up."""
    at_once, spread = planned(num_prompts=5), planned(10.0, num_prompts=5, num_warmups=2)
    assert times(at_once) == [0.0] * 5 and not at_once.scheduled and at_once.offered_rate is None
    assert spread.scheduled and spread.offered_rate == pytest.approx(10.0) and len(spread.warmups) == 2
    assert times(planned(4.0, num_prompts=2, arrivals="constant")) == [0.25, 0.5]


def test_a_duration_is_as_many_requests_as_are_due_in_it() -> None:
    """A fixed number of requests makes a high rate a short run, that ends before a queue has grown."""
    assert planned(3.0, duration_s=20.0, request_rate=("3",)).num_requests == 60
    assert planned(0.001, duration_s=20.0, request_rate=("0.001",)).num_requests == 1


def test_turns_multiply_requests_not_conversations() -> None:
    plan = planned(num_prompts=4, turns=3)
    assert len(plan.conversations) == 4 and plan.num_requests == 12


def test_a_trace_has_its_own_times(trace: Path) -> None:
    """Faster, slower, at a mean rate, for a while, or only its beginning."""
    assert times(planned(None, trace=trace)) == [float(number) for number in range(10)]
    assert times(planned(None, trace=trace, trace_speed=2.0))[-1] == 4.5
    assert planned(5.0, trace=trace).offered_rate == pytest.approx(5.0)
    assert planned(None, trace=trace, duration_s=3.5).num_requests == 4
    assert planned(None, trace=trace, num_prompts=2).num_requests == 2
    assert times(planned(math.inf, trace=trace, num_prompts=2)) == [0.0, 0.0]
    moved = times(planned(None, trace=trace, trace_jitter_s=1.0))
    assert moved != times(planned(None, trace=trace)) and moved == sorted(moved)


def test_warm_ups_are_as_long_as_the_requests(trace: Path) -> None:
    """Shorter ones leave the long shapes cold; those of a trace must not be the trace's own prompts."""
    assert [turn.prompt_tokens for turn in planned(None, trace=trace, num_warmups=1).warmups] == [100]
    warm = planned(num_prompts=1, random_input_len=9, random_prefix_len=3, num_warmups=1).warmups
    assert [(turn.prompt_tokens, turn.max_tokens) for turn in warm] == [(12, 128)]


def test_seeds_differ_and_repeat() -> None:
    one = planned(5.0, 1, num_prompts=20, random_range_ratio=0.5, cancel_rate=0.25)
    assert one == planned(5.0, 1, num_prompts=20, random_range_ratio=0.5, cancel_rate=0.25)
    assert one != planned(5.0, 2, num_prompts=20, random_range_ratio=0.5, cancel_rate=0.25)
    assert sum(turn.cancel_after is not None for c in one.conversations for turn in c.turns) == 5


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    for option in ("trace", "dataset_path"):
        with pytest.raises(SettingsError, match="cannot read"):
            planned(**{option: tmp_path / "nothing"})


def test_a_prompt_file_is_what_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "max_tokens": 3}\n')
    plan = planned(dataset_path=path, num_prompts=3, random_output_len=8)
    assert [c.turns[0].max_tokens for c in plan.conversations] == [8, 3, 8]
