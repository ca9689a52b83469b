"""A worker's hold on the store's arena: mapped, made fit for copies, and let go when no copy uses it.

A store that is lost takes its arena along, which copies under way may still use: that one is kept until they have
ended, and no other is mapped before. Knows no message but the one that describes an arena.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from baton.kvtransfer.blocks.copies import Copies, Lock
from baton.kvtransfer.blocks.memory import SharedReader
from baton.node.messages.store import Attached


@dataclass(slots=True)
class _Mapped:
    """The arena of one life of the store."""

    store: Attached
    reader: SharedReader
    lock: Lock
    ready: bool = False
    """Whether copies may use it."""

    def close(self) -> None:
        self.lock.close()
        self.reader.close()


class MappedArena:
    """The arena of the store that a worker is attached to, if it is, and that of the one before, if copies use it."""

    def __init__(self, copies: Copies, map_arena: Callable[[Attached], SharedReader]) -> None:
        self._copies = copies
        self._map_arena = map_arena
        self._current: _Mapped | None = None
        self._leaving: _Mapped | None = None  # lost, and still used by copies

    @property
    def store(self) -> Attached | None:
        """The life of the store whose arena is mapped, fit for copies or not yet."""
        return None if self._current is None else self._current.store

    @property
    def ready(self) -> bool:
        """Whether copies may use it."""
        return self._current is not None and self._current.ready

    @property
    def is_leaving(self) -> bool:
        """Whether copies use an arena that was lost."""
        return self._leaving is not None

    def map(self, store: Attached) -> None:
        """Where none is mapped and none is leaving. Raises PeerLost if it cannot be mapped."""
        assert self._current is None and self._leaving is None, "an arena is mapped already"
        reader = self._map_arena(store)
        self._current = _Mapped(store, reader, self._copies.lock(reader.view))

    def became_ready(self) -> bool:
        """Whether copies may use it since now. Raises PeerLost if they never may."""
        if self._current is None or self._current.ready:
            return False
        self._current.ready = self._current.lock.ready()
        return self._current.ready

    def unmap(self, *, in_use: bool) -> None:
        """The store is lost. Where copies use its arena, `let_go` follows when they have ended."""
        arena, self._current = self._current, None
        if arena is None:
            return
        if in_use:
            self._leaving = arena
        else:
            arena.close()

    def let_go(self) -> None:
        """No copy is under way."""
        if self._leaving is not None:
            self._leaving.close()
            self._leaving = None

    def span(self, offset: int) -> memoryview:
        """A block of the arena. Raises PeerLost for a place outside of it."""
        assert self._current is not None, "a copy without an arena"
        return self._current.reader.span(offset, self._copies.block_bytes)

    def close(self) -> None:
        """No copy is under way."""
        self.unmap(in_use=False)
        self.let_go()
