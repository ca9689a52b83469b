"""Encoders of OpenAI's older APIs: events in, the JSON of a response or the frames of streamed chunks out.

Owns the shapes of `text_completion`, `chat.completion` and their chunks. Encoded by msgspec, as a chunk is written for
each token. Knows no HTTP and no tokenizer. Source: the OpenAI API reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeGuard

import msgspec

from baton.proxy.formats.events import CallArguments, CallEnd, ReasoningText
from baton.proxy.http.encoder import AnswerHeader, frame
from baton.proxy.http.events import (
    CallText,
    ChoiceText,
    Content,
    Event,
    TokenUsage,
    chunks_of,
    join_events,
)
from baton.proxy.http.failures import Failure
from baton.proxy.http.logprobs import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptRanks,
    chat_logprobs,
    completion_logprobs,
    prompt_ranks,
)

COMPLETION = "text_completion"
CHAT_CHUNK = "chat.completion.chunk"
_encode = msgspec.json.Encoder().encode
_MARK = "\x00text\x00"
"""Stands for the text of a chunk; no other field of one holds it."""


# ---- shapes, named as in the API ----------------------------------------------------------------------------------


_Ids = Sequence[int] | msgspec.UnsetType
"""vLLM's fields; absent unless asked for, of a prompt also after the first chunk."""
_StopReason = int | str | msgspec.UnsetType
"""vLLM's field; absent where there is none."""


class _PromptDetails(msgspec.Struct):
    cached_tokens: int


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: int
    accepted_prediction_tokens: int | msgspec.UnsetType = msgspec.UNSET
    """Of requests with a prediction, like the next."""
    rejected_prediction_tokens: int | msgspec.UnsetType = msgspec.UNSET


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: _PromptDetails
    completion_tokens_details: _CompletionDetails | msgspec.UnsetType
    """Of chats."""


class _CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: _StopReason
    token_ids: _Ids
    prompt_token_ids: _Ids
    prompt_logprobs: PromptRanks


class _Function(msgspec.Struct, omit_defaults=True):
    name: str = ""
    arguments: str | None = None


class _Call(msgspec.Struct):
    id: str
    type: str
    function: _Function


class _CallDelta(msgspec.Struct, omit_defaults=True):
    function: _Function
    index: int | None = None
    id: str = ""
    type: str = ""


class _Delta(msgspec.Struct, omit_defaults=True):
    role: str = ""
    content: str | None = None
    refusal: None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_CallDelta] | None = None


class _ChunkChoice(msgspec.Struct):
    index: int
    delta: _Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: _StopReason = msgspec.UNSET
    token_ids: _Ids = msgspec.UNSET


class _ChatMessage(msgspec.Struct):
    role: str
    content: str | None
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[_Call] | msgspec.UnsetType = msgspec.UNSET


class _ChatChoice(msgspec.Struct):
    index: int
    message: _ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: _StopReason = msgspec.UNSET
    token_ids: _Ids = msgspec.UNSET
    prompt_logprobs: PromptRanks = msgspec.UNSET


_Choices = Sequence[_CompletionChoice | _ChunkChoice | _ChatChoice]


class _Response(msgspec.Struct):
    id: str
    object: str
    created: int
    model: str
    choices: _Choices
    usage: _Usage | msgspec.UnsetType | None = msgspec.UNSET
    """In a chunk: absent unless asked for, then null in all chunks but the last."""
    prompt_token_ids: _Ids = msgspec.UNSET
    """Of a chat, which has one prompt; a completion has them in its choices."""


class PlainChunks:
    """Frames of events that add nothing but text: the JSON around it is that of every other one."""

    def __init__(self, any_frames: Callable[[int, Sequence[Event]], bytes]) -> None:
        """`any_frames` writes any events of a choice, and those that have more than text, or none."""
        self._any_frames = any_frames
        self._parts: dict[tuple[int, type, int], tuple[bytes, bytes]] = {}
        """What is before and behind the text, by choice, kind of event and call."""

    def frames(self, index: int, events: Sequence[Event]) -> bytes:
        event = events[0]
        if len(events) > 1 or not _is_plain(event):
            return self._any_frames(index, events)
        key = (index, type(event), event.index if type(event) is CallArguments else 0)
        parts = self._parts.get(key)
        if parts is None:
            before, _, behind = self._any_frames(index, [_marked(event)]).partition(_encode(_MARK))
            parts = self._parts[key] = before, behind
        return parts[0] + _encode(event.text) + parts[1]


def _is_plain(event: Event) -> TypeGuard[Content | ReasoningText | CallArguments]:
    if type(event) is Content:
        return not (event.logprobs or event.token_ids or not event.text)
    return (type(event) is ReasoningText or type(event) is CallArguments) and event.text != ""


def _marked(event: Content | ReasoningText | CallArguments) -> Event:
    if isinstance(event, CallArguments):
        return CallArguments(event.index, _MARK)
    return ReasoningText(_MARK) if isinstance(event, ReasoningText) else Content(_MARK)


# ---- the two endpoints --------------------------------------------------------------------------------------------


class CompletionEncoder:
    """Writes answers of /v1/completions."""

    def __init__(self, header: AnswerHeader) -> None:
        self.header = header
        self.frames = PlainChunks(self.any_frames).frames

    def whole(self, choices: Sequence[Sequence[Event]], usage: TokenUsage) -> bytes:
        joined = [join_events(index, events) for index, events in enumerate(choices)]
        return _answer(self.header, COMPLETION, [self._choice(choice) for choice in joined], usage)

    def opening(self, index: int, cached_tokens: int) -> bytes:
        return b""

    def any_frames(self, index: int, events: Sequence[Event]) -> bytes:
        choice = join_events(index, events)
        return frame(_chunk(self.header, COMPLETION, self._choice(choice), so_far=choice.usage))

    def end(self, usage: TokenUsage) -> bytes:
        return _end(self.header, COMPLETION, usage)

    def failure(self, failure: Failure) -> bytes:
        return _failure(failure)

    def _choice(self, choice: ChoiceText) -> _CompletionChoice:
        logprobs = completion_logprobs(choice.logprobs) if self.header.logprobs else None
        return _CompletionChoice(
            choice.index,
            choice.text,
            logprobs,
            choice.finish or None,
            _stop_reason(choice),
            _ids_of(self.header, choice),
            choice.prompt_ids or msgspec.UNSET,
            prompt_ranks(choice.prompt_ranks),
        )


class ChatEncoder:
    """Writes answers of /v1/chat/completions."""

    def __init__(self, header: AnswerHeader) -> None:
        self.header = header
        self.frames = PlainChunks(self.any_frames).frames

    def whole(self, choices: Sequence[Sequence[Event]], usage: TokenUsage) -> bytes:
        joined = [join_events(index, events) for index, events in enumerate(choices)]
        made = [
            _ChatChoice(
                choice.index,
                self._message(choice),
                self._logprobs(choice),
                choice.finish or None,
                _stop_reason(choice),
                _ids_of(self.header, choice),
                prompt_ranks(choice.prompt_ranks),
            )
            for choice in joined
        ]
        return _answer(self.header, "chat.completion", made, usage, joined[0].prompt_ids or msgspec.UNSET)

    def opening(self, index: int, cached_tokens: int) -> bytes:
        return frame(_chunk(self.header, CHAT_CHUNK, _ChunkChoice(index, _Delta("assistant", ""), None, None)))

    def any_frames(self, index: int, events: Sequence[Event]) -> bytes:
        parts = (events,) if len(events) == 1 else chunks_of(events)
        shown = (part for part in parts if len(part) > 1 or type(part[0]) is not CallEnd)
        return b"".join([frame(self._chunk(join_events(index, part))) for part in shown])

    def end(self, usage: TokenUsage) -> bytes:
        return _end(self.header, CHAT_CHUNK, usage)

    def failure(self, failure: Failure) -> bytes:
        return _failure(failure)

    def _chunk(self, choice: ChoiceText) -> bytes:
        delta = _Delta(
            content=choice.text or None,
            reasoning_content=self._reasoning("reasoning_content", choice) or None,
            reasoning=self._reasoning("reasoning", choice) or None,
            tool_calls=[_call_delta(call) for call in choice.calls] or None,
        )
        made = _ChunkChoice(
            choice.index,
            delta,
            self._logprobs(choice),
            choice.finish or None,
            _stop_reason(choice),
            _ids_of(self.header, choice),
        )
        return _chunk(self.header, CHAT_CHUNK, made, choice.prompt_ids or msgspec.UNSET, choice.usage)

    def _message(self, choice: ChoiceText) -> _ChatMessage:
        calls = [_Call(call.id, "function", _Function(call.name, call.arguments)) for call in choice.calls]
        return _ChatMessage(
            "assistant",
            choice.text or (None if choice.calls or choice.reasoning else ""),
            reasoning_content=self._reasoning("reasoning_content", choice) or msgspec.UNSET,
            reasoning=self._reasoning("reasoning", choice) or msgspec.UNSET,
            tool_calls=calls or msgspec.UNSET,
        )

    def _reasoning(self, field: str, choice: ChoiceText) -> str:
        return choice.reasoning if field == self.header.reasoning_field else ""

    def _logprobs(self, choice: ChoiceText) -> ChatLogprobs | None:
        return ChatLogprobs(chat_logprobs(choice.logprobs)) if self.header.logprobs else None


def _answer(
    header: AnswerHeader, kind: str, choices: _Choices, usage: TokenUsage, prompt_ids: _Ids = msgspec.UNSET
) -> bytes:
    """A whole answer, or the chunk of a stream that has the usage."""
    shape = _Response(
        header.id, kind, header.created, header.model, choices, _usage(kind, usage), prompt_token_ids=prompt_ids
    )
    return _encode(shape)


def _chunk(
    header: AnswerHeader,
    kind: str,
    choice: _CompletionChoice | _ChunkChoice,
    prompt_ids: _Ids = msgspec.UNSET,
    so_far: TokenUsage | None = None,
) -> bytes:
    usage: _Usage | msgspec.UnsetType | None = None if header.include_usage else msgspec.UNSET
    if header.continuous_usage and header.include_usage and so_far is not None:
        usage = _usage(kind, so_far)
    shape = _Response(header.id, kind, header.created, header.model, (choice,), usage, prompt_token_ids=prompt_ids)
    return _encode(shape)


def _end(header: AnswerHeader, kind: str, usage: TokenUsage) -> bytes:
    last = frame(_answer(header, kind, [], usage)) if header.include_usage else b""
    return last + frame(b"[DONE]")


def _failure(failure: Failure) -> bytes:
    """Clients raise on the key "error". A stream that failed has no [DONE], so that a client that ignores the error
    cannot take it for complete."""
    return frame(failure.body())


def _ids_of(header: AnswerHeader, choice: ChoiceText) -> _Ids:
    return choice.token_ids if header.token_ids else msgspec.UNSET


def _call_delta(call: CallText) -> _CallDelta:
    """The id, type and name of a call are sent once, at its beginning."""
    function = _Function(call.name, call.arguments)
    return _CallDelta(function, call.index, call.id, "function" if call.id else "")


def _stop_reason(choice: ChoiceText) -> _StopReason:
    return msgspec.UNSET if choice.stop_reason is None else choice.stop_reason


def _usage(kind: str, usage: TokenUsage) -> _Usage:
    total = usage.prompt_tokens + usage.completion_tokens
    details = _PromptDetails(usage.cached_tokens)
    return _Usage(usage.prompt_tokens, usage.completion_tokens, total, details, _completion_details(kind, usage))


def _completion_details(kind: str, usage: TokenUsage) -> _CompletionDetails | msgspec.UnsetType:
    if kind == COMPLETION:
        return msgspec.UNSET
    accepted, rejected = usage.accepted_prediction_tokens, usage.rejected_prediction_tokens
    if accepted is None or rejected is None:
        return _CompletionDetails(usage.reasoning_tokens)
    return _CompletionDetails(usage.reasoning_tokens, accepted, rejected)
