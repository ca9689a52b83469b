"""The timeline on a clock of the test's own: the stages of a segment sum to it, whatever happens in whatever order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.node.messages.control import Stages
from baton.proxy.metrics.timeline import (
    FIRST_TOKEN,
    LAST_TOKEN,
    MAX_ATTEMPTS_KEPT,
    SECOND_TOKEN,
    STAGES,
    USUAL,
    Segment,
    Timeline,
)


@dataclass(slots=True)
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


PREFILL = Stages(queue_s=1.0, tier_load_s=0.5, prefill_s=2.0)
DECODE = Stages(transfer_wait_s=0.25, transfer_s=1.0, admission_s=0.125, step_s=0.5)


def begun(clock: Clock) -> Timeline:
    """A request that has been with its workers for no time yet: 0.5 s each of admission, tokenise, queue and route."""
    line = Timeline(clock)
    for stage in ("tokenise", "queue", "route"):
        clock.now_s += 0.5
        line.enter(stage)
    clock.now_s += 0.5
    line.dispatch("p0", "d0", b"h")
    return line


def seconds(segment: Segment) -> dict[str, float]:
    return {stage: took_s for stage, took_s in segment.stages if took_s}


def test_a_request_from_its_first_byte_to_its_end() -> None:
    """Guards the whole line: each stage is where it was spent, and what a worker does not know of is network."""
    clock = Clock()
    line = begun(clock)
    clock.now_s += 4.0
    line.report(PREFILL)
    clock.now_s += 0.25
    assert line.shown()
    clock.now_s += 2.0
    line.report(DECODE)
    clock.now_s += 0.25
    assert not line.shown()
    clock.now_s += 7.0
    line.end(finished=True)
    first, second, last = line.segments
    proxy = {"admission": 0.5, "tokenise": 0.5, "queue": 0.5, "route": 0.5}
    workers = {"prefill_queue": 1.0, "tier_load": 0.5, "prefill": 2.0, "network": 0.5, "reply": 0.25}
    assert seconds(first) == proxy | workers and first.total_s == 6.25
    worker = {"transfer_wait": 0.25, "transfer": 1.0, "decode_admission": 0.125, "first_step": 0.5}
    assert seconds(second) == worker | {"network": 0.125, "reply": 0.25} and second.total_s == 2.25
    assert seconds(last) == {"decode": 7.0}
    assert [(segment.until, segment.complete) for segment in line.segments] == [(until, True) for until in USUAL]
    for segment in line.segments:
        assert [stage for stage, _ in segment.stages if stage in USUAL[segment.until]] == sorted(
            USUAL[segment.until], key=list(STAGES).index
        )


def test_a_worker_that_counts_more_than_passed_here_is_cut_from_its_beginning() -> None:
    """Guards against a negative network: the transfer begins before the first token has reached the client."""
    clock = Clock()
    line = begun(clock)
    line.report(Stages())
    clock.now_s += 1.0
    line.shown()
    clock.now_s += 1.0
    line.report(DECODE)
    line.shown()
    assert seconds(line.segments[1]) == {"transfer": 0.375, "decode_admission": 0.125, "first_step": 0.5}


def test_failed_attempts_are_retry_and_busy_ones_are_queue() -> None:
    """Guards the time that a dead worker cost against looking like prefill, and a full one like a fault."""
    clock = Clock()
    line = begun(clock)
    clock.now_s += 3.0
    line.fail_attempt("d0 is busy", busy=True)
    clock.now_s += 0.5  # a pause
    line.enter("queue")
    line.enter("route")
    line.dispatch("p0", "d1", b"h")
    clock.now_s += 8.0
    line.fail_attempt("p0 was lost", busy=False)
    line.enter("queue")
    line.enter("route")
    line.dispatch("p1", "d1", b"h")
    clock.now_s += 4.0
    line.report(PREFILL)
    line.shown()
    (first,) = line.segments
    assert seconds(first)["retry"] == 8.0 and seconds(first)["queue"] == 0.5 + 3.0 + 0.5
    assert math.isclose(sum(seconds(first).values()), first.total_s)
    assert [(each.prefill, each.end) for each in line.attempts] == [
        ("p0", "d0 is busy"),
        ("p0", "p0 was lost"),
        ("p1", ""),
    ]


def test_a_worker_lost_in_mid_stream_costs_from_the_last_token_on() -> None:
    """Guards decode's time: what the dead worker had given was not lost, the silence after it was."""
    clock = Clock()
    line = begun(clock)
    line.report(PREFILL)
    line.shown()
    line.report(DECODE)
    line.shown()
    clock.now_s += 5.0
    line.last_tokens_at = clock.now_s
    clock.now_s += 2.0
    line.fail_attempt("d0 was lost", busy=False)
    line.enter("queue")
    line.enter("route")
    line.dispatch("p0", "d1", b"h")
    clock.now_s += 4.0
    line.report(PREFILL)
    clock.now_s += 6.0
    line.end(finished=True)
    last = seconds(line.segments[2])
    assert (last["decode"], last["retry"], last["prefill"]) == (11.0, 2.0, 2.0)


@pytest.mark.parametrize("shown", [0, 1, 2])
def test_a_generation_that_fails_ends_where_it_was(shown: int) -> None:
    """Guards the timelines of cancelled and failed requests: the segment they ended in is there, and not complete."""
    clock = Clock()
    line = begun(clock)
    for stages in (PREFILL, DECODE)[:shown]:
        line.report(stages)
        line.shown()
    clock.now_s += 1.5
    line.end(finished=False)
    line.end(finished=False)
    assert not line.shown()
    assert [segment.complete for segment in line.segments] == [True] * shown + [False]
    assert seconds(line.segments[-1])["in_flight" if shown < 2 else "decode"] == 1.5


def test_one_token_is_all() -> None:
    """Guards an answer that ends with its first token: there is no wait for decode, and no gap to a second one."""
    clock = Clock()
    line = begun(clock)
    line.report(PREFILL)
    line.shown()
    clock.now_s += 0.5
    line.end(finished=True)
    assert [(segment.until, segment.complete) for segment in line.segments] == [
        (FIRST_TOKEN, True),
        (SECOND_TOKEN, False),
    ]
    assert seconds(line.segments[1]) == {"reply": 0.5}


def test_generations_of_one_request_share_its_beginning_only() -> None:
    """Guards n > 1: admission and tokenising belong to each, nothing after does."""
    clock = Clock()
    common, reported = Timeline(clock), []
    clock.now_s += 1.0
    common.enter("tokenise")
    clock.now_s += 2.0
    lines = [common.fork(reported.append) for _ in range(2)]
    for line in lines:
        clock.now_s += 1.0
        line.enter("queue")
        line.end(finished=False)
    assert [dict(seconds(segment)) for segment in reported] == [
        {"admission": 1.0, "tokenise": 3.0},
        {"admission": 1.0, "tokenise": 4.0},
    ]
    assert common.segments == ()


def test_attempts_are_bounded() -> None:
    """Guards memory: a full cluster answers Busy fifty times a second."""
    line = begun(Clock())
    for _ in range(100):
        line.fail_attempt("busy", busy=True)
        line.dispatch("p0", "d0", b"")
    assert line.num_attempts == 101 and len(line.attempts) == MAX_ATTEMPTS_KEPT


durations = st.floats(0.0, 100.0)
stages = st.builds(Stages, durations, durations, durations, durations, durations, durations, durations)
events = st.one_of(
    st.tuples(st.just("enter"), st.sampled_from(["tokenise", "queue", "route"])),
    st.tuples(st.just("report"), stages),
    st.tuples(st.sampled_from(["shown", "dispatch", "reported"]), st.none()),
    st.tuples(st.just("fail"), st.booleans()),
)


@given(st.lists(st.tuples(durations, events), max_size=30), st.booleans())
def test_no_order_of_events_breaks_the_sums(steps: list[tuple[float, tuple[str, object]]], finished: bool) -> None:
    """Guards exactness on every path: segments follow one another without a gap, no stage is negative or unknown."""
    clock = Clock()
    line = begun(clock)
    for wait_s, (event, value) in steps:
        clock.now_s += wait_s
        match event, value:
            case "enter", str():
                line.enter(value)
            case "report", Stages():
                line.report(value)
            case "fail", bool():
                line.fail_attempt("", busy=value)
            case "shown", _:
                line.shown()
            case "dispatch", _:
                line.dispatch("p0", "d0", b"")
            case "reported", _:
                line.last_tokens_at = clock.now_s
    line.end(finished=finished)
    assert math.isclose(sum(segment.total_s for segment in line.segments), clock.now_s - 100.0, abs_tol=1e-9)
    for segment in line.segments:
        assert math.isclose(sum(took_s for _, took_s in segment.stages), segment.total_s, abs_tol=1e-9)
        assert all(took_s >= 0.0 and stage in STAGES for stage, took_s in segment.stages)
    assert [segment.until for segment in line.segments] == list(USUAL)[: len(line.segments)]
    assert [segment.complete for segment in line.segments[:-1]] == [True] * (len(line.segments) - 1)
    assert line.segments[-1].complete == (finished and line.segments[-1].until == LAST_TOKEN)
