"""Inboxes of sessions, and turns: sessions that have mail are woken a few at a time, in the order of their mail.

Between two turns the event loop does what else there is to do. What arrives for a session until its turn is read at
once, so a proxy with more tokens than it can pass on one by one passes them on in larger pieces. Knows no message.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

Mail = TypeVar("Mail")


class Turns:
    """Lets coroutines that wait go on, `at_once` in each iteration of the event loop."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._due: deque[asyncio.Future[None]] = deque()
        self._scheduled = False

    def add(self, waiter: asyncio.Future[None]) -> None:
        """`waiter` gets its result when its turn comes."""
        self._due.append(waiter)
        if not self._scheduled:
            self._scheduled = True
            waiter.get_loop().call_soon(self._run)

    async def next(self) -> None:
        """Until it is the caller's turn, after those that wait already."""
        waiter = asyncio.get_running_loop().create_future()
        self.add(waiter)
        await waiter

    def _run(self) -> None:
        for _ in range(min(self._at_once, len(self._due))):
            waiter = self._due.popleft()
            if not waiter.done():  # else its task was cancelled
                waiter.set_result(None)
        if self._due:
            self._due[0].get_loop().call_soon(self._run)
        else:
            self._scheduled = False


class Inbox(Generic[Mail]):
    """Mail for one reader."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._mail: deque[Mail] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._mail)

    def put(self, mail: Mail) -> None:
        self._mail.append(mail)
        if self._waiter is not None:
            self._turns.add(self._waiter)
            self._waiter = None

    def pop(self) -> Mail | None:
        """The oldest mail, if there is any."""
        return self._mail.popleft() if self._mail else None

    def discard(self, kind: type) -> None:
        """All mail of this kind that is there."""
        if self._mail:
            self._mail = deque(each for each in self._mail if type(each) is not kind)

    async def wait(self) -> None:
        """Until there is mail, and it is the reader's turn: also where it left some."""
        if self._mail:
            await self._turns.next()
        while not self._mail:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
