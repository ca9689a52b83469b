"""What the NCCL plane needs of a communicator: pipes between two GPUs, each used in one direction, and what makes them.

`communicator` implements it over NCCL, in threads of its own; the tests' fake fails if order or size differ at the two
ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Protocol


class PipeState(Enum):
    OPENING = auto()
    READY = auto()
    BROKEN = auto()


class PipeOperation(Protocol):
    """One issued movement."""

    @property
    def done(self) -> bool:
        """It touches the pool no more, and every byte was moved unless the pipe broke."""
        ...


Pieces = Sequence[tuple[int, int]]
"""Of the local pool: (first block, number of blocks) each."""


class Pipe(Protocol):
    """One communicator, used in one direction. No call waits."""

    @property
    def state(self) -> PipeState: ...

    @property
    def reason(self) -> str:
        """Why it is broken."""
        ...

    def deliver(self, key: str, value: bytes) -> None:
        """The peer's message for the rendezvous."""
        ...

    def send(self, pieces: Pieces, packed: bool) -> PipeOperation: ...

    def receive(self, pieces: Pieces, packed: bool) -> PipeOperation: ...

    def abort(self) -> None:
        """Begin to end it, in a thread of its own; state is BROKEN from now on. May be repeated."""
        ...

    @property
    def stopped(self) -> bool:
        """After `abort`: nothing of it can touch the pool any more."""
        ...


class Connector(Protocol):
    """Makes pipes over one pool."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...

    @property
    def device(self) -> str:
        """What must differ between the two ends (a GPU), a colon, and what must be equal (the version of NCCL)."""
        ...

    def open(self, sending: bool, put: Callable[[str, bytes], None]) -> Pipe:
        """Begin to make one; `put` carries a key and its value to the other end's `deliver`, from any thread."""
        ...

    def close(self, patience_s: float) -> None:
        """Wait for the threads of all pipes, which are aborted."""
        ...
