"""The bodies of requests, bounded in size, in time, and all together in memory.

A body counts from its first byte until its holder lets go of it, which is when its prompts are token ids. Knows ASGI,
and no API. A rate below which a body is too slow is kept by `connections`, before this sees its bytes.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from baton.node.errors import BadRequest, Overloaded
from baton.node.telemetry import excerpt
from baton.proxy.http.asgi import ClientGone

BODY_TIMEOUT_S = 60.0
"""Longest time a client may take to send a body."""
GIVES_WAY_AFTER_S = 2.0
"""A body that arrives for longer than this gives way to another one where memory is short."""
_DRAINED_BYTES = 64 << 20
"""Of a body that is too large, so much is read and thrown away: most clients read the answer only after sending."""


@dataclass(slots=True, eq=False)
class HeldBody:
    """A request's body in memory, as far as it has arrived."""

    memory: BodyMemory
    since_s: float
    content: bytes = b""
    """All of it, once it has arrived."""
    num_bytes: int = 0
    timer: asyncio.Timeout | None = None
    gave_way: bool = False

    def grow(self, num_bytes: int) -> None:
        """Raises Overloaded (503) where neither there is room nor another body gives way."""
        self.memory.used_bytes += num_bytes
        self.num_bytes += num_bytes
        while self.memory.used_bytes > self.memory.limit_bytes:
            if not self.memory.make_room():
                raise self.no_room()

    def clear(self) -> None:
        """Let go of it."""
        self.content = b""
        self.memory.used_bytes -= self.num_bytes
        self.num_bytes = 0

    def give_way(self) -> None:
        assert self.timer is not None
        self.gave_way = True
        self.clear()
        if not self.timer.expired():
            self.timer.reschedule(-1.0)  # its reader sees a timeout

    def no_room(self) -> Overloaded:
        self.memory.on_refused()
        return Overloaded("too many large requests are arriving", retry_after_s=1.0, status=503)


@dataclass(slots=True)
class BodyMemory:
    """How many bytes all bodies of a proxy may have together."""

    limit_bytes: int
    on_refused: Callable[[], None]
    gives_way_after_s: float = GIVES_WAY_AFTER_S
    used_bytes: int = 0
    _arriving: dict[HeldBody, None] = field(default_factory=dict)
    """The oldest first."""

    @contextmanager
    def hold(self) -> Iterator[HeldBody]:
        """A body that is let go of at the end."""
        body = HeldBody(self, asyncio.get_running_loop().time())
        try:
            yield body
        finally:
            body.clear()

    @contextmanager
    def arriving(self, body: HeldBody) -> Iterator[None]:
        self._arriving[body] = None
        try:
            yield
        finally:
            self._arriving.pop(body, None)

    def make_room(self) -> bool:
        """Let the body that has been arriving for longest give way, if it does so for long enough."""
        oldest = next(iter(self._arriving), None)
        if oldest is None or asyncio.get_running_loop().time() - oldest.since_s < self.gives_way_after_s:
            return False
        del self._arriving[oldest]
        oldest.give_way()
        return True


async def read_body(scope: Scope, receive: Receive, max_bytes: int, held: HeldBody) -> None:
    """The request's whole body, into `held`; raises BadRequest (413, 415, 408), Overloaded (503) or ClientGone."""
    headers = Headers(scope=scope)
    declared = headers.get("content-length", "0")
    too_large = declared.isdecimal() and int(declared) > max_bytes
    parts: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S) as held.timer:
            with held.memory.arriving(held):
                more = True
                while more and num_bytes <= _DRAINED_BYTES:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    part = message.get("body", b"")
                    more = message.get("more_body", False)
                    num_bytes += len(part)
                    too_large = too_large or num_bytes > max_bytes
                    if too_large:
                        parts.clear()
                        held.clear()
                    else:
                        parts.append(part)
                        held.grow(len(part))
    except TimeoutError:
        if held.gave_way:
            raise held.no_room() from None
        raise BadRequest(f"the body did not arrive within {BODY_TIMEOUT_S:g} s", status=408) from None
    if held.gave_way:
        raise held.no_room()
    if too_large:
        message_text = f"the body is larger than {max_bytes} bytes"
        raise BadRequest(message_text, status=413, code="request_too_large")
    if (encoding := headers.get("content-encoding", "")) not in ("", "identity"):
        message_text = f"bodies with Content-Encoding {excerpt(encoding, 40)} are not read here: send it as it is"
        raise BadRequest(message_text, status=415, code="unsupported_encoding")
    held.content = b"".join(parts).removeprefix(codecs.BOM_UTF8)
