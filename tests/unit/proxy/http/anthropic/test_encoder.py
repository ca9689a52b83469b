"""Answers of the Messages API, whole and streamed, from events alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.node.messages.control import SamplingSpec
from baton.proxy.formats.events import CallArguments, CallBegin, CallEnd, ReasoningText
from baton.proxy.http.anthropic.encoder import MessagesEncoder
from baton.proxy.http.encoder import AnswerHeader
from baton.proxy.http.events import ChoiceEnd, Content, Event, TokenUsage
from baton.proxy.http.failures import Failure
from baton.tests.unit.proxy.http.anthropic.stream_reader import events_of, read_stream

HEADER = AnswerHeader(
    id="msg_1",
    created=5,
    model="demo",
    logprobs=False,
    token_ids=False,
    include_usage=False,
    prompt_tokens=10,
    sampling=SamplingSpec(max_tokens=9),
)
USAGE = TokenUsage(10, 7, 4, 2)
STOP = ChoiceEnd("stop")


def whole(events: list[Event]) -> dict[str, Any]:
    found = json.loads(MessagesEncoder(HEADER).whole([events], USAGE))
    assert isinstance(found, dict)
    return found


def streamed(deltas: list[list[Event]]) -> str:
    encoder = MessagesEncoder(HEADER)
    frames = [encoder.opening(0, USAGE.cached_tokens), *(encoder.frames(0, events) for events in deltas)]
    return b"".join([*frames, encoder.end(USAGE)]).decode()


def test_events_in_the_order_of_the_api() -> None:
    """Guards against streams that accumulators of clients read wrongly, or refuse."""
    deltas: list[list[Event]] = [
        [ReasoningText("Hm")],
        [ReasoningText("m."), Content("I "), Content("look.")],
        [CallBegin(0, "call_1", "f"), CallArguments(0, '{"a"')],
        [CallArguments(0, ": 1}"), CallEnd(0), CallBegin(1, "call_2", "g"), CallArguments(1, "{}"), CallEnd(1)],
        [STOP, USAGE],
    ]
    shown = [
        " ".join(map(str, (event["type"], *(event[name] for name in ("index", "delta") if name in event))))
        for event in events_of(streamed(deltas))
    ]
    assert shown == [
        "message_start",
        "ping",
        "content_block_start 0",
        "content_block_delta 0 {'type': 'thinking_delta', 'thinking': 'Hm'}",
        "content_block_delta 0 {'type': 'thinking_delta', 'thinking': 'm.'}",
        "content_block_delta 0 {'type': 'signature_delta', 'signature': 'unsigned'}",
        "content_block_stop 0",
        "content_block_start 1",
        "content_block_delta 1 {'type': 'text_delta', 'text': 'I '}",
        "content_block_delta 1 {'type': 'text_delta', 'text': 'look.'}",
        "content_block_stop 1",
        "content_block_start 2",
        "content_block_delta 2 {'type': 'input_json_delta', 'partial_json': '{\"a\"'}",
        "content_block_delta 2 {'type': 'input_json_delta', 'partial_json': ': 1}'}",
        "content_block_stop 2",
        "content_block_start 3",
        "content_block_delta 3 {'type': 'input_json_delta', 'partial_json': '{}'}",
        "content_block_stop 3",
        "message_delta {'stop_reason': 'tool_use', 'stop_sequence': None}",
        "message_stop",
    ]
    assert whole([event for delta in deltas for event in delta]) == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "demo",
        "content": [
            {"type": "thinking", "thinking": "Hmm.", "signature": "unsigned"},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "call_1", "name": "f", "input": {"a": 1}},
            {"type": "tool_use", "id": "call_2", "name": "g", "input": {}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 6,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 4,
            "output_tokens": 7,
            "output_tokens_details": {"thinking_tokens": 2},
        },
    }


CALL: list[Event] = [CallBegin(0, "call_1", "f"), CallArguments(0, "{}"), CallEnd(0)]
BROKEN: list[Event] = [CallBegin(0, "call_1", "f"), CallArguments(0, '{"a": "Ro'), CallEnd(0, broken=True)]


@pytest.mark.parametrize(
    ("events", "reason", "sequence"),
    [
        ([Content("a"), STOP], "end_turn", None),
        ([STOP], "end_turn", None),
        ([Content("a"), ChoiceEnd("stop", 7)], "end_turn", None),
        ([Content("a"), ChoiceEnd("stop", "xy")], "stop_sequence", "xy"),
        ([Content("a"), ChoiceEnd("length")], "max_tokens", None),
        ([*CALL, ChoiceEnd("tool_calls")], "tool_use", None),
        ([*CALL, STOP], "tool_use", None),
        ([*CALL, ChoiceEnd("length")], "max_tokens", None),
        ([*BROKEN, ChoiceEnd("length")], "max_tokens", None),
        ([*BROKEN, STOP], "end_turn", None),
        ([*CALL, Content("a"), ChoiceEnd("tool_calls", "xy")], "tool_use", None),
    ],
)
def test_stop_reasons(events: list[Event], reason: str, sequence: str | None) -> None:
    """Guards against agents that run a call that was cut off, or do not run one that is complete."""
    for message in (whole(events), read_stream(streamed([events]))):
        assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)


def test_an_answer_that_the_context_ends_says_so() -> None:
    """Guards against an agent that asks for more tokens where there is no room for them."""
    events: list[Event] = [Content("a"), ChoiceEnd("length")]
    found = json.loads(MessagesEncoder(HEADER, max_tokens=HEADER.sampling.max_tokens + 1).whole([events], USAGE))
    assert found["stop_reason"] == "model_context_window_exceeded"


def test_a_failure_ends_the_stream_in_the_shape_of_the_api() -> None:
    """Guards against an answer that looks complete though it failed."""
    failure = Failure(503, "gone", "server_error", code="service_unavailable")
    (event,) = events_of(MessagesEncoder(HEADER).failure(failure).decode())
    assert event == {"type": "error", "error": {"type": "overloaded_error", "message": "gone"}}


@st.composite
def answers(draw: st.DrawFn) -> list[Event]:
    """Events as the assembler makes them."""
    text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
    events: list[Event] = [ReasoningText(piece) for piece in draw(st.lists(text, max_size=3))]
    calls = 0
    for kind in draw(st.lists(st.sampled_from(("text", "nothing", "call")), max_size=6)):
        if kind == "call":
            arguments = json.dumps(draw(st.dictionaries(text, text, max_size=2)))
            cut = draw(st.integers(0, len(arguments)))
            broken = draw(st.booleans())
            pieces = [arguments[:cut], *([] if broken else [arguments[cut:]])]
            events.append(CallBegin(calls, f"call_{calls}", "f"))
            events += [CallArguments(calls, piece) for piece in pieces if piece]
            events.append(CallEnd(calls, broken))
            calls += 1
        else:
            events.append(Content(draw(text) if kind == "text" else "", token_ids=(1,)))
    return [*events, ChoiceEnd(draw(st.sampled_from(("stop", "length")))), USAGE]


@given(answers(), st.data())
def test_a_stream_builds_the_whole_answer_however_it_is_cut(events: list[Event], data: st.DataObject) -> None:
    """Guards against two answers to one request."""
    deltas: list[list[Event]] = [[]]
    for event in events:
        deltas[-1].append(event)
        if data.draw(st.booleans()):
            deltas.append([])
    assert read_stream(streamed(deltas)) == whole(events)
