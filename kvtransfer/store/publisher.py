"""The store at the proxies: it joins them as a store, beats, and publishes which blocks it has gained and lost.

The store's own socket speaks another union of messages, so this has a line of its own, which calls and is never
called. One thread makes all calls; journals may be written by others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from baton.kvtransfer.blocks.events import FLUSH_EVERY_S, BlockJournal, EventLog
from baton.node.line import Line
from baton.node.membership import JoinRefused, Membership
from baton.node.messages.base import Message
from baton.node.messages.control import KvReplay, Load, RegisterStore
from baton.node.telemetry import log_event

logger = logging.getLogger("store")


class EventPublisher:
    """`links` are the names that the line, which this closes, has for the proxies; there may be none."""

    def __init__(self, line: Line, name: str, incarnation: int, links: Sequence[str], now: float) -> None:
        self._log = EventLog()
        self._line = line
        self._membership = Membership(RegisterStore(worker=name, incarnation=incarnation), tuple(links), now)
        self._flush_at = now
        self.ram: BlockJournal = self._log.journal("ram")
        """Where the owner of the arena notes what comes and goes."""
        self.disk: BlockJournal = self._log.journal("disk")

    @property
    def unready(self) -> str:
        """See Membership."""
        return self._membership.unready

    def on_disk(self, block_hash: bytes, held: bool) -> None:
        """A tier's change (disk/base.py, Changed)."""
        if held:
            self.disk.stored(block_hash)
        else:
            self.disk.removed(block_hash)

    def turn(self, counters: Callable[[], dict[str, float]], now: float) -> None:
        """Take in messages of the proxies, and send what is due."""
        for link, message in self._line.receive(0.0):
            for change in self._membership.on_message(link, message, now):
                if isinstance(change, JoinRefused):
                    log_event(logger, "join_refused", level=logging.WARNING, link=link, reason=change.reason)
            if isinstance(message, KvReplay):
                for answer in self._log.replay(message.seq):
                    self._send(link, answer)
        if now >= self._flush_at:
            self._flush_at = now + FLUSH_EVERY_S
            for batch in self._log.flush():
                for link in self._membership.joined:
                    self._send(link, batch)
        if now >= self._membership.wake_at:
            messages, _ = self._membership.on_timer(now, Load(counters=counters()), kv_seq=self._log.seq)
            for link, message in messages:
                self._send(link, message)

    def close(self) -> None:
        """Say goodbye."""
        for link, message in self._membership.goodbyes():
            self._send(link, message)
        self._line.linger()
        self._line.close()

    def _send(self, link: str, message: Message) -> None:
        self._line.send(link, self._membership.outgoing(link, message))
