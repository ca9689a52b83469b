"""Where adapters are among the workers, and what it costs to have one elsewhere. Pure.

An adapter that is in no slot of a worker takes a copy from the host's memory there, or has to be read first. That is a
cost in seconds beside the others of the router; equal workers are distinguished by the adapter's digest, so that an
adapter that is nowhere settles on few of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Set
from dataclasses import dataclass

from baton.node.messages.control import AdapterRef

FILL_S = 0.003
"""From the host's memory to a slot: 84 MB, rank 16 of an 8B model, at 28 GB/s."""
READ_BYTES_S = 0.5e9
"""From a folder to the host's memory, with its digest."""
TAKES_SLOT_S = 0.02
"""Where all slots have adapters, another one loses its own, and is copied again when it is wanted next."""


@dataclass(frozen=True, slots=True)
class RequestAdapter:
    """The adapter of a request: the same one over all attempts, whatever its name means by then."""

    ref: AdapterRef
    rank: int
    """The largest in it."""
    size_bytes: int
    """Of its file."""


@dataclass(frozen=True, slots=True)
class AdapterPlaces:
    """The adapters of one worker, by digest."""

    num_slots: int
    """0: it takes no request with an adapter."""
    max_rank: int
    in_slots: Set[bytes]
    in_memory: Set[bytes]
    """And in no slot."""

    def take(self, adapter: RequestAdapter) -> bool:
        return self.num_slots > 0 and adapter.rank <= self.max_rank

    def load_s(self, adapter: RequestAdapter) -> float:
        """Until the next step can compute with it, and what that costs others."""
        digest = adapter.ref.digest
        if digest in self.in_slots:
            return 0.0
        taken = TAKES_SLOT_S if len(self.in_slots) >= self.num_slots else 0.0
        read = 0.0 if digest in self.in_memory else adapter.size_bytes / READ_BYTES_S
        return FILL_S + taken + read


NO_ADAPTERS: AdapterPlaces = AdapterPlaces(0, 0, frozenset(), frozenset())


def lacking(role: str, adapter: RequestAdapter, places: Iterable[AdapterPlaces]) -> str:
    """Of a role without a worker that takes the adapter; `places`: of its workers."""
    most = max((each.max_rank for each in places if each.num_slots), default=0)
    if not most:
        return f"no {role} worker takes adapters; see --max-loras of workers"
    return f"the adapter has rank {adapter.rank}, {role} workers take up to {most}; see --max-lora-rank of workers"


def affinity(adapter: RequestAdapter, worker: str) -> bytes:
    """Of equal workers the one with the largest is taken (rendezvous hashing). `worker`: an identity, of which the
    incarnation does not count."""
    name = worker.rpartition("/")[0] or worker
    return hashlib.blake2b(adapter.ref.digest + name.encode(), digest_size=8).digest()
