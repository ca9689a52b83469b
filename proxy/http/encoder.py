"""The seam between one stream of events and the APIs: what an encoder of an API gets, and what it has to write.

An encoder owns the frames of its stream: their names, numbers and order, and what ends them. It may keep what it sent.
Knows no shape of any API, no HTTP and no tokenizer. Source of frames: server-sent events of the WHATWG HTML standard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.node.messages.control import SamplingSpec
from baton.proxy.formats.events import ReasoningText
from baton.proxy.http.events import Event, TokenUsage
from baton.proxy.http.failures import Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerHeader:
    """What all parts of one answer repeat, and what its client asked to see in them."""

    id: str
    created: int
    model: str
    logprobs: bool
    token_ids: bool
    include_usage: bool
    """Of a stream: every chunk has the field, the last one a value."""
    continuous_usage: bool = False
    """Of such a stream: every chunk with new tokens has a value, that of its choice so far."""
    prompt_tokens: int
    """Of the first prompt."""
    sampling: SamplingSpec
    """Of the first choice: the client's values, and the model's where it gave none."""
    reasoning_field: str = "reasoning_content"
    """The name of reasoning in chats."""


class Encoder(Protocol):
    """Writes the answer to one request in the shapes of one API: as one body, or as the frames of a stream.

    Frames are bytes that go to the client as they are, mostly several events; empty where there is nothing to show.
    """

    def whole(self, choices: Sequence[Sequence[Event]], usage: TokenUsage) -> bytes:
        """The body, of all events of each choice."""
        ...

    def opening(self, index: int, cached_tokens: int) -> bytes:
        """The frames before a choice's first events; `cached_tokens` of its prompt came out of a cache."""
        ...

    def frames(self, index: int, events: Sequence[Event]) -> bytes:
        """Those of what one delta adds to a choice."""
        ...

    def end(self, usage: TokenUsage) -> bytes:
        """The frames after the last choice is complete, and of the stream."""
        ...

    def failure(self, failure: Failure) -> bytes:
        """The last frames of a stream that had begun."""
        ...


EncoderMaker = Callable[[AnswerHeader], Encoder]


class WithoutReasoning:
    """An encoder that leaves reasoning out."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.opening = encoder.opening
        self.end = encoder.end
        self.failure = encoder.failure

    def whole(self, choices: Sequence[Sequence[Event]], usage: TokenUsage) -> bytes:
        return self._encoder.whole([_without_reasoning(events) for events in choices], usage)

    def frames(self, index: int, events: Sequence[Event]) -> bytes:
        shown = _without_reasoning(events)
        return self._encoder.frames(index, shown) if shown else b""


def _without_reasoning(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if type(event) is not ReasoningText]


def frame(data: bytes) -> bytes:
    """One event without a name."""
    return b"data: " + data + b"\n\n"


def named_frame(name: str, data: bytes) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"
