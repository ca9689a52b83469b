"""proxy.inbox: how sessions that have mail share the event loop."""

from __future__ import annotations

import asyncio

from baton.proxy.inbox import Inbox, Turns


async def _read_all(inbox: Inbox[int], read: list[list[int]]) -> None:
    while True:
        await inbox.wait()
        together = []
        while (mail := inbox.pop()) is not None:
            together.append(mail)
        read.append(together)


async def test_the_loop_does_other_things_between_turns() -> None:
    """Guards /health, new connections and heartbeats: many sessions with mail must not hold the loop until all ran."""
    turns = Turns(2)
    inboxes: list[Inbox[int]] = [Inbox(turns) for _ in range(20)]
    reads: list[list[list[int]]] = [[] for _ in inboxes]
    tasks = [asyncio.create_task(_read_all(*each)) for each in zip(inboxes, reads, strict=True)]
    await asyncio.sleep(0)
    for inbox in inboxes:
        inbox.put(1)
    seen = []
    while sum(map(bool, reads)) < len(reads):
        await asyncio.sleep(0)
        seen.append(sum(map(bool, reads)))
    assert max(later - earlier for earlier, later in zip([0, *seen], seen, strict=False)) == 2
    assert seen == sorted(seen) and all(read == [[1]] for read in reads)
    for task in tasks:
        task.cancel()


async def test_what_comes_before_a_turn_is_read_in_it() -> None:
    """Guards the order of mail, and that a reader gets one turn for all of it."""
    inbox: Inbox[int] = Inbox(Turns(1))
    read: list[list[int]] = []
    task = asyncio.create_task(_read_all(inbox, read))
    await asyncio.sleep(0)
    for mail in range(5):
        inbox.put(mail)
    while not read:
        await asyncio.sleep(0)
    inbox.put(5)
    while len(read) < 2:
        await asyncio.sleep(0)
    assert read == [[0, 1, 2, 3, 4], [5]]
    task.cancel()


async def test_a_cancelled_reader_takes_no_turn_from_others() -> None:
    """Guards against a client that leaves while it has mail: the reader behind it is still woken."""
    turns = Turns(1)
    gone, other = Inbox[int](turns), Inbox[int](turns)
    read: list[list[int]] = []
    tasks = [asyncio.create_task(_read_all(gone, [])), asyncio.create_task(_read_all(other, read))]
    await asyncio.sleep(0)
    gone.put(1)
    other.put(2)
    tasks[0].cancel()
    while not read:
        await asyncio.sleep(0)
    assert read == [[2]]
    tasks[1].cancel()
