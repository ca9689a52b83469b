"""OpenAI's answers: plain values in, the JSON of a response or of one streamed chunk out.

Owns the shapes of `text_completion`, `chat.completion` and their chunks. Encoded by msgspec, as a chunk is written for
each token. Knows no HTTP and no tokenizer. Source: the OpenAI API reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token with its probability, as bytes: it may be a part of a character."""

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]
    """The likeliest tokens at this place."""
    offset_chars: int
    """Characters of the answer before this token."""


@dataclass(frozen=True, slots=True)
class TokenUsage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class ChoiceText:
    """One choice: all of it, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] | None
    """None where the request asked for none."""
    finish: str
    """Empty while it is not finished."""


class Answers(Protocol):
    """Writes the answers of one request."""

    def whole(self, choices: Sequence[ChoiceText], usage: TokenUsage) -> bytes: ...

    def opening(self, index: int) -> bytes | None:
        """The chunk that opens a choice before any of its text, or None if the API has none."""
        ...

    def chunk(self, choice: ChoiceText) -> bytes: ...

    def usage(self, usage: TokenUsage) -> bytes:
        """The last chunk of a stream that asked for its usage."""
        ...


# ---- shapes, named as in the API ----------------------------------------------------------------------------------


class _PromptDetails(msgspec.Struct):
    cached_tokens: int


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: _PromptDetails


class _CompletionLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class _CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: _CompletionLogprobs | None
    finish_reason: str | None


class _TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class _ChatLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[_TopLogprob]


class _ChatLogprobs(msgspec.Struct):
    content: list[_ChatLogprob]
    refusal: None = None


class _Delta(msgspec.Struct, omit_defaults=True):
    role: str = ""
    content: str | None = None
    refusal: None = None


class _ChunkChoice(msgspec.Struct):
    index: int
    delta: _Delta
    logprobs: _ChatLogprobs | None
    finish_reason: str | None


class _ChatMessage(msgspec.Struct):
    role: str
    content: str
    refusal: None = None


class _ChatChoice(msgspec.Struct):
    index: int
    message: _ChatMessage
    logprobs: _ChatLogprobs | None
    finish_reason: str | None


class _Response(msgspec.Struct):
    id: str
    object: str
    created: int
    model: str
    choices: Sequence[_CompletionChoice | _ChunkChoice | _ChatChoice]
    usage: _Usage | msgspec.UnsetType | None = msgspec.UNSET
    """In a chunk: absent unless asked for, then null in all chunks but the last."""
    system_fingerprint: None = None


# ---- the two endpoints --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CompletionAnswers:
    """Answers of /v1/completions."""

    id: str
    created: int
    model: str
    include_usage: bool

    def whole(self, choices: Sequence[ChoiceText], usage: TokenUsage) -> bytes:
        return self._write([_completion_choice(choice) for choice in choices], _usage(usage))

    def opening(self, index: int) -> bytes | None:
        return None

    def chunk(self, choice: ChoiceText) -> bytes:
        return self._write([_completion_choice(choice)], None if self.include_usage else msgspec.UNSET)

    def usage(self, usage: TokenUsage) -> bytes:
        return self._write([], _usage(usage))

    def _write(self, choices: list[_CompletionChoice], usage: _Usage | msgspec.UnsetType | None) -> bytes:
        return _encode(_Response(self.id, "text_completion", self.created, self.model, choices, usage))


@dataclass(frozen=True, slots=True)
class ChatAnswers:
    """Answers of /v1/chat/completions."""

    id: str
    created: int
    model: str
    include_usage: bool

    def whole(self, choices: Sequence[ChoiceText], usage: TokenUsage) -> bytes:
        made = [
            _ChatChoice(
                choice.index,
                _ChatMessage("assistant", choice.text),
                _chat_logprobs(choice.logprobs),
                choice.finish or None,
            )
            for choice in choices
        ]
        return _encode(_Response(self.id, "chat.completion", self.created, self.model, made, _usage(usage)))

    def opening(self, index: int) -> bytes | None:
        return self._chunk([_ChunkChoice(index, _Delta("assistant", ""), None, None)])

    def chunk(self, choice: ChoiceText) -> bytes:
        delta = _Delta(content=choice.text or None)
        return self._chunk([_ChunkChoice(choice.index, delta, _chat_logprobs(choice.logprobs), choice.finish or None)])

    def usage(self, usage: TokenUsage) -> bytes:
        return _encode(_Response(self.id, "chat.completion.chunk", self.created, self.model, [], _usage(usage)))

    def _chunk(self, choices: list[_ChunkChoice]) -> bytes:
        usage = None if self.include_usage else msgspec.UNSET
        return _encode(_Response(self.id, "chat.completion.chunk", self.created, self.model, choices, usage))


def _usage(usage: TokenUsage) -> _Usage:
    total = usage.prompt_tokens + usage.completion_tokens
    details = _PromptDetails(usage.cached_tokens)
    return _Usage(usage.prompt_tokens, usage.completion_tokens, total, details)


def _completion_choice(choice: ChoiceText) -> _CompletionChoice:
    return _CompletionChoice(choice.index, choice.text, _completion_logprobs(choice.logprobs), choice.finish or None)


def _completion_logprobs(tokens: tuple[TokenLogprob, ...] | None) -> _CompletionLogprobs | None:
    """The legacy shape; the drawn token is always among the likeliest, so there may be one more than asked for."""
    if tokens is None:
        return None
    return _CompletionLogprobs(
        tokens=[_shown(token.token) for token in tokens],
        token_logprobs=[_finite(token.logprob) for token in tokens],
        top_logprobs=[
            {_shown(piece): _finite(value) for piece, value in (*token.top, (token.token, token.logprob))}
            for token in tokens
        ],
        text_offset=[token.offset_chars for token in tokens],
    )


def _chat_logprobs(tokens: tuple[TokenLogprob, ...] | None) -> _ChatLogprobs | None:
    if tokens is None:
        return None
    return _ChatLogprobs(
        [
            _ChatLogprob(
                _shown(token.token),
                _finite(token.logprob),
                list(token.token),
                [_TopLogprob(_shown(piece), _finite(value), list(piece)) for piece, value in token.top],
            )
            for token in tokens
        ]
    )


def _shown(token: bytes) -> str:
    """The token as text; a part of a character in the form of OpenAI's API, so that no two tokens look alike."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI and vLLM use -9999 for a token that cannot be drawn."""
    return max(logprob, -9999.0)
