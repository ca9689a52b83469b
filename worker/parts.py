"""What the loop of a worker needs of its parts, as interfaces: a loop imports no torch and starts nothing.

`worker.start.Worker` has all of them; so has a simulated worker, whose runner and carrier are made of arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.blocks.manager import BlockManager
from baton.models.batch import Launched, Row
from baton.node.messages.base import Message
from baton.node.messages.control import Load
from baton.worker.io_thread import Command, Inbound


class Vocabulary(Protocol):
    """The one thing that a loop must know of a model's configuration."""

    @property
    def vocab_size(self) -> int: ...


class Runner(Protocol):
    """models.runner.ModelRunner, as a loop uses it."""

    @property
    def config(self) -> Vocabulary: ...

    @property
    def run_ahead(self) -> int:
        """Steps that may be launched before the first of them is read; 0: each is read before the next."""
        ...

    def launch(self, rows: Sequence[Row]) -> Launched:
        """Begin to compute the rows' tokens and to draw what they ask for. Steps run one after the other."""
        ...


class StepChecksums(Protocol):
    """Checksums of blocks, made while the device is at the step that completes them."""

    def begin(self, blocks: Sequence[int]) -> Callable[[], dict[int, bytes]]:
        """Called when the step is launched. What it returns is called once, after the step was read: the checksums by
        block, or none at all, where whoever wants them reads the blocks."""
        ...


class NoChecksums:
    """Where the host computes, and reads blocks as fast as any."""

    def begin(self, blocks: Sequence[int]) -> Callable[[], dict[int, bytes]]:
        return dict


class WorkerIo(Protocol):
    """kvtransfer.carrier.Carrier, as a loop uses it."""

    load: Load
    load_at: float

    def receive(self, wait_s: float) -> list[Inbound]: ...

    def do(self, command: Command) -> None: ...

    def tell(self, link: str, *messages: Message) -> None: ...

    def let_work(self, wait_s: float) -> None: ...

    def transfer_counters(self) -> dict[str, float]: ...

    def drain(self) -> None: ...


class Parts(Protocol):
    """The parts that a role's loop works with."""

    @property
    def runner(self) -> Runner: ...

    @property
    def manager(self) -> BlockManager: ...

    @property
    def layout(self) -> KVLayout: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def carrier(self) -> WorkerIo: ...
