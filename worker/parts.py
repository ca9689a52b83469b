"""The parts that a worker's loop and its role work with; their interfaces import no torch and start nothing.

`worker.startup` makes them of a model, a pool and sockets; the simulator's runner and I/O are made of arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.blocks.manager import BlockManager
from baton.models.batch import Launched, Row
from baton.node.counters import AdapterCounters, GrammarCounters, TransferCounters
from baton.node.errors import InvariantBroken
from baton.node.leg import LegKey
from baton.node.messages.base import Message
from baton.node.messages.control import AdapterLoaded, AdapterRef, Grammar, Load, LoadAdapter
from baton.worker.adapter_slots import AdapterRead
from baton.worker.constraint import Constraint, GrammarCompiled
from baton.worker.io_thread import Command, Inbound
from baton.worker.prefix_loading import PrefixLoader
from baton.worker.sequence import Sequence as WorkerSequence


class ModelFacts(Protocol):
    """The part of a model's configuration that a loop needs."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def full_step_tokens(self) -> int:
        """See ModelConfig."""
        ...


class Runner(Protocol):
    """A model on a device; see models.batch."""

    @property
    def config(self) -> ModelFacts: ...

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
        block, or none at all, where the reader of the blocks makes them."""
        ...


class NoChecksums:
    """For a host that reads blocks as fast as any device."""

    def begin(self, blocks: Sequence[int]) -> Callable[[], dict[int, bytes]]:
        return dict


NO_CHECKSUMS: StepChecksums = NoChecksums()


class Grammars(Protocol):
    """See worker.grammars."""

    @property
    def counters(self) -> GrammarCounters: ...

    def compile(self, grammar: Grammar) -> Constraint | None: ...

    def constraint(self, event: GrammarCompiled) -> Constraint | None: ...

    def masks(self, constraints: Sequence[Constraint], drafts: Sequence[Sequence[int]] = ()) -> np.ndarray: ...


class NoGrammars:
    """Where no request has a grammar."""

    counters = GrammarCounters()

    def compile(self, grammar: Grammar) -> Constraint | None:
        raise InvariantBroken("a request with a grammar, where none is compiled")

    def constraint(self, event: GrammarCompiled) -> Constraint | None:
        raise InvariantBroken("a grammar, where none is compiled")

    def masks(self, constraints: Sequence[Constraint], drafts: Sequence[Sequence[int]] = ()) -> np.ndarray:
        raise InvariantBroken("masks, where no grammar is compiled")


NO_GRAMMARS: Grammars = NoGrammars()


class Adapters(Protocol):
    """See worker.adapters."""

    @property
    def counters(self) -> AdapterCounters: ...

    @property
    def in_slots(self) -> tuple[bytes, ...]: ...

    @property
    def in_memory(self) -> tuple[bytes, ...]: ...

    def want(self, ref: AdapterRef) -> str: ...

    def load(self, link: str, message: LoadAdapter) -> AdapterLoaded | None: ...

    def take_in(self, event: AdapterRead) -> list[tuple[str, AdapterLoaded]]: ...

    def assign(self, sequences: Mapping[LegKey, WorkerSequence], named: Collection[int]) -> None: ...

    def wake_in_s(self, longest_s: float) -> float: ...


class NoAdapters:
    """Where no request has an adapter."""

    counters = AdapterCounters()
    in_slots: tuple[bytes, ...] = ()
    in_memory: tuple[bytes, ...] = ()

    def want(self, ref: AdapterRef) -> str:
        return "this worker takes no adapters; see --max-loras"

    def load(self, link: str, message: LoadAdapter) -> AdapterLoaded | None:
        return AdapterLoaded(digest=message.adapter.digest, error=self.want(message.adapter))

    def take_in(self, event: AdapterRead) -> list[tuple[str, AdapterLoaded]]:
        raise InvariantBroken("an adapter, where none is read")

    def assign(self, sequences: Mapping[LegKey, WorkerSequence], named: Collection[int]) -> None:
        pass

    def wake_in_s(self, longest_s: float) -> float:
        return longest_s


NO_ADAPTERS: Adapters = NoAdapters()


class WorkerIo(Protocol):
    """What a loop needs of the I/O thread; see worker.io_thread.IoThread."""

    @property
    def heartbeat_at(self) -> float: ...

    def report(self, load: Load, last_message_at: float) -> None: ...

    def receive(self, wait_s: float) -> list[Inbound]: ...

    def do(self, command: Command) -> None: ...

    def send(self, link: str, *messages: Message) -> None: ...

    def yield_gil(self, wait_s: float) -> None: ...

    @property
    def transfer_counters(self) -> TransferCounters: ...

    def drain(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What a loop and its role work with."""

    runner: Runner
    manager: BlockManager
    layout: KVLayout
    max_model_len: int
    io: WorkerIo
    prefixes: PrefixLoader
    checksums: StepChecksums = NO_CHECKSUMS
    grammars: Grammars = NO_GRAMMARS
    clock: Callable[[], float] = time.monotonic
    adapters: Adapters = NO_ADAPTERS
