"""Writes answers of the Messages API: a message of content blocks, or the events that build it block by block.

Neighbouring events of one kind are one block; streamed and whole answers are cut into blocks by the same rule. Knows no
HTTP and no tokenizer. Source: the Anthropic API reference (Messages, streaming).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from baton.proxy.formats.events import CallArguments, CallBegin, CallEnd, ReasoningText
from baton.proxy.http.anthropic.errors import error_json
from baton.proxy.http.encoder import AnswerHeader, named_frame
from baton.proxy.http.events import ChoiceEnd, Content, Event, TokenUsage
from baton.proxy.http.failures import Failure

SIGNATURE = "unsigned"
"""Clients refuse a block of reasoning without a signature, and send it back; it is not read here."""
_encode = msgspec.json.Encoder().encode
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_TEXT, _THINKING = "text", "thinking"
_MARK = "\x00piece\x00"
"""Stands for a piece in a frame; nothing else of one holds it."""


@dataclass(slots=True)
class _AnswerBlock:
    """One block of the answer."""

    kind: str
    call: CallBegin | None = None
    pieces: list[str] = field(default_factory=list)
    """Of a whole answer: its text, reasoning or arguments."""

    def begun(self) -> dict[str, Any]:
        """As it is before its first piece."""
        if self.call is not None:
            return {"type": "tool_use", "id": self.call.id, "name": self.call.name, "input": {}}
        if self.kind == _THINKING:
            return {"type": "thinking", "thinking": "", "signature": ""}
        return {"type": "text", "text": ""}

    def whole(self) -> dict[str, Any]:
        joined = "".join(self.pieces)
        if self.call is not None:
            return self.begun() | {"input": _input(joined)}
        if self.kind == _THINKING:
            return self.begun() | {"thinking": joined, "signature": SIGNATURE}
        return self.begun() | {"text": joined}

    def delta_name(self) -> tuple[str, str]:
        """Type and field of what adds a piece to it."""
        if self.call is not None:
            return "input_json_delta", "partial_json"
        return f"{self.kind}_delta", self.kind


class MessagesEncoder:
    """Writes one answer, which has one choice."""

    def __init__(self, header: AnswerHeader, max_tokens: int | None = None) -> None:
        """`max_tokens` as the client has it; those of the header fit into the context."""
        self._header = header
        self._is_cut = max_tokens is not None and header.sampling.max_tokens < max_tokens
        self._block: _AnswerBlock | None = None
        """The one that is open."""
        self._index = -1
        """Its place in the message, or that of the last one."""
        self._around: tuple[bytes, bytes] = b"", b""
        """Of the open block: what is before and behind a piece in the frame that adds it."""
        self._complete_calls = 0
        self._end = ChoiceEnd("")

    def whole(self, choices: Sequence[Sequence[Event]], usage: TokenUsage) -> bytes:
        blocks: list[_AnswerBlock] = []
        for event in choices[0]:
            block, piece = self._read(event)
            if block is not None and block is not (blocks[-1] if blocks else None):
                blocks.append(block)
            if block is not None:
                block.pieces.append(piece)
        content = [block.whole() for block in blocks]
        return _encode(self._message(usage) | {"content": content} | self._stop())

    def opening(self, index: int, cached_tokens: int) -> bytes:
        usage = TokenUsage(self._header.prompt_tokens, 0, cached_tokens)
        return _event("message_start", message=self._message(usage)) + _event("ping")

    def frames(self, index: int, events: Sequence[Event]) -> bytes:
        frames: list[bytes] = []
        for event in events:
            before = self._block
            block, piece = self._read(event)
            if block is not before:
                frames.append(self._switch(before, block))
            if piece:
                frames.append(self._around[0] + _encode(piece) + self._around[1])
        return b"".join(frames)

    def end(self, usage: TokenUsage) -> bytes:
        closing = self._switch(self._block, None)
        return closing + _event("message_delta", delta=self._stop(), usage=_usage(usage)) + _event("message_stop")

    def failure(self, failure: Failure) -> bytes:
        return named_frame("error", error_json(failure))

    def _read(self, event: Event) -> tuple[_AnswerBlock | None, str]:
        """The block that is open now, a new object where another one was, and what the event adds to it."""
        piece, kind = "", ""
        if isinstance(event, Content):
            piece, kind = event.text, _TEXT
        elif isinstance(event, ReasoningText):
            piece, kind = event.text, _THINKING
        elif isinstance(event, CallBegin):
            self._block = _AnswerBlock("tool_use", event)
        elif isinstance(event, CallArguments):
            piece = event.text
        elif isinstance(event, CallEnd):
            self._block = None
            self._complete_calls += not event.broken
        elif isinstance(event, ChoiceEnd):
            self._end = event
        if piece and kind and (self._block is None or self._block.kind != kind):
            self._block = _AnswerBlock(kind)
        return self._block, piece

    def _switch(self, before: _AnswerBlock | None, block: _AnswerBlock | None) -> bytes:
        """The frames that close the one, and open the other."""
        frames = b""
        if before is not None:
            if before.kind == _THINKING:
                frames += self._delta({"type": "signature_delta", "signature": SIGNATURE})
            frames += _event("content_block_stop", index=self._index)
        if block is not None:
            self._index += 1
            frames += _event("content_block_start", index=self._index, content_block=block.begun())
            kind, name = block.delta_name()
            head, _, tail = self._delta({"type": kind, name: _MARK}).partition(_encode(_MARK))
            self._around = head, tail
        return frames

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)

    def _message(self, usage: TokenUsage) -> dict[str, Any]:
        """As it is before its first block."""
        return {
            "id": self._header.id,
            "type": "message",
            "role": "assistant",
            "model": self._header.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(usage),
        }

    def _stop(self) -> dict[str, Any]:
        end = self._end
        if end.reason == "length":
            reason = "model_context_window_exceeded" if self._is_cut else "max_tokens"
            return {"stop_reason": reason, "stop_sequence": None}
        if self._complete_calls:
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if isinstance(end.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": end.stop_reason}
        return {"stop_reason": "end_turn", "stop_sequence": None}


def _event(name: str, **fields: object) -> bytes:
    return named_frame(name, _encode({"type": name, **fields}))


def _usage(usage: TokenUsage) -> dict[str, Any]:
    """Tokens out of a cache do not count as input; all of them together are the prompt."""
    made: dict[str, Any] = {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
    return made | (
        {"output_tokens_details": {"thinking_tokens": usage.reasoning_tokens}} if usage.reasoning_tokens else {}
    )


def _input(arguments: str) -> msgspec.Raw:
    """The arguments as the model wrote them. Those of a call that it left unfinished are no JSON: nothing, then."""
    try:
        _decode_object(arguments)
    except (msgspec.MsgspecError, RecursionError):
        return msgspec.Raw(b"{}")
    return msgspec.Raw(arguments.encode())
