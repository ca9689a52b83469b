"""The adapters of a worker: a thread reads them, the host's memory keeps them, the runner's slots have those in use.

    want ──► reading ── AdapterRead ──► in memory ── assign: a slot, and a fill ──► in a slot

It belongs to the worker's loop, which never waits for any of it: sequences whose adapter is not in a slot are left out
of steps. Which sequences use a slot is seen from the sequences, so that no path can forget to give one back. What is
not used is forgotten in the order of its use, first from the slots, then from memory.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import cast

from baton.models.adapters.fills import Fill, FillableSlots, PreparedAdapter
from baton.node.counters import AdapterCounters
from baton.node.errors import AdapterError
from baton.node.leg import LegKey
from baton.node.messages.control import AdapterLoaded, AdapterRef, LoadAdapter
from baton.node.telemetry import excerpt, log_event
from baton.worker.adapter_slots import AdapterRead, SlotTable
from baton.worker.sequence import Sequence

logger = logging.getLogger("worker")

MAX_OVERTAKES = 32
"""Sequences that take up an adapter of a slot while one waits for a slot of its own; then the slots drain for it."""
MAX_LOOKED_AT = 256
"""Of the sequences that wait, in one turn of the loop: a step must not wait for more."""
FILL_POLL_S = 0.0005

ReadAdapter = Callable[[Path], tuple[bytes, PreparedAdapter]]
"""The digest and what slots are filled from; raises AdapterError."""


@dataclass(slots=True)
class _Entry:
    """An adapter that is being read or in memory."""

    prepared: PreparedAdapter | None = None
    links: list[str] = field(default_factory=list)
    """To proxies that asked for it, until it is read."""
    fill: Fill | None = None
    """The last one of the slot that it is in."""


class WorkerAdapters:
    """worker.parts.Adapters of a runner with slots."""

    def __init__(
        self,
        slots: FillableSlots,
        read: ReadAdapter,
        max_in_memory: int,
        on_read: Callable[[AdapterRead], None],
        clock: Callable[[], float] = time.monotonic,
        thread: Executor | None = None,
    ) -> None:
        """`on_read` is called by the thread, one of its own unless `thread` is given. `max_in_memory`: more than there
        are slots, or it counts as one more."""
        self.counters = AdapterCounters()
        self._runner_slots, self._read, self._on_read, self._clock = slots, read, on_read, clock
        self._max_in_memory = max(max_in_memory, slots.num_slots + 1)
        self._slots = SlotTable(slots.num_slots)
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # least recently used first
        self._thread = thread or ThreadPoolExecutor(1, thread_name_prefix="adapters")
        self._awaited: set[bytes] = set()
        """By the sequences that wait longest: not forgotten before they have slots."""
        self._waits_longest: LegKey | None = None
        self._overtakes = 0

    # -- requests and the thread

    def want(self, ref: AdapterRef) -> str:
        """A request names the adapter: have it read, if it is not known and there is room; else `assign` does when its
        turn comes. Returns why this worker cannot have it, or ""."""
        if ref.digest in self._entries:
            self._entries.move_to_end(ref.digest)
        elif self._make_room():
            self._entries[ref.digest] = _Entry()
            self._thread.submit(self._load, ref)
        return ""

    def load(self, link: str, message: LoadAdapter) -> AdapterLoaded | None:
        """A proxy asks for it. Its answer, or None: it follows when the adapter is read."""
        self.want(message.adapter)
        entry = self._entries.get(message.adapter.digest)
        if entry is None:
            error = f"the {self._max_in_memory} adapters in memory are all in use; see --max-cpu-loras"
            return AdapterLoaded(digest=message.adapter.digest, error=error)
        if entry.prepared is not None:
            return AdapterLoaded(digest=message.adapter.digest)
        entry.links.append(link)
        return None

    def take_in(self, event: AdapterRead) -> list[tuple[str, AdapterLoaded]]:
        """An adapter was read; the answers to proxies, by link."""
        entry = self._entries[event.digest]
        name = event.digest.hex()[:12]
        if event.error:
            log_event(logger, "adapter_unusable", level=logging.WARNING, digest=name, reason=event.error)
        else:
            log_event(logger, "adapter_read", digest=name)
        answers = [(link, AdapterLoaded(digest=event.digest, error=event.error)) for link in entry.links]
        entry.links.clear()
        if event.error:
            del self._entries[event.digest]  # the next request tries again
            self.counters.adapter_load_failures += 1
        else:
            entry.prepared = cast(PreparedAdapter, event.prepared)
            self.counters.adapter_loads += 1
        return answers

    def _load(self, ref: AdapterRef) -> None:
        """On the thread."""
        began_at, error, prepared = time.monotonic(), "", None
        try:
            found, prepared = self._read(Path(ref.path))
            if found != ref.digest:
                error = (
                    f"{ref.path} is another adapter than was asked for: {found.hex()[:12]}, not {ref.digest.hex()[:12]}"
                )
        except AdapterError as failure:
            error = str(failure)
        except Exception as failure:  # of a library: the requests fail, not the worker
            error = f"{ref.path}: {type(failure).__name__}: {excerpt(failure)}"
        self.counters.adapter_load_seconds += time.monotonic() - began_at
        self._on_read(AdapterRead(ref.digest, error, None if error else prepared))

    def _make_room(self) -> bool:
        """For one more in memory, by forgetting the least recently used that is in no slot and not awaited."""
        if len(self._entries) < self._max_in_memory:
            return True
        kept = {*self._slots.digests, *self._awaited}
        idle = (digest for digest, each in self._entries.items() if each.prepared is not None and digest not in kept)
        found = next(idle, None)
        if found is not None:
            del self._entries[found]
        return found is not None

    # -- slots

    def assign(self, sequences: Mapping[LegKey, Sequence], named: Collection[int]) -> None:
        """Give slots to sequences that wait for one, in the order of their arrival; those with blocks come first.
        `named`: slots that unread steps name."""
        waiting = [each for each in sequences.values() if each.awaits_adapter]
        if not waiting:
            return
        waiting.sort(key=lambda each: not _keeps(each))
        del waiting[MAX_LOOKED_AT:]
        awaited = dict.fromkeys(each.adapter.digest for each in waiting if each.adapter is not None)
        self._awaited = set(islice(awaited, self._max_in_memory - len(self._slots)))
        starving: LegKey | None = None
        full: dict[bool, bool] = {}
        """Whether no slot was left, for sequences that keep blocks and for others."""
        for sequence in waiting:
            entry = self._entry_of(sequence)
            if entry is None or entry.prepared is None:
                continue
            assert sequence.adapter is not None, "it awaits one"
            slot, keeps = self._slots.slot_of(sequence.adapter.digest), _keeps(sequence)
            if slot is None and not full.get(keeps):
                slot = self._fill(sequence, entry, sequences.values(), named)
                full[keeps] = slot is None
            if slot is None:
                starving = starving or sequence.leg
            elif starving is not None and not keeps and not self._may_overtake(starving):
                continue
            elif entry.fill is not None and entry.fill.done:
                sequence.adapter_slot = slot
                self._slots.use(slot)
                self.counters.adapter_wait_seconds += self._clock() - sequence.times.received_at
        if starving is None:
            self._waits_longest = None

    def _entry_of(self, sequence: Sequence) -> _Entry | None:
        """Memory may have been too small for it so far."""
        assert sequence.adapter is not None, "it awaits one"
        if sequence.adapter.digest in self._awaited:
            self.want(sequence.adapter)
        return self._entries.get(sequence.adapter.digest)

    def _fill(
        self, sequence: Sequence, entry: _Entry, sequences: Iterable[Sequence], named: Collection[int]
    ) -> int | None:
        """Begin to fill a slot with a sequence's adapter; None: all are in use."""
        assert sequence.adapter is not None and entry.prepared is not None, "it was read"
        holders = [each for each in sequences if each.adapter_slot is not None]
        busy = {*named, *(each.adapter_slot for each in holders if _keeps(each)), *self._filling()}
        held = {each.adapter_slot for each in holders}
        slot = self._slots.choose(
            {each for each in busy if each is not None},
            {each for each in held if each is not None},
            may_take_held=_keeps(sequence),
        )
        if slot is None:
            return None
        for each in holders:
            if each.adapter_slot == slot:
                each.adapter_slot = None
        entry.fill = self._runner_slots.fill(slot, entry.prepared)
        self._slots.put(slot, sequence.adapter.digest)
        self.counters.adapter_fills += 1
        return slot

    def _filling(self) -> list[int]:
        found = (self._slots.slot_of(digest) for digest in self._slots.digests if not self._is_filled(digest))
        return [slot for slot in found if slot is not None]

    def _is_filled(self, digest: bytes) -> bool:
        fill = self._entries[digest].fill
        return fill is None or fill.done

    def _may_overtake(self, starving: LegKey) -> bool:
        """Another sequence takes up what is in a slot although this one waits for a slot."""
        if self._waits_longest != starving:
            self._waits_longest, self._overtakes = starving, 0
        self._overtakes += 1
        return self._overtakes <= MAX_OVERTAKES

    def wake_in_s(self, longest_s: float) -> float:
        """How long the loop may wait: no fill is looked at later."""
        return min(longest_s, FILL_POLL_S) if self._filling() else longest_s

    # -- state

    @property
    def in_slots(self) -> tuple[bytes, ...]:
        return self._slots.digests

    @property
    def in_memory(self) -> tuple[bytes, ...]:
        """Those that are in no slot, the last used first."""
        in_slots = set(self._slots.digests)
        return tuple(
            digest
            for digest, each in reversed(self._entries.items())
            if each.prepared is not None and digest not in in_slots
        )

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def _keeps(sequence: Sequence) -> bool:
    """It has blocks, and nothing that it waits for from other workers: it gives them back by computing."""
    return bool(sequence.table.blocks) and sequence.incoming is None
