"""The fault benchmark's schedule, its verdicts and its sums, without a cluster."""

from __future__ import annotations

import io
import json

import pytest

from baton.benchmark.cluster import forks
from baton.benchmark.cluster.fault_report import Event, Footprint, summary, table
from baton.benchmark.cluster.fault_schedule import KINDS, plan
from baton.benchmark.cluster.fault_streams import (
    BLAMED,
    BROKEN,
    HUNG,
    REFUSED,
    RIGHT,
    ROUNDED,
    WRONG,
    Fork,
    StreamRequest,
    StreamResult,
)

NODES = ["proxy", "prefill-0", "decode-0"]
REQUEST = StreamRequest((1, 2), 4, None)
IDLE = Footprint(0.0, 0.0, {"proxy": 70.0}, {"proxy": 30})


def test_a_seed_gives_one_schedule() -> None:
    """Guards a failure that must be found again."""
    assert plan(3, 60, NODES, KINDS, 15.0) == plan(3, 60, NODES, KINDS, 15.0)
    assert plan(3, 60, NODES, KINDS, 15.0) != plan(4, 60, NODES, KINDS, 15.0)


def test_each_kind_comes_as_often_and_some_at_once() -> None:
    """Guards a run that leaves a kind of fault out."""
    events = plan(0, 63, NODES, KINDS, 4.0)
    faults = [fault for event in events for fault in event]
    assert {kind: sum(fault.kind == kind for fault in faults) for kind in KINDS} == dict.fromkeys(
        KINDS, 63 // len(KINDS)
    )
    assert {len(event) for event in events} == {1, 2}
    assert all(first.target != second.target for first, second in (event for event in events if len(event) == 2))
    assert max(fault.lasts_s for fault in faults) <= 4.0


@pytest.mark.parametrize(
    ("fields", "verdict"),
    [
        ({"text": "right text", "finished": True}, RIGHT),
        ({"text": "right", "finished": True}, WRONG),
        ({"text": "wrong"}, WRONG),
        ({"text": "right", "end": "timeout"}, HUNG),
        ({"text": "right", "error": "gave up", "status": 200}, REFUSED),
        ({"error": "no worker", "status": 503}, REFUSED),
        ({"error": "bad request", "status": 400}, BLAMED),
        ({"error": "queue is full", "status": 429}, REFUSED),
        ({"text": "rig", "end": "lost"}, BROKEN),
    ],
)
def test_verdicts(fields: dict[str, object], verdict: str) -> None:
    """Guards the figures: a stream that lost a token must not count as refused, nor a hang as an end."""
    result = StreamResult(REQUEST, 0.0, **fields)  # type: ignore[arg-type]
    assert result.verdict("right text") == verdict


@pytest.mark.parametrize(
    ("text", "before", "verdict"),
    [
        ("rightly so", "right", ROUNDED),
        ("rightly so", "rightl", WRONG),
        ("rightly so", None, WRONG),
        ("right text", "r", RIGHT),
    ],
)
def test_only_what_follows_a_pause_may_be_rounded(text: str, before: str | None, verdict: str) -> None:
    """Guards the verdict on a GPU: a token that changed before any fault was met is wrong there too."""
    pause = None if before is None else 1
    result = StreamResult(REQUEST, 0.0, text=text, finished=True, first_pause=pause, text_before_pause=before or "")
    assert result.verdict("right text", exact=False) == verdict


@pytest.mark.parametrize(("margin", "verdict"), [(0.03, ROUNDED), (0.3, WRONG), (None, WRONG)])
def test_a_greedy_stream_is_rounded_only_to_a_token_as_likely(margin: float | None, verdict: str) -> None:
    """Guards the exit status on a GPU: damaged KV behind a fault must not pass for a rounding."""
    result = StreamResult(REQUEST, 0.0, text="rightly so", finished=True, first_pause=1, text_before_pause="right")
    result.fork = Fork(1, margin)
    assert result.verdict("right text", exact=False) == verdict


def test_equal_tokens_with_another_text_are_no_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an end of the report by an exception, after the whole run."""
    answer = json.dumps({"choices": [{"token_ids": [1, 2], "logprobs": {"top_logprobs": []}}]}).encode()
    monkeypatch.setattr(forks, "urlopen", lambda *_, **__: io.BytesIO(answer))
    result = StreamResult(REQUEST, 0.0, token_ids=[1], finished=True)
    assert forks.fork_of(result, "http://nowhere", "demo") == Fork(1, None)


@pytest.mark.parametrize(("drawn", "margin"), [(3, 0.5), (4, None)])
def test_a_fork_has_the_distance_of_both_tokens(
    drawn: int, margin: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the difference between a rounding and a damaged state."""
    top = [{"token_id:1": -0.1}, {"token_id:2": -1.0, "token_id:3": -1.5}]
    answer = json.dumps({"choices": [{"token_ids": [1, 2], "logprobs": {"top_logprobs": top}}]}).encode()
    monkeypatch.setattr(forks, "urlopen", lambda *_, **__: io.BytesIO(answer))
    result = StreamResult(REQUEST, 0.0, token_ids=[1, drawn], finished=True, first_pause=1)
    assert forks.fork_of(result, "http://nowhere", "demo") == Fork(1, margin)


def test_a_run_that_does_not_hold_says_so() -> None:
    """Guards the exit status: one wrong stream, one process that stays away, or one block that is held."""
    right = StreamResult(REQUEST, 0.0, 1.0, text="abc", finished=True)
    back = Event(0, "kill proxy", ("kill",), 0.5, 2.0, 0.3, 1.0, 0)
    away = Event(1, "kill proxy", ("kill",), 0.5, 2.0, None, None, 0)
    texts = {REQUEST: "abc"}
    assert summary([back], [right], texts, (IDLE, IDLE)).holds
    assert not summary([back], [right], {REQUEST: "abd"}, (IDLE, IDLE)).holds
    assert not summary([away], [right], texts, (IDLE, IDLE)).holds
    assert not summary([back], [right], texts, (IDLE, Footprint(1.0, 0.0, {}, {}))).holds
    assert "| kill  | 2      | 1     |" in table([back, away], [right], texts, (IDLE, IDLE))
