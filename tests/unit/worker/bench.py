"""The parts of a worker without processes: an I/O that records what it is given, a clock that only tests move."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.blocks.manager import BlockManager
from baton.kvtransfer.store.client import NO_STORE, Store
from baton.node.counters import TransferCounters
from baton.node.messages.base import Message
from baton.node.messages.control import Load
from baton.worker.io_thread import Command
from baton.worker.parts import NO_CHECKSUMS, Parts, StepChecksums
from baton.worker.prefix_loading import PrefixLoader

ROOT = b"r" * 32
BLOCK = 4
STEP_S = 0.125
"""What a step takes on the worker's clock, which stands still otherwise."""
LAYOUT = KVLayout(num_layers=1, kv_heads=1, head_dim=8, block_tokens=BLOCK, dtype="float32")


class RecordingExchange:
    """Keeps the calls, by name, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, *arguments[:-1]))  # without the time


class RecordingIo:
    """Stands in for the I/O thread: runs each command at once, keeps each message."""

    def __init__(self) -> None:
        self.load = Load()
        self.heard_at = 0.0
        self.num_reports = 0
        self.heartbeat_at = 0.0
        self.sent: list[Message] = []
        self.num_yields = 0
        self.draining = False
        self.exchange = RecordingExchange()
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def report(self, load: Load, heard_at: float) -> None:
        self.load, self.heard_at = load, heard_at
        self.num_reports += 1

    def receive(self, wait_s: float) -> list[Any]:
        events = []
        while not self.inbox.empty():
            events.append(self.inbox.get())
        return events

    def do(self, command: Command) -> None:
        command(self.exchange, 0.0)  # type: ignore[arg-type]

    def send(self, link: str, *messages: Message) -> None:
        self.sent += messages

    def yield_gil(self, wait_s: float) -> None:
        self.num_yields += 1

    @property
    def transfer_counters(self) -> TransferCounters:
        return TransferCounters()

    def drain(self) -> None:
        self.draining = True

    def of(self, kind: type[Message]) -> list[Any]:
        return [message for message in self.sent if isinstance(message, kind)]


def parts_of(
    runner: Any,
    io: RecordingIo,
    manager: BlockManager,
    clock: Callable[[], float],
    *,
    max_model_len: int,
    store: Store = NO_STORE,
    always_load: bool = False,
    checksums: StepChecksums = NO_CHECKSUMS,
) -> Parts:
    prefixes = PrefixLoader(store, manager, LAYOUT, always=always_load)
    return Parts(runner, manager, LAYOUT, max_model_len, io, prefixes, checksums, clock)
