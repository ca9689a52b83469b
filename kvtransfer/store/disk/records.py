"""What a tier's policy asks of a storage of records, and how a storage says that something is wrong.

A storage decides nothing: which record goes to make room, and what a fault means, is the policy's (tier.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.kvtransfer.store.disk.base import Miss, Refusal


class RecordFault(Exception):
    """This one record cannot be read; others may."""

    def __init__(self, miss: Miss) -> None:
        super().__init__(miss.value)
        self.miss = miss


class WriteFault(Exception):
    """Nothing was changed by this write."""

    def __init__(self, refusal: Refusal, cause: str) -> None:
        super().__init__(cause)
        self.refusal = refusal


class StorageBroken(Exception):
    """Nothing can be done with this storage any more: end it with `discard`, or `abandon` if what it holds is good."""

    def __init__(self, miss: Miss, cause: str, *, keep: bool = False) -> None:
        super().__init__(cause)
        self.miss = miss
        self.keep = keep


@dataclass(frozen=True, slots=True)
class Block:
    """What is stored: its bytes, and the digest that its owner made of them."""

    data: memoryview
    digest: bytes


class Records(Protocol):
    """Uniform records under their key. Reads may run beside each other and beside one of the writing calls.

    Besides what each call names, any may raise StorageBroken. The caller sees to it that no record is removed while it
    is read, and that nothing runs beside the last three.
    """

    capacity_blocks: int

    def load(self) -> list[tuple[bytes, int]]:
        """Key and tick (when it was last used, in writes and hits) of all records, in any order."""
        ...

    def read(self, key: bytes, into: memoryview) -> bytes:
        """Fill `into` with the verified block; its digest. RecordFault: `into` is undefined."""
        ...

    def write(self, key: bytes, block: Block, tick: int, victims: Sequence[bytes], ticks: Mapping[bytes, int]) -> None:
        """Remove `victims`, note the new ticks of others, and add the record: all of it, or WriteFault."""
        ...

    def remove(self, keys: Sequence[bytes]) -> None:
        """WriteFault: they may be back at the next opening."""
        ...

    def note(self, ticks: Mapping[bytes, int]) -> None:
        """Keep newer ticks of records. WriteFault: not kept."""
        ...

    def check(self) -> None:
        """Look whether the files are there; only StorageBroken says that they are not."""
        ...

    def close(self) -> None:
        """All is on the disk when it returns, and will be trusted. WriteFault: not so; it is still to be abandoned."""
        ...

    def abandon(self) -> None:
        """Let go of everything as a process that dies would."""
        ...

    def discard(self) -> None:
        """Let go, and set aside what cannot be trusted. If the disk forbids even that, the next opening will see it."""
        ...
