"""Writes answers of /v1/responses: one state machine makes the items, streamed or not.

A stream has numbered, named events; clients check their order (see docs/apis.md), and that ids are the same in all of
them. Its end repeats the whole answer, of the same objects. Source: the OpenAI API reference (Responses).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from baton.node.telemetry import excerpt
from baton.proxy.formats.events import CallArguments, CallBegin, CallEnd, ReasoningText
from baton.proxy.http.encoder import AnswerHeader, named_frame
from baton.proxy.http.events import ChoiceEnd, Content, Event, TokenUsage
from baton.proxy.http.failures import MAX_MESSAGE_CHARS, Failure
from baton.proxy.http.logprobs import ChatLogprob, chat_logprobs
from baton.proxy.http.responses.open_items import (
    IN_PROGRESS,
    OpenCustomCall,
    OpenFunctionCall,
    OpenItem,
    OpenMessage,
    OpenReasoning,
)
from baton.proxy.http.responses.shapes import (
    IncompleteDetails,
    OutputItem,
    RepeatedFields,
    ResponseError,
    ResponseState,
    response_usage,
)
from baton.proxy.http.responses.tools import CalledTool

COMPLETED, INCOMPLETE, FAILED = "completed", "incomplete", "failed"
_ERROR_CODES = {"rate_limit_exceeded": "rate_limit_exceeded"}
"""The API has few; all others are errors of the server."""
_encode = msgspec.json.Encoder().encode


class ResponsesEncoder:
    """The answer to one request, which has one choice."""

    def __init__(self, repeated: RepeatedFields, called: Mapping[str, CalledTool], header: AnswerHeader) -> None:
        """`called`: how calls of each function are written."""
        self._header = header
        self._repeated = b"," + _encode(repeated)[1:]
        """Encoded once, though a stream has it three times."""
        self._called = called
        self._id_base = hashlib.sha256(header.id.encode(errors="surrogatepass")).hexdigest()[:32]
        self._output: list[OutputItem] = []
        """Items that are complete."""
        self._open: OpenItem | None = None
        self._logprobs: list[ChatLogprob] = []
        """Of tokens that have completed no text yet."""
        self._finish = ""
        self._number = 0
        self._frames: list[bytes] = []
        """Not sent yet."""
        self._before_delta = b""

    def whole(self, choices: Sequence[Sequence[Event]], usage: TokenUsage) -> bytes:
        self.frames(0, choices[0])
        return self._response(self._ended(usage))

    def opening(self, index: int, cached_tokens: int) -> bytes:
        begun = msgspec.Raw(self._response(self._state(IN_PROGRESS)))
        self._send("response.created", response=begun)
        self._send("response.in_progress", response=begun)
        return self._taken_frames()

    def frames(self, index: int, events: Sequence[Event]) -> bytes:
        for event in events:
            if type(event) is Content:
                self._take_content(event)
            elif type(event) is ReasoningText:
                self._add(self._opened(OpenReasoning, "rs"), event.text)
            elif type(event) is CallArguments:
                assert self._open is not None
                self._add(self._open, event.text)
            elif type(event) is CallBegin:
                self._begin_call(event)
            elif type(event) is CallEnd:
                self._close(INCOMPLETE if event.broken else COMPLETED)
            elif type(event) is ChoiceEnd:
                self._finish = event.reason
        return self._taken_frames()

    def end(self, usage: TokenUsage) -> bytes:
        ended = self._ended(usage)
        self._send(f"response.{ended.status}", response=msgspec.Raw(self._response(ended)))
        return self._taken_frames()

    def failure(self, failure: Failure) -> bytes:
        """What was written stays in the answer; an item that was begun has no end of its own."""
        code = _ERROR_CODES.get(failure.code or "", "server_error")
        error = ResponseError(code, excerpt(failure.message, MAX_MESSAGE_CHARS))
        begun = [] if self._open is None else [self._open.item(INCOMPLETE)]
        failed = self._state(FAILED, output=[*self._output, *begun], error=error)
        self._send("response.failed", response=msgspec.Raw(self._response(failed)))
        return self._taken_frames()

    def _take_content(self, event: Content) -> None:
        if event.logprobs and self._header.logprobs:
            self._logprobs += chat_logprobs(event.logprobs)
        if event.text:
            logprobs, self._logprobs = self._logprobs, []
            self._add(self._opened(OpenMessage, "msg"), event.text, logprobs)

    def _begin_call(self, event: CallBegin) -> None:
        called = self._called[event.name]
        kind, prefix = (OpenCustomCall, "ctc") if called.is_custom else (OpenFunctionCall, "fc")
        self._close(COMPLETED)
        self._begin(kind(self._next_id(prefix), event.id, called))

    def _opened(self, kind: type[OpenMessage] | type[OpenReasoning], prefix: str) -> OpenItem:
        """The item of this kind that is being written; begins one behind any other."""
        if not isinstance(self._open, kind):
            self._close(COMPLETED)
            self._begin(kind(self._next_id(prefix)))
        assert self._open is not None
        return self._open

    def _begin(self, opened: OpenItem) -> None:
        self._open = opened
        item = opened.item(IN_PROGRESS)
        place = {"item_id": item.id, "output_index": len(self._output)}
        self._send("response.output_item.added", output_index=len(self._output), item=item)
        for kind, fields in opened.first():
            self._send(kind, **place, **fields)
        delta = _encode({"type": opened.delta_type, **place})[:-1]
        self._before_delta = b"event: %b\ndata: %b," % (opened.delta_type.encode(), delta)

    def _add(self, opened: OpenItem, text: str, logprobs: Sequence[ChatLogprob] = ()) -> None:
        fields = opened.add(text, logprobs)
        if fields is not None:
            self._frames.append(b'%b%b,"sequence_number":%d}\n\n' % (self._before_delta, fields, self._number))
            self._number += 1

    def _close(self, status: str) -> None:
        if self._open is None:
            return
        opened, self._open = self._open, None
        item = opened.item(status)
        for kind, fields in opened.last():
            self._send(kind, item_id=item.id, output_index=len(self._output), **fields)
        self._send("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)

    def _ended(self, usage: TokenUsage) -> ResponseState:
        """The whole answer. One that stopped without a call has a message, which clients take for its end."""
        cut = self._finish == "length"
        if not cut and not isinstance(self._open, OpenMessage) and not any(map(_ends_answer, self._output)):
            self._opened(OpenMessage, "msg")
        self._close(INCOMPLETE if cut else COMPLETED)
        return self._state(
            INCOMPLETE if cut else COMPLETED,
            output=self._output,
            incomplete_details=IncompleteDetails() if cut else None,
            usage=response_usage(usage),
        )

    def _state(self, status: str, output: Sequence[OutputItem] = (), **ended: Any) -> ResponseState:
        header, sampling = self._header, self._header.sampling
        return ResponseState(
            id=header.id,
            created_at=header.created,
            status=status,
            model=header.model,
            output=output,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            **ended,
        )

    def _response(self, state: ResponseState) -> bytes:
        return _encode(state)[:-1] + self._repeated

    def _next_id(self, prefix: str) -> str:
        return f"{prefix}_{self._id_base}{len(self._output):04x}"

    def _send(self, kind: str, **fields: object) -> None:
        data = _encode({"type": kind, **fields, "sequence_number": self._number})
        self._number += 1
        self._frames.append(named_frame(kind, data))

    def _taken_frames(self) -> bytes:
        frames = b"".join(self._frames)
        self._frames.clear()
        return frames


def _ends_answer(item: OutputItem) -> bool:
    return item.type in ("message", "function_call", "custom_tool_call")
