"""When an answer is written, on a reply whose client is slow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import MutableMapping, Sequence
from typing import Any

import msgspec

from baton.node.messages.control import SamplingSpec
from baton.proxy.formats.events import ReasoningText
from baton.proxy.http.asgi import Reply
from baton.proxy.http.encoder import AnswerHeader, named_frame
from baton.proxy.http.encoders import CompletionEncoder
from baton.proxy.http.events import ChoiceEnd, Content, Event, TokenUsage, join_events, total_usage
from baton.proxy.http.failures import Failure
from baton.proxy.http.responder import Responder
from baton.proxy.metrics.timeline import Timeline

HEADER = AnswerHeader(
    id="cmpl-1",
    created=0,
    model="m",
    logprobs=False,
    token_ids=False,
    include_usage=False,
    prompt_tokens=5,
    sampling=SamplingSpec(max_tokens=1),
)


class SlowClient:
    """Takes the head of an answer only after other tasks have had several turns, and all else after one."""

    def __init__(self) -> None:
        self.got: list[MutableMapping[str, Any]] = []

    async def send(self, message: MutableMapping[str, Any]) -> None:
        for _ in range(9 if message["type"] == "http.response.start" else 1):
            await asyncio.sleep(0)
        self.got.append(message)


async def test_the_head_goes_before_every_chunk() -> None:
    """Guards choices that begin at once: a body before the head is a protocol error, which ends the connection."""
    client = SlowClient()
    timelines = [Timeline(time.monotonic) for _ in range(3)]
    reply = Reply(client.send, {})
    responder = Responder(reply, CompletionEncoder(HEADER), timelines, stream=True)

    async def choice(index: int) -> None:
        await responder.take(index, [[Content("a")]])
        await responder.take(index, [[Content("b"), ChoiceEnd("stop"), TokenUsage(1, 2, 0)]])

    await asyncio.gather(*map(choice, range(3)))
    await responder.end(1)
    kinds = [message["type"] for message in client.got]
    assert kinds[0] == "http.response.start" and kinds.count("http.response.start") == 1
    chunks = [message["body"] for message in client.got[1:] if message["body"]]
    assert len(chunks) == 7 and chunks[-1] == b"data: [DONE]\n\n"
    for index in range(3):
        mine = [chunk for chunk in chunks if b'"index":%d' % index in chunk]
        assert [b'"text":"a"' in chunk for chunk in mine] == [True, False], "the order within a choice"


class NumberedFrames:
    """An API with named, numbered events, an opening, and several events a delta."""

    def __init__(self) -> None:
        self.number = 0

    def whole(self, choices: Sequence[Sequence[Event]], usage: TokenUsage) -> bytes:
        return b"{}"

    def opening(self, index: int, cached_tokens: int) -> bytes:
        return self._frame("start", cached_tokens)

    def frames(self, index: int, events: Sequence[Event]) -> bytes:
        return b"".join([self._frame("text", event.text) for event in events if isinstance(event, Content)])

    def end(self, usage: TokenUsage) -> bytes:
        return self._frame("end", usage.completion_tokens)

    def failure(self, failure: Failure) -> bytes:
        return self._frame("failed", failure.status)

    def _frame(self, name: str, value: object) -> bytes:
        self.number += 1
        return named_frame(name, msgspec.json.encode([self.number, value]))


async def test_an_encoder_owns_the_frames_of_its_stream() -> None:
    """Guards APIs other than OpenAI's first ones: frames are asked for in the order in which they are sent, those of
    one delta go out together, and neither an end nor a failure has a frame beside the encoder's."""
    for fails in (False, True):
        client = SlowClient()
        reply = Reply(client.send, {})
        responder = Responder(reply, NumberedFrames(), [Timeline(time.monotonic)], stream=True)
        await responder.take(0, [[ReasoningText("hidden")], []], 3)
        await responder.take(0, [[Content("a"), ReasoningText("hidden"), Content("b")], [Content("c")]])
        if fails:
            await responder.fail(Failure(503, "gone", "server_error"))
        else:
            await responder.take(0, [[ChoiceEnd("stop"), TokenUsage(5, 7, 3)]])
            await responder.end(1)
        assert [message["body"] for message in client.got[1:]] == [
            b"event: start\ndata: [1,3]\n\n",
            b'event: text\ndata: [2,"a"]\n\nevent: text\ndata: [3,"b"]\n\nevent: text\ndata: [4,"c"]\n\n',
            b"event: failed\ndata: [5,503]\n\n" if fails else b"event: end\ndata: [5,7]\n\n",
            b"",
        ]


async def test_tokens_that_came_together_are_events_of_their_own_in_one_write() -> None:
    """Guards clients that count events, and the proxy's time: a write costs as much as all else of a token."""
    client = SlowClient()
    timelines = [Timeline(time.monotonic)]
    reply = Reply(client.send, {})
    responder = Responder(reply, CompletionEncoder(HEADER), timelines, stream=True)
    await responder.take(0, [[Content("a")], [], [Content("b")], [ChoiceEnd("stop"), TokenUsage(1, 3, 0)]])
    _, written = client.got
    chunks = written["body"].split(b"\n\n")
    assert [chunk[:6] for chunk in chunks] == [b"data: ", b"data: ", b"data: ", b""]
    assert [msgspec.json.decode(chunk[6:])["choices"][0]["text"] for chunk in chunks[:3]] == ["a", "b", ""]


def test_joined_events_are_those_of_one_delta_or_of_all() -> None:
    """Guards the whole answer against text, reason or usage that the stream had and it has not."""
    parts = [[Content("a")], [], [Content("", ()), Content("b")], [ChoiceEnd("stop", "END"), TokenUsage(5, 3, 1)]]
    whole = join_events(2, [event for events in parts for event in events])
    assert (whole.index, whole.text, whole.finish, whole.stop_reason) == (2, "ab", "stop", "END")
    assert "".join(join_events(2, events).text for events in parts) == whole.text


def test_a_prompt_counts_once() -> None:
    """Guards usage with n > 1: the prompt's tokens are not those of each of its choices."""
    usages = [TokenUsage(5, 1, 4), TokenUsage(5, 2, 4), TokenUsage(7, 3, 0), TokenUsage(7, 4, 0)]
    assert total_usage(usages, 2) == TokenUsage(12, 10, 4)
