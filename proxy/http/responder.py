"""When an answer is written: an event stream as the choices grow, or one body when all of them are complete.

What is written is the encoder's business, how it travels that of the reply.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from baton.proxy.http.asgi import Reply
from baton.proxy.http.encoders import Encoder
from baton.proxy.http.events import Event, TokenUsage, join_events, total_usage
from baton.proxy.metrics.timeline import Timeline


class Responder:
    """Takes the events of all choices of one request; choices may run in tasks of their own."""

    def __init__(
        self, reply: Reply, encoder: Encoder, timelines: Sequence[Timeline], *, stream: bool, include_usage: bool
    ) -> None:
        self._reply = reply
        self._encoder = encoder
        self._stream = stream
        self._include_usage = include_usage
        self._events: list[list[Event]] = [[] for _ in timelines]
        """Not written yet."""
        self._usages = [TokenUsage(0, 0, 0)] * len(timelines)
        self._unopened = set(range(len(timelines)))
        self._untimed = dict(enumerate(timelines))
        """Timelines that wait for their first or second answer to be written; soon empty, as each token looks here."""
        self._begun = False
        self._beginning = asyncio.Lock()  # where several choices begin at once, the answer's head goes first

    async def take(self, index: int, grown: Sequence[list[Event]]) -> None:
        """What each of some deltas has added to a choice; a stream shows each in a chunk of its own, all in one write.
        The answer begins with the first token, not before."""
        last = grown[-1]
        if last and isinstance(last[-1], TokenUsage):
            self._usages[index] = last[-1]
        if not self._stream:
            for events in grown:
                self._events[index] += events
        elif not await self._write(index, grown):
            return
        if self._untimed:
            self._mark_shown(index)

    async def end(self, choices_per_prompt: int) -> None:
        """All choices are complete."""
        usage = total_usage(self._usages, choices_per_prompt)
        if self._stream:
            last = [self._encoder.usage(usage)] if self._include_usage else []
            await self._reply.events(*last, b"[DONE]")
            await self._reply.end()
        else:
            choices = [join_events(index, events) for index, events in enumerate(self._events)]
            await self._reply.whole(self._encoder.whole(choices, usage))

    async def _write(self, index: int, grown: Sequence[list[Event]]) -> bool:
        """False where there is nothing to show."""
        chunks: list[bytes] = []
        if index in self._unopened:
            self._unopened.discard(index)
            if (opening := self._encoder.opening(index)) is not None:
                chunks.append(opening)
        chunks += [self._encoder.chunk(join_events(index, events)) for events in grown if events]
        if not chunks:
            return False
        if self._begun:
            await self._reply.events(*chunks)
        else:
            async with self._beginning:
                await self._reply.events(*chunks)
                self._begun = True
        return True

    def _mark_shown(self, index: int) -> None:
        """This choice's tokens were given to the client, or kept for an answer in one piece."""
        timeline = self._untimed.get(index)
        if timeline is not None and not timeline.shown():
            del self._untimed[index]
