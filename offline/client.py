"""A client of one server's HTTP API: retries while it is overloaded or restarts, and a bound on what is in flight.

It runs on an event loop in a thread of its own, so that it works where the caller's thread has a running loop already,
as in a notebook. Knows no fields of a body.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from baton.node.http_client import HttpClient, HttpFailed, Origin

T = TypeVar("T")

MAX_ANSWER_BYTES = 256 << 20
MAX_ATTEMPTS = 6
FIRST_RETRY_S = 0.5
MAX_RETRY_S = 8.0
"""Delays double: six attempts take about 15 s, in which a dead worker or proxy has been restarted."""
OVERLOADED, UNAVAILABLE = 429, 503
"""Statuses that are retried. No token has been handed out, so a retry is the same request."""
PROBE_TIMEOUT_S = 30.0
CANCEL_TIMEOUT_S = 5.0


class NoAnswer(Exception):
    """A request got no answer, after all attempts; the message says why, in one line."""


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    status: int
    body: bytes


class ApiClient:
    """Connections to one server. Used in one event loop, and closed in it."""

    def __init__(self, url: str, api_key: str, timeout_s: float, ended: Callable[[], str]) -> None:
        """Raises SettingsError where `url` is none.

        `timeout_s` bounds one attempt; `ended` says why the server will never answer again, empty while it may.
        """
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = HttpClient(Origin.parse(url), headers, time.monotonic)
        self._timeout_s = timeout_s
        self._ended = ended
        self._unreachable = False
        """The last request got no answer: while that is so, one attempt must do."""

    async def get(self, path: str) -> HttpAnswer:
        """At most two attempts, as a kept connection may be closed when it is used; raises NoAnswer."""
        request = self._http.request("GET", path, b"")
        try:
            return await self._once(request, PROBE_TIMEOUT_S)
        except HttpFailed:
            pass
        try:
            return await self._once(request, PROBE_TIMEOUT_S)
        except HttpFailed as error:
            raise NoAnswer(str(error)) from None

    async def post(self, path: str, body: bytes) -> HttpAnswer:
        """Repeated while the server cannot be reached or has no workers, a few times, and while it is overloaded, for
        the time limit of a request; raises NoAnswer.
        """
        request = self._http.request("POST", path, body)
        delay_s = FIRST_RETRY_S
        left = 1 if self._unreachable else MAX_ATTEMPTS
        overload_ends_s = time.monotonic() + self._timeout_s
        while True:
            left -= 1
            try:
                answer = await self._once(request, self._timeout_s)
            except HttpFailed as error:
                self._unreachable = not left
                if reason := self._ended() or ("" if left else str(error)):
                    raise NoAnswer(reason) from None
            else:
                self._unreachable = False
                if answer.status == OVERLOADED and time.monotonic() < overload_ends_s:
                    left += 1
                elif answer.status not in (OVERLOADED, UNAVAILABLE) or not left:
                    return answer
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, MAX_RETRY_S)

    async def reachable(self) -> bool:
        """Whether the server answers anything at all."""
        try:
            await self.get("/live")
        except NoAnswer:
            return False
        return True

    def close(self) -> None:
        self._http.close()

    async def _once(self, request: bytes, timeout_s: float) -> HttpAnswer:
        """Raises HttpFailed, and NoAnswer where a further attempt would wait as long."""
        parts: list[bytes] = []
        room = MAX_ANSWER_BYTES

        def keep(data: bytes, _: float) -> bool:
            nonlocal room
            parts.append(data)
            room -= len(data)
            return room > 0

        try:
            async with asyncio.timeout(timeout_s):
                status = await self._http.exchange(request, keep)
        except TimeoutError:
            raise NoAnswer(f"no answer within {timeout_s:g} s") from None
        if room <= 0:
            raise NoAnswer(f"the answer is larger than {MAX_ANSWER_BYTES} bytes")
        return HttpAnswer(status, b"".join(parts))


async def run_bounded(items: Iterable[T], limit: int, work: Callable[[T], Awaitable[None]]) -> None:
    """`work` for each item, at most `limit` at once, begun in order; items are taken as there is room for them.

    The first exception of `work` cancels the rest and is raised.
    """
    queue = iter(items)

    async def take() -> None:
        for item in queue:
            await work(item)

    tasks = [asyncio.create_task(take()) for _ in range(limit)]  # one that finds nothing left ends at once
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class LoopThread:
    """An event loop in a daemon thread, for callers that have none or must not block theirs."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`. Ctrl-C in the caller's thread cancels it, and waits for its end."""
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("the connection to the server was closed")
        ended = threading.Event()

        async def run() -> T:
            try:
                return await work
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(run(), self._loop)
        try:
            return future.result()
        except BaseException:
            if not future.done():
                future.cancel()
                ended.wait(CANCEL_TIMEOUT_S)
            raise

    def close(self, last: Callable[[], None]) -> None:
        """Call `last` on the loop and end it; what runs on it is dropped."""
        self._loop.call_soon_threadsafe(last)
        self._loop.call_soon_threadsafe(self._loop.stop)
        if threading.current_thread() is not self._thread:  # garbage is collected in any thread
            self._thread.join(CANCEL_TIMEOUT_S)
            if not self._thread.is_alive():
                self._loop.close()
