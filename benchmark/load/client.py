"""One request of a load test, sent and metered: a turn in, its outcome out, whether it succeeds or fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from baton.benchmark.load.bodies import BodyStyle, BodyWriter, PastTurn
from baton.benchmark.load.meter import StreamMeter, Usage, message_of
from baton.benchmark.load.plan import Turn
from baton.node.decoding import DECODE_ERRORS
from baton.node.errors import SettingsError
from baton.node.http_client import HttpClient, HttpFailed

MAX_ERROR_BYTES = 1 << 14


@dataclass(frozen=True, slots=True)
class StreamOutcome:
    """What came back for one request. Times are the clock's."""

    error: str
    """Why it failed, beginning with its kind; empty if it did not."""
    cancelled: bool
    first_s: float | None
    last_s: float
    gaps_s: tuple[float, ...]
    num_text_chunks: int
    usage: Usage | None
    text: str
    """Empty unless it was to be kept."""


class OpenAIClient:
    """Sends requests of one style to one server. `close` ends its connections."""

    def __init__(self, http: HttpClient, writer: BodyWriter, style: BodyStyle, timeout_s: float) -> None:
        self._http = http
        self._writer = writer
        self._path = style.path
        self._timeout_s = timeout_s

    def prepare(self, turn: Turn, before: Sequence[PastTurn]) -> bytes:
        """The bytes to send: costly, so done before the request is due."""
        return self._http.request("POST", self._path, self._writer.body(turn, before))

    def user_text(self, turn: Turn) -> str:
        return self._writer.user_text(turn)

    async def send(
        self, request: bytes, cancel_after: int | None, keep_text: bool, clock: Callable[[], float]
    ) -> StreamOutcome:
        return await send(self._http, request, self._timeout_s, clock, cancel_after=cancel_after, keep_text=keep_text)

    def close(self) -> None:
        self._http.close()


async def send(
    http: HttpClient,
    request: bytes,
    timeout_s: float,
    clock: Callable[[], float],
    *,
    cancel_after: int | None = None,
    keep_text: bool = False,
) -> StreamOutcome:
    """Send and meter one request. Never raises for what a server or a network does: that is an outcome."""
    meter = StreamMeter(keep_text)
    body = _MeteredBody(meter, cancel_after)
    try:
        async with asyncio.timeout(timeout_s):
            status = await http.exchange(request, body.sink)
        error = body.error_at(status, clock())
    except HttpFailed as failure:
        error = str(failure)
    except TimeoutError:
        error = f"timeout: not done after {timeout_s:g} s"
    return StreamOutcome(
        error=error,
        cancelled=body.cancelled and not error,
        first_s=meter.first_s,
        last_s=clock() if meter.first_s is None else meter.last_s,
        gaps_s=tuple(meter.gaps_s),
        num_text_chunks=meter.num_text_chunks,
        usage=meter.usage,
        text=meter.text,
    )


class _MeteredBody:
    """Feeds one answer's body to the meter, and keeps its beginning, which may be an error's JSON."""

    def __init__(self, meter: StreamMeter, cancel_after: int | None) -> None:
        self.cancelled = False
        self._meter = meter
        self._cancel_after = cancel_after
        self._beginning = b""

    def sink(self, data: bytes, now_s: float) -> bool:
        if self._meter.first_s is None and len(self._beginning) < MAX_ERROR_BYTES:
            self._beginning += data
        self._meter.feed(data, now_s)
        self.cancelled = self._cancel_after is not None and self._meter.num_chunks >= self._cancel_after
        return not (self.cancelled or self._meter.error)

    def error_at(self, status: int, now_s: float) -> str:
        if status != 200:
            return f"HTTP {status}: {message_of(self._beginning)}"
        if not self.cancelled:
            self._meter.end(now_s)
        return self._meter.error


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


async def find_model(http: HttpClient, wanted: str, timeout_s: float) -> str:
    """The name to send: `wanted` if the server has it, or its first model where none is named.

    Raises SettingsError, in words for the user, where there is no server, or no such model.
    """
    origin = http.origin
    try:
        async with asyncio.timeout(timeout_s):
            status, body = await http.get("/v1/models")
    except HttpFailed as failure:
        raise SettingsError(f"no server: {failure}") from None
    except TimeoutError:
        raise SettingsError(f"no answer from {origin}/v1/models within {timeout_s:g} s") from None
    if status in (401, 403):
        raise SettingsError(f"{origin} refuses the API key (HTTP {status}): --api-key, or OPENAI_API_KEY")
    try:
        names = [model.id for model in msgspec.json.decode(body, type=_Models).data] if status == 200 else []
    except DECODE_ERRORS:
        names = []
    if wanted and (wanted in names or not names):
        return wanted  # a server without a list is asked anyway
    if wanted:
        raise SettingsError(f"{origin} has no model {wanted!r}: it has {', '.join(names[:8])}")
    if not names:
        raise SettingsError(f"{origin}/v1/models names no model (HTTP {status}): say which with --model")
    return names[0]
