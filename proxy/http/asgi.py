"""HTTP below the routes, as ASGI: answers that begin late and end with the client.

Source: the ASGI specification, HTTP protocol 2.5; server-sent events of the WHATWG HTML standard.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.types import Receive, Send

from baton.proxy.http.error_bodies import error_body
from baton.proxy.http.failures import Failure

READ_TIMEOUT_S = 60.0
"""A write of events may wait so long for the client to read; that it did is noticed within twice the time."""


class ClientGone(Exception):
    """The client closed its connection before its answer was complete."""


class ClientStalled(ClientGone):
    """The client has not read its answer for too long."""


async def gone(receive: Receive) -> None:
    """Returns when the client has closed its connection; to be called after the whole body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Reply:
    """The answer to one client; knows whether it has begun, since an error is sent differently afterwards."""

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self._send = send
        self._headers = dict(headers)
        self.begun = False
        self.ended = False
        self._num_writes = 0
        self._writing = False

    def add_headers(self, headers: Mapping[str, str]) -> None:
        """Of an answer that has not begun."""
        self._headers |= headers

    async def whole(self, body: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """A complete JSON answer."""
        length = {"content-type": "application/json", "content-length": str(len(body))}
        await self._begin(status, {**length, **(headers or {})})
        self.ended = True
        await self._send({"type": "http.response.body", "body": body})

    async def refuse(self, failure: Failure, path: str) -> None:
        """An error in place of an answer, in the shape of the API that `path` belongs to."""
        await self.whole(error_body(failure, path), status=failure.status, headers=failure.headers)

    async def events(self, frames: bytes) -> None:
        """Frames of server-sent events in one write; the first ones begin the answer."""
        if not self.begun:
            # Proxies in between must pass each event on at once: the last header stops nginx from buffering.
            kind = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
            await self._begin(200, {**kind, "x-accel-buffering": "no"})
        self._writing = True
        await self._send({"type": "http.response.body", "body": frames, "more_body": True})
        self._writing = False
        self._num_writes += 1

    @property
    def waiting_write(self) -> int | None:
        """The number of the write of events that waits for the client to read; None where none does."""
        return self._num_writes if self._writing else None

    async def end(self) -> None:
        """The end of a stream of events."""
        self.ended = True
        await self._send({"type": "http.response.body", "body": b""})

    async def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.begun = True
        raw = [(key.encode(), value.encode()) for key, value in {**self._headers, **headers}.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})


class ReadWatch:
    """Finds a client that does not read its stream; a timer for each write would cost as much as the write."""

    def __init__(self, reply: Reply) -> None:
        self.stalled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when one write of events has waited for READ_TIMEOUT_S."""
        self._reply = reply
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> ReadWatch:
        self._look(None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self, seen: int | None) -> None:
        waiting = self._reply.waiting_write
        if waiting is not None and waiting == seen:
            self.stalled.set_result(None)
        else:
            self._timer = asyncio.get_running_loop().call_later(READ_TIMEOUT_S, self._look, waiting)
