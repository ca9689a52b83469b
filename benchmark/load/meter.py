"""The meter of one streamed answer: body bytes with the times of their reads in, the moments that latencies are made of
out.

Definitions are those of `vllm bench serve`: every chunk that carries a choice counts, the first ends TTFT, each later
one ends a gap (an ITL) whatever number of tokens it carries, and the last one is the end of the request; chunks without
a choice (usage) count for nothing. One difference: a chat's opening chunk, which has a role and no content, is no
token, as servers may send it before they computed anything. Knows no socket and no clock.
"""

from __future__ import annotations

import msgspec

from baton.node.decoding import DECODE_ERRORS

MAX_EVENT_BYTES = 4 << 20
MAX_MESSAGE_CHARS = 200


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """The server's count of tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: Usage | None = None
    error: object = None


class EventStream:
    """Server-sent events out of bytes that may be cut anywhere: the data of each, comments left out."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The events that are complete now. Raises ValueError where one is larger than MAX_EVENT_BYTES."""
        data = self._rest + data
        if b"\r" in data:
            tail = b"\r" if data.endswith(b"\r") else b""  # its line feed may be the next byte to come
            data = data.removesuffix(tail).replace(b"\r\n", b"\n") + tail
        *events, self._rest = data.split(b"\n\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise ValueError(f"an event of more than {MAX_EVENT_BYTES} bytes")
        return [found for event in events if (found := _data_of(event))]

    def flush(self) -> list[bytes]:
        """An event that the end of the stream cut off from its empty line."""
        event, self._rest = self._rest.rstrip(b"\r\n"), b""
        return [found] if (found := _data_of(event)) else []


def _data_of(event: bytes) -> bytes:
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)


class StreamMeter:
    """Meters one answer: first token, gaps, text chunks, usage, error. Times are those given to `feed`."""

    def __init__(self, keep_text: bool = False) -> None:
        self.first_s: float | None = None
        """When the first token was read; None before."""
        self.last_s = 0.0
        self.gaps_s: list[float] = []
        self.num_text_chunks = 0
        """Chunks with text: the count of tokens where the server counts none."""
        self.usage: Usage | None = None
        self.error = ""
        self._events = EventStream()
        self._decode = msgspec.json.Decoder(_Chunk).decode
        self._texts: list[str] | None = [] if keep_text else None

    @property
    def num_chunks(self) -> int:
        return 0 if self.first_s is None else 1 + len(self.gaps_s)

    @property
    def text(self) -> str:
        """The generated text, if it is kept."""
        return "".join(self._texts or ())

    def feed(self, data: bytes, now_s: float) -> None:
        """Bytes of the body that were read at `now_s`. Sets `error` where they are no OpenAI stream."""
        try:
            for event in self._events.feed(data):
                self._event(event, now_s)
        except ValueError as error:
            self.error = f"not an OpenAI stream: {error}"

    def end(self, now_s: float) -> None:
        """The body is complete."""
        for event in self._events.flush():
            self._event(event, now_s)
        if self.first_s is None and not self.error:
            self.error = "the stream ended without a token"

    def _event(self, event: bytes, now_s: float) -> None:
        if event == b"[DONE]":
            return
        try:
            chunk = self._decode(event)
        except DECODE_ERRORS as error:
            self.error = f"not an OpenAI stream: {error}"
            return
        if chunk.error is not None:
            self.error = f"error in the stream: {message_of(event)}"
        if chunk.usage is not None:
            self.usage = chunk.usage
        if chunk.choices:
            self._choice(chunk.choices[0], now_s)

    def _choice(self, choice: _Choice, now_s: float) -> None:
        text = choice.text
        if choice.delta is not None:
            text = choice.delta.content or choice.delta.reasoning_content
            if choice.delta.role and not text and not choice.finish_reason and self.first_s is None:
                return
        if self.first_s is None:
            self.first_s = now_s
        else:
            self.gaps_s.append(now_s - self.last_s)
        self.last_s = now_s
        if text:
            self.num_text_chunks += 1
            if self._texts is not None:
                self._texts.append(text)


class _ErrorBody(msgspec.Struct):
    message: str = ""
    detail: str = ""


class _Error(msgspec.Struct):
    error: _ErrorBody | str | None = None
    message: str = ""


def message_of(body: bytes) -> str:
    """The message of an error's JSON, in one short line; its bytes where it is no such JSON."""
    try:
        found = msgspec.json.decode(body, type=_Error)
        inner = found.error if isinstance(found.error, str) else found.error.message if found.error else ""
        message = inner or found.message
    except DECODE_ERRORS:
        message = ""
    return " ".join((message or body.decode(errors="replace")).split())[:MAX_MESSAGE_CHARS]
