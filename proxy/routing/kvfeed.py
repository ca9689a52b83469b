"""Applies block events to the index, over links that lose, duplicate and reorder: numbers, gaps, replays. Pure.

For each holder it knows the number of the next KvEvents. A later number, or a heartbeat that names one, is a gap: the
holder is asked for the rest, and again after ASK_AGAIN_S. Until then the index is wrong about that holder, which costs
a worse choice of the router and nothing else.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from baton.node.messages.control import KvEvents, KvReplay, KvSnapshot
from baton.proxy.routing.kvindex import KvIndex

ASK_AGAIN_S = 0.5
MADE_GRACE_S = 0.25
"""This long after a leg's end, its worker's events have reported the blocks it computed."""
SWEEP_BLOCKS = 5000
"""About two milliseconds' work."""


@dataclass(slots=True)
class _Holder:
    next_seq: int = 1
    snapshot_seq: int = 0
    next_part: int = 0
    """Of the snapshot of that number; 0 while none is coming."""
    ask_at: float = 0.0
    lacking: bool = False


@dataclass(slots=True)
class FeedCounts:
    """Totals since the start."""

    batches: int = 0
    blocks: int = 0
    """In them: stored, removed, or in a snapshot."""
    gaps: int = 0
    replays: int = 0
    """Times that a holder was asked for what is missing."""
    snapshots: int = 0
    """Those that came to their end."""


class KvFeed:
    """Follows the events of all holders. Methods that take a message may return one to answer with."""

    def __init__(self, index: KvIndex) -> None:
        self.counts = FeedCounts()
        self._index = index
        self._holders: dict[str, _Holder] = {}
        self._legs: dict[tuple[str, str], tuple[bytes, ...]] = {}
        self._made: deque[tuple[float, str, tuple[bytes, ...]]] = deque()  # by the time when they are forgotten

    def join(self, holder: str) -> None:
        """A holder has registered; one that is known already goes on."""
        if holder not in self._holders:
            self._holders[holder] = _Holder()
            self._index.reset(holder)

    def leave(self, holder: str) -> None:
        if self._holders.pop(holder, None) is not None:
            self._index.leave(holder)

    def on_beat(self, holder: str, kv_seq: int, store: str, now: float) -> KvReplay | None:
        """`kv_seq` is the last number that it had sent before."""
        state = self._holders.get(holder)
        if state is None:
            return None
        self._index.attach(holder, store)
        return self._ask(state, now) if kv_seq >= state.next_seq else None

    def on_events(self, holder: str, events: KvEvents, now: float) -> KvReplay | None:
        state = self._holders.get(holder)
        if state is None or events.seq < state.next_seq:
            return None
        if events.seq > state.next_seq:
            return self._ask(state, now)
        state.next_seq += 1
        state.next_part = 0
        state.lacking = False
        self.counts.batches += 1
        self.counts.blocks += sum(len(change.stored) + len(change.removed) for change in events.changes)
        self._index.apply(holder, events.changes)
        return None

    def on_snapshot(self, holder: str, snapshot: KvSnapshot, now: float) -> KvReplay | None:
        """Its parts come in order; what is missing after the last is asked for by the next gap."""
        state = self._holders.get(holder)
        if state is None or snapshot.seq < state.next_seq:
            return None
        if snapshot.part == 0:
            self._index.reset(holder)
            state.snapshot_seq, state.next_part = snapshot.seq, 0
            state.next_seq = 1  # until it is whole, nothing that came before counts
        elif (snapshot.seq, snapshot.part) != (state.snapshot_seq, state.next_part):
            return self._ask(state, now)
        self.counts.blocks += sum(len(change.stored) for change in snapshot.changes)
        self._index.apply(holder, snapshot.changes)
        state.next_part += 1
        if state.next_part >= snapshot.parts:
            state.next_seq, state.next_part, state.lacking = snapshot.seq + 1, 0, False
            self.counts.snapshots += 1
        return None

    # ---- blocks on their way ------------------------------------------------------------------------------------

    def expect(self, worker: str, request_id: str, hashes: tuple[bytes, ...]) -> None:
        """A leg was sent to `worker`, which will have computed these blocks before a later one gets its turn."""
        if hashes:
            self._legs[worker, request_id] = hashes
            self._index.expect(worker, hashes)

    def settle(self, worker: str, request_id: str, now: float, *, computed: bool) -> None:
        """The end of that leg. What was not computed must not lead the next attempt, or a sibling, to that worker."""
        hashes = self._legs.pop((worker, request_id), None)
        if hashes is None:
            return
        if computed:
            self._made.append((now + MADE_GRACE_S, worker, hashes))
        else:
            self._index.unexpect(worker, hashes)

    def tidy(self, now: float) -> None:
        """To be called some times a second."""
        while self._made and self._made[0][0] <= now:
            _, worker, hashes = self._made.popleft()
            self._index.unexpect(worker, hashes)
        self._index.sweep(SWEEP_BLOCKS)

    # ---- inside -------------------------------------------------------------------------------------------------

    def _ask(self, state: _Holder, now: float) -> KvReplay | None:
        self.counts.gaps += not state.lacking
        state.lacking = True
        if now < state.ask_at:
            return None
        state.ask_at = now + ASK_AGAIN_S
        self.counts.replays += 1
        return KvReplay(seq=state.next_seq)
