"""When an answer is written: an event stream as the choices grow, or one body when all of them are complete.

What is written is the encoder's business, how it travels that of the reply.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from baton.proxy.http.asgi import Reply
from baton.proxy.http.encoder import Encoder
from baton.proxy.http.events import Event, TokenUsage, total_usage
from baton.proxy.http.failures import Failure
from baton.proxy.metrics.timeline import Timeline

FAILURE_TIMEOUT_S = 2.0
"""Longest wait for a client that may have stopped reading to take a failure."""


class Responder:
    """Takes the events of all choices of one request; choices may run in tasks of their own."""

    def __init__(self, reply: Reply, encoder: Encoder, timelines: Sequence[Timeline], *, stream: bool) -> None:
        self._reply = reply
        self._encoder = encoder
        self._stream = stream
        self._events: list[list[Event]] = [[] for _ in timelines]
        """Not written yet."""
        self._usages = [TokenUsage(0, 0, 0)] * len(timelines)
        self._unopened = set(range(len(timelines)))
        self._untimed = dict(enumerate(timelines))
        """Timelines that wait for their first or second answer to be written; soon empty, as each token looks here."""
        self._begun = False
        self._beginning = asyncio.Lock()  # where several choices begin at once, the answer's head goes first

    async def take(self, index: int, grown: Sequence[list[Event]], cached_tokens: int = 0) -> None:
        """What each of some deltas has added to a choice; a stream shows each by itself, all in one write.
        The answer begins with the first token, not before."""
        last = grown[-1]
        if last and isinstance(last[-1], TokenUsage):
            self._usages[index] = last[-1]
        if not self._stream:
            for events in grown:
                self._events[index] += events
        elif not await self._write(index, grown, cached_tokens):
            return
        if self._untimed:
            self._mark_shown(index)

    async def end(self, choices_per_prompt: int) -> None:
        """All choices are complete."""
        usage = total_usage(self._usages, choices_per_prompt)
        if self._stream:
            await self._reply.events(self._encoder.end(usage))
            await self._reply.end()
        else:
            await self._reply.whole(self._encoder.whole(self._events, usage))

    async def fail(self, failure: Failure) -> None:
        """End a stream that has begun by an error."""
        async with asyncio.timeout(FAILURE_TIMEOUT_S):
            await self._reply.events(self._encoder.failure(failure))
            await self._reply.end()

    async def _write(self, index: int, grown: Sequence[list[Event]], cached_tokens: int) -> bool:
        """False where there is nothing to show."""
        opening = b""
        if index in self._unopened:
            self._unopened.discard(index)
            opening = self._encoder.opening(index, cached_tokens)
        frames = b"".join([opening, *[self._encoder.frames(index, events) for events in grown if events]])
        if not frames:
            return False
        if self._begun:
            await self._reply.events(frames)
        else:
            async with self._beginning:
                await self._reply.events(frames)
                self._begun = True
        return True

    def _mark_shown(self, index: int) -> None:
        """This choice's tokens were given to the client, or kept for an answer in one piece."""
        timeline = self._untimed.get(index)
        if timeline is not None and not timeline.shown():
            del self._untimed[index]
