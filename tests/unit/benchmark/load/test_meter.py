"""The meter against vLLM's definitions: scripted bytes with known times, so that every figure is exact."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.benchmark.load.meter import EventStream, StreamMeter, message_of


def chunk(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return b"data: " + json.dumps({"id": "cmpl-1", "object": "text_completion", "choices": [choice]}).encode() + b"\n\n"


def delta(finish: str | None = None, **fields: str) -> bytes:
    choice = {"index": 0, "delta": fields, "finish_reason": finish}
    return b"data: " + json.dumps({"object": "chat.completion.chunk", "choices": [choice]}).encode() + b"\n\n"


USAGE = (
    b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12, '
    b'"prompt_tokens_details": {"cached_tokens": 4}}}\n\n'
)
DONE = b"data: [DONE]\n\n"


def test_known_gaps_give_known_figures() -> None:
    """TTFT at the first chunk, an ITL a later chunk whatever it carries, the end at the last, usage for the count."""
    meter = StreamMeter(keep_text=True)
    script = [
        (10.5, chunk("a")),
        (10.75, chunk("")),
        (11.5, chunk("b c d")),
        (12.0, chunk("", "length")),
        (14.0, USAGE),
    ]
    for at_s, data in [*script, (15.0, DONE)]:
        meter.feed(data, at_s)
    meter.end(16.0)
    assert (meter.first_s, meter.last_s, meter.gaps_s) == (10.5, 12.0, [0.25, 0.75, 0.5])
    assert (meter.num_chunks, meter.num_text_chunks, meter.text, meter.error) == (4, 2, "ab c d", "")
    assert meter.usage is not None and meter.usage.completion_tokens == 5 and meter.usage.prompt_tokens == 7
    assert meter.usage.prompt_tokens_details is not None and meter.usage.prompt_tokens_details.cached_tokens == 4


def test_chunks_of_one_read_arrive_together() -> None:
    """The client cannot know more than when bytes were read: a burst is a gap and then zeros, as with vLLM's client."""
    meter = StreamMeter()
    meter.feed(chunk("a"), 1.0)
    meter.feed(chunk("b") + chunk("c") + chunk("d"), 2.0)
    assert meter.gaps_s == [1.0, 0.0, 0.0]


def test_the_opening_chunk_of_a_chat_is_no_token() -> None:
    """Servers that send the role before they computed anything would have the best TTFT of all."""
    meter = StreamMeter(keep_text=True)
    meter.feed(delta(role="assistant", content=""), 1.0)
    assert meter.first_s is None
    meter.feed(delta(content="Hi"), 3.0)
    meter.feed(delta(reasoning_content="so"), 4.0)
    meter.feed(delta(finish="stop"), 4.5)
    assert (meter.first_s, meter.gaps_s, meter.text) == (3.0, [1.0, 0.5], "Hiso")


def test_a_first_chunk_with_a_role_and_content_is_a_token() -> None:
    meter = StreamMeter()
    meter.feed(delta(role="assistant", content="Hi"), 1.0)
    assert meter.first_s == 1.0


EVENTS = [chunk("a"), b": ping\n\n", chunk('"\n\\'), USAGE, chunk("z"), DONE]


@given(st.lists(st.integers(0, 1000), max_size=20), st.sampled_from([b"\n", b"\r\n"]))
def test_bytes_may_be_cut_anywhere(cuts: list[int], line_end: bytes) -> None:
    """A network cuts where it likes; an event lost or doubled at a cut is a wrong count."""
    whole = b"".join(EVENTS).replace(b"\n", line_end)
    places = sorted({0, len(whole), *(cut % len(whole) for cut in cuts)})
    meter = StreamMeter(keep_text=True)
    for start, end in pairwise(places):
        meter.feed(whole[start:end], 1.0)
    meter.end(2.0)
    assert (meter.text, meter.num_chunks, meter.error) == ('a"\n\\z', 3, "")
    assert meter.usage is not None


def test_events_are_read_as_the_standard_says() -> None:
    """Fields without a space, of several lines, or none of ours; and an end without its empty line."""
    stream = EventStream()
    events = stream.feed(b"data:x\n\nevent: e\ndata: a\ndata: b\n\n: comment\n\nid: 3\n\ndata: last")
    assert events == [b"x", b"a\nb"]
    assert stream.flush() == [b"last"] and stream.flush() == []


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"data: <html>\n\n", "not an OpenAI stream"),
        (b'data: {"choices": 5}\n\n', "not an OpenAI stream"),
        (b'data: {"error": {"message": "out of memory", "code": 500}}\n\n', "error in the stream: out of memory"),
        (DONE, "the stream ended without a token"),
        (USAGE + DONE, "the stream ended without a token"),
        (b"", "the stream ended without a token"),
    ],
)
def test_what_is_no_answer_is_an_error(data: bytes, said: str) -> None:
    """Counted as completed, a broken server is the fastest one."""
    meter = StreamMeter()
    meter.feed(data, 1.0)
    meter.end(2.0)
    assert said in meter.error


def test_an_endless_event_ends() -> None:
    """A body that is no stream would fill the memory of the client, and its time with searching it."""
    meter = StreamMeter()
    for _ in range(6):
        meter.feed(b"x" * (1 << 20), 1.0)
    assert "more than" in meter.error


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "too  long\\n", "type": "x"}}', "too long"),
        (b'{"error": "overloaded"}', "overloaded"),
        (b'{"object": "error", "message": "no such model"}', "no such model"),
        (b"<h1>Bad Gateway</h1>", "<h1>Bad Gateway</h1>"),
        (b"\xff" * 500, "�" * 200),
    ],
)
def test_errors_are_told_in_one_short_line(body: bytes, said: str) -> None:
    """Reasons are counted by their words: a page of HTML for each request is useless."""
    assert message_of(body) == said
