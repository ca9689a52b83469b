"""Items of an answer that are being written: the events between an item's first and its last, and the item so far.

Knows no order of items and no numbers of events. Source: the OpenAI API reference (Responses, streaming events).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Protocol

import msgspec

from baton.proxy.http.logprobs import ChatLogprob
from baton.proxy.http.responses.shapes import (
    CustomCallOutput,
    FunctionCallOutput,
    MessageOutput,
    OutputItem,
    OutputTextPart,
    ReasoningOutput,
    ReasoningTextPart,
)
from baton.proxy.http.responses.tools import FREE_TEXT, CalledTool

IN_PROGRESS = "in_progress"
StreamEvent = tuple[str, dict[str, object]]
"""Type and fields, without those that all events of an item have."""
_encode = msgspec.json.Encoder().encode


class OpenItem(Protocol):
    delta_type: str

    def first(self) -> list[StreamEvent]:
        """The events behind `output_item.added`."""
        ...

    def add(self, text: str, logprobs: Sequence[ChatLogprob] = ()) -> bytes | None:
        """The fields of the delta that shows more of the item, as JSON without its braces; None where there is none."""
        ...

    def last(self) -> list[StreamEvent]:
        """The events before `output_item.done`."""
        ...

    def item(self, status: str) -> OutputItem:
        """What is in it so far."""
        ...


class OpenMessage:
    delta_type = "response.output_text.delta"

    def __init__(self, item_id: str) -> None:
        self._id = item_id
        self._texts: list[str] = []
        self._logprobs: list[ChatLogprob] = []

    def first(self) -> list[StreamEvent]:
        return [("response.content_part.added", {"content_index": 0, "part": OutputTextPart()})]

    def add(self, text: str, logprobs: Sequence[ChatLogprob] = ()) -> bytes | None:
        self._texts.append(text)
        if not logprobs:
            return b'"content_index":0,"logprobs":[],"delta":' + _encode(text)
        self._logprobs += logprobs
        return b'"content_index":0,"logprobs":' + _encode(logprobs) + b',"delta":' + _encode(text)

    def last(self) -> list[StreamEvent]:
        part = self._part()
        done = {"content_index": 0, "text": part.text, "logprobs": part.logprobs}
        return [("response.output_text.done", done), ("response.content_part.done", {"content_index": 0, "part": part})]

    def item(self, status: str) -> MessageOutput:
        return MessageOutput(id=self._id, status=status, content=() if status == IN_PROGRESS else (self._part(),))

    def _part(self) -> OutputTextPart:
        return OutputTextPart(text="".join(self._texts), logprobs=self._logprobs)


class OpenReasoning:
    delta_type = "response.reasoning_text.delta"

    def __init__(self, item_id: str) -> None:
        self._id = item_id
        self._texts: list[str] = []

    def first(self) -> list[StreamEvent]:
        return [("response.content_part.added", {"content_index": 0, "part": ReasoningTextPart()})]

    def add(self, text: str, logprobs: Sequence[ChatLogprob] = ()) -> bytes | None:
        self._texts.append(text)
        return b'"content_index":0,"delta":' + _encode(text)

    def last(self) -> list[StreamEvent]:
        part = self._part()
        return [
            ("response.reasoning_text.done", {"content_index": 0, "text": part.text}),
            ("response.content_part.done", {"content_index": 0, "part": part}),
        ]

    def item(self, status: str) -> ReasoningOutput:
        return ReasoningOutput(id=self._id, status=status, content=() if status == IN_PROGRESS else (self._part(),))

    def _part(self) -> ReasoningTextPart:
        return ReasoningTextPart(text="".join(self._texts))


class OpenFunctionCall:
    delta_type = "response.function_call_arguments.delta"

    def __init__(self, item_id: str, call_id: str, called: CalledTool) -> None:
        self._empty = FunctionCallOutput(
            id=item_id,
            status=IN_PROGRESS,
            call_id=call_id,
            name=called.name,
            namespace=called.namespace or msgspec.UNSET,
        )
        self._texts: list[str] = []

    def first(self) -> list[StreamEvent]:
        return []

    def add(self, text: str, logprobs: Sequence[ChatLogprob] = ()) -> bytes | None:
        self._texts.append(text)
        return b'"delta":' + _encode(text)

    def last(self) -> list[StreamEvent]:
        """A call that was cut before its arguments has a delta too."""
        arguments = "".join(self._texts)
        events: list[StreamEvent] = [] if arguments else [(self.delta_type, {"delta": ""})]
        done: dict[str, object] = {"name": self._empty.name, "arguments": arguments}
        return [*events, ("response.function_call_arguments.done", done)]

    def item(self, status: str) -> FunctionCallOutput:
        return msgspec.structs.replace(self._empty, status=status, arguments="".join(self._texts))


class OpenCustomCall:
    """The model writes a JSON object with one text, which can be read when it is complete: it is one delta."""

    delta_type = "response.custom_tool_call_input.delta"

    def __init__(self, item_id: str, call_id: str, called: CalledTool) -> None:
        self._empty = CustomCallOutput(
            id=item_id,
            status=IN_PROGRESS,
            call_id=call_id,
            name=called.name,
            namespace=called.namespace or msgspec.UNSET,
        )
        self._texts: list[str] = []

    def first(self) -> list[StreamEvent]:
        return []

    def add(self, text: str, logprobs: Sequence[ChatLogprob] = ()) -> bytes | None:
        self._texts.append(text)
        return None

    def last(self) -> list[StreamEvent]:
        text = _free_text("".join(self._texts))
        return [(self.delta_type, {"delta": text}), ("response.custom_tool_call_input.done", {"input": text})]

    def item(self, status: str) -> CustomCallOutput:
        return msgspec.structs.replace(self._empty, status=status, input=_free_text("".join(self._texts)))


def _free_text(arguments: str) -> str:
    """What the client's tool gets: the one text, or what the model has written in place of it."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    text = value.get(FREE_TEXT) if isinstance(value, dict) else None
    return text if isinstance(text, str) else arguments
