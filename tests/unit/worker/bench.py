"""The parts of a worker without processes: a recording I/O thread and exchange, and a manual clock."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from baton.kvtransfer.blocks.hashing import block_hashes
from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.blocks.manager import BlockManager
from baton.kvtransfer.store.client import NO_STORE, Store
from baton.models.batch import Drawn, Row
from baton.node.counters import TransferCounters
from baton.node.messages.base import Message
from baton.node.messages.control import DispatchBody, Load, Reserve, SamplingSpec
from baton.worker.io_thread import Command, FromProxy
from baton.worker.parts import NO_CHECKSUMS, NO_GRAMMARS, Grammars, Parts, StepChecksums
from baton.worker.prefix_loading import PrefixLoader
from baton.worker.sequence import Sequence as WorkerSequence

ROOT = b"r" * 32
BLOCK = 4
STEP_S = 0.125
"""What a step takes on the worker's clock, which stands still otherwise."""
LAYOUT = KVLayout.of_model(num_layers=1, kv_heads=1, head_dim=8, block_tokens=BLOCK, dtype="float32")


class RecordingExchange:
    """An exchange that records its calls in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, *arguments[:-1]))  # without the time


class RecordingIo:
    """A fake I/O thread that runs each command at once and records each message."""

    def __init__(self) -> None:
        self.load = Load()
        self.last_message_at = 0.0
        self.num_reports = 0
        self.heartbeat_at = 0.0
        self.sent: list[Message] = []
        self.num_yields = 0
        self.draining = False
        self.exchange = RecordingExchange()
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def report(self, load: Load, last_message_at: float) -> None:
        self.load, self.last_message_at = load, last_message_at
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
    grammars: Grammars = NO_GRAMMARS,
) -> Parts:
    prefixes = PrefixLoader(store, manager, LAYOUT, always=always_load)
    return Parts(runner, manager, LAYOUT, max_model_len, io, prefixes, checksums, grammars, clock)


class ManualStep:
    """A launched step that logs when it is read."""

    device_time = None

    def __init__(self, log: list[str], number: int, drawn: list[Drawn | None]) -> None:
        self._log, self._number, self._drawn = log, number, drawn

    def read(self) -> list[Drawn | None]:
        self._log.append(f"read {self._number}")
        return self._drawn


class ManualRunner:
    """A runner that samples token 7 for each sampling row, and logs launches and reads."""

    config = SimpleNamespace(vocab_size=1000, full_step_tokens=1024)

    def __init__(self, run_ahead: int = 0) -> None:
        self.run_ahead = run_ahead
        self.log: list[str] = []
        self.rows: list[list[Row]] = []

    def launch(self, rows: Sequence[Row]) -> ManualStep:
        self.rows.append(list(rows))
        self.log.append(f"launch {len(self.rows)}")
        return ManualStep(self.log, len(self.rows), [Drawn((7,)) if row.draw else None for row in rows])


def reserve(
    name: str = "a",
    num_tokens: int = 6,
    *,
    attempt: int = 0,
    deadline_s: float = 100.0,
    link: str = "proxy",
    at: float = 0.0,
    **body: Any,
) -> FromProxy:
    tokens = tuple(range(num_tokens))
    fields = {
        "token_ids": tokens,
        "prompt_len": num_tokens,
        "root": ROOT,
        "block_hashes": block_hashes(ROOT, tokens, BLOCK),
        "sampling": SamplingSpec(max_tokens=5),
        "deadline_s": deadline_s,
    }
    return FromProxy(link, Reserve(request_id=name, attempt=attempt, body=DispatchBody(**fields | body)), at)


def sequence_of(manager: BlockManager, name: str = "a", num_tokens: int = 6, **body: Any) -> WorkerSequence:
    """A sequence as the loop creates it from a message."""
    request = reserve(name, num_tokens, **body)
    assert isinstance(request.message, Reserve)
    return WorkerSequence.of(request.message, request.link, request.at, 0.0, manager, BLOCK)
