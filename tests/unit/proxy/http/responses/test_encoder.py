"""The encoder alone, on any order of events: clients can follow the stream, and it ends with what a whole answer is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.node.messages.control import SamplingSpec
from baton.proxy.formats.events import CallArguments, CallBegin, CallEnd, ReasoningText
from baton.proxy.http.encoder import AnswerHeader
from baton.proxy.http.events import ChoiceEnd, Content, Event, TokenLogprob, TokenUsage
from baton.proxy.http.failures import Failure
from baton.proxy.http.responses.encoder import ResponsesEncoder
from baton.proxy.http.responses.shapes import RepeatedFields
from baton.proxy.http.responses.tools import CalledTool
from baton.tests.unit.proxy.http.responses.event_rules import events_of, final_response

REPEATED = RepeatedFields(
    instructions=None,
    max_output_tokens=None,
    metadata={},
    parallel_tool_calls=True,
    prompt_cache_key=None,
    reasoning={},
    safety_identifier=None,
    text={},
    tool_choice="auto",
    tools=[],
    top_logprobs=0,
    truncation="disabled",
    user=None,
)
CALLED = {
    "f": CalledTool("f", None, is_custom=False),
    "n__f": CalledTool("f", "n", is_custom=False),
    "p": CalledTool("p", None, is_custom=True),
}
USAGE = TokenUsage(5, 3, 1, 2)


def encoder(**header: Any) -> ResponsesEncoder:
    made = AnswerHeader(
        **{
            "id": "resp_1",
            "created": 0,
            "model": "m",
            "logprobs": True,
            "token_ids": False,
            "include_usage": False,
            "prompt_tokens": 5,
            "sampling": SamplingSpec(max_tokens=5),
            **header,
        }
    )
    return ResponsesEncoder(REPEATED, CALLED, made)


def call(index: int, name: str, pieces: list[str], broken: bool) -> list[Event]:
    begin: list[Event] = [CallBegin(index, f"call_{index}", name)]
    return [*begin, *(CallArguments(index, piece) for piece in pieces), CallEnd(index, broken)]


contents = st.builds(Content, st.text(), st.sampled_from([(), (TokenLogprob(b"\xc3", -1.0, (), 0),)]))
calls = st.tuples(st.sampled_from(sorted(CALLED)), st.lists(st.text(min_size=1), max_size=3), st.booleans())


@st.composite
def answers(draw: st.DrawFn) -> list[list[Event]]:
    """The events of an answer, cut into deltas."""
    events: list[Event] = []
    for index, part in enumerate(
        draw(st.lists(st.one_of(contents, st.builds(ReasoningText, st.text(min_size=1)), calls)))
    ):
        events += call(index, *part) if isinstance(part, tuple) else [part]
    events += [ChoiceEnd(draw(st.sampled_from(["stop", "length", "tool_calls"]))), USAGE]
    cuts = sorted(draw(st.lists(st.integers(0, len(events)), max_size=8)))
    return [events[start:end] for start, end in zip([0, *cuts], [*cuts, len(events)], strict=True)]


@given(answers())
def test_streams_can_be_followed_and_end_with_the_whole_answer(deltas: list[list[Event]]) -> None:
    streaming = encoder()
    stream = [streaming.opening(0, 1), *(streaming.frames(0, delta) for delta in deltas if delta), streaming.end(USAGE)]
    response = final_response(events_of(b"".join(stream).decode()))
    whole = encoder().whole([[event for delta in deltas for event in delta]], USAGE)
    assert json.loads(whole) == response
    assert response["output"] or response["status"] == "incomplete"
    calls = [item["status"] for item in response["output"] if "call_id" in item]
    ends = [event for delta in deltas for event in delta if isinstance(event, CallEnd)]
    assert calls == ["incomplete" if end.broken else "completed" for end in ends]
    texts = [event.text for delta in deltas for event in delta if isinstance(event, Content)]
    assert "".join(texts) == "".join(
        item["content"][0]["text"] for item in response["output"] if item["type"] == "message"
    )


@given(answers(), st.integers(0, 8))
def test_a_failure_ends_a_stream_anywhere(deltas: list[list[Event]], num_sent: int) -> None:
    streaming = encoder()
    stream = [streaming.opening(0, 0), *(streaming.frames(0, delta) for delta in deltas[:-1][:num_sent] if delta)]
    stream.append(streaming.failure(Failure(503, "gone", "server_error", code="service_unavailable")))
    response = final_response(events_of(b"".join(stream).decode()))
    assert response["status"] == "failed" and response["error"] == {"code": "server_error", "message": "gone"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"input": "a\\nb"}', "a\nb"),
        ('{"input": 5}', '{"input": 5}'),
        ('{"other": "a"}', '{"other": "a"}'),
        ('{"input": "a', '{"input": "a'),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_the_text_of_a_custom_call(arguments: str, text: str) -> None:
    """Guards a client's tool against text that the model has not written; what is no such call stays as it is."""
    whole = encoder().whole([[*call(0, "p", [arguments], False), ChoiceEnd("tool_calls"), USAGE]], USAGE)
    assert json.loads(whole)["output"][0]["input"] == text


def test_ids_differ_between_answers() -> None:
    events: list[Event] = [Content("a"), ChoiceEnd("stop"), USAGE]
    found = {json.loads(encoder(id=name).whole([events], USAGE))["output"][0]["id"] for name in ("resp_1", "resp_2")}
    assert len(found) == 2


def test_log_probabilities_are_shown_only_where_they_were_asked_for() -> None:
    events: list[Event] = [Content("a", (TokenLogprob(b"a", float("-inf"), (), 0),)), ChoiceEnd("stop"), USAGE]
    for asked in (True, False):
        part = json.loads(encoder(logprobs=asked).whole([events], USAGE))["output"][0]["content"][0]
        assert [entry["logprob"] for entry in part["logprobs"]] == ([-9999.0] if asked else [])
