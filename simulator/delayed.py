"""What follows a step of a simulated worker, held back until the step has ended: messages, reports, blocks, tokens.

A turn of the loop happens at one instant; the step that it launched ends later. Knows no latency model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import msgspec

from baton.kvtransfer.blocks.events import BlockJournal
from baton.node.counters import TransferCounters
from baton.node.messages.base import Message
from baton.node.messages.control import Bundle, Load, Reserved, Tokens
from baton.simulator.network import Network
from baton.simulator.runner import SimRunner
from baton.worker.io_thread import Command, Inbound, IoThread

TokenKey = tuple[str, str, int]
"""Link, request and attempt."""


class LateTokens:
    """Tokens of ended steps, with their times, which wait until one of their request must arrive: its first or last.

    Nothing depends on when the proxy gets the others. The network records when each token would have arrived, so that
    the client's records do not show the delay.
    """

    def __init__(self, network: Network, io: IoThread) -> None:
        self._network = network
        self._io = io
        self._unsent: dict[TokenKey, list[tuple[Tokens, Sequence[float]]]] = {}
        self._due: dict[TokenKey, None] = {}

    @property
    def due(self) -> bool:
        return bool(self._due)

    def put(self, link: str, bundle: Bundle, stamp: float) -> None:
        for tokens in bundle.tokens:
            self.put_many(link, tokens, (stamp,) * len(tokens.ids))

    def put_many(self, link: str, tokens: Tokens, stamps: Sequence[float]) -> None:
        """Tokens of several steps of one request, each with its time."""
        key = (link, tokens.request_id, tokens.attempt)
        self._unsent.setdefault(key, []).append((tokens, stamps))
        if tokens.finish or tokens.stages is not None:
            self._due[key] = None

    def flush(self) -> None:
        """Pass what is due to the I/O thread, which sends it at this instant."""
        due, self._due = self._due, {}
        bundles: dict[str, list[Tokens]] = {}
        for key in due:
            bundles.setdefault(key[0], []).append(self._joined(self._unsent.pop(key)))
        for link, tokens in bundles.items():
            self._io.send(link, Bundle(tokens=tuple(tokens)))

    def flush_all(self) -> None:
        self._due = dict.fromkeys(self._unsent)
        self.flush()

    def _joined(self, parts: list[tuple[Tokens, Sequence[float]]]) -> Tokens:
        first, last = parts[0][0], parts[-1][0]
        ids = tuple(chain.from_iterable(tokens.ids for tokens, _ in parts))
        stamps = list(chain.from_iterable(stamps for _, stamps in parts))
        self._network.note_late(first.request_id, first.index, stamps)
        stages = next((tokens.stages for tokens, _ in parts if tokens.stages is not None), None)
        return msgspec.structs.replace(first, ids=ids, finish=last.finish, stages=stages)


class DelayedIo:
    """The I/O thread as seen by the loop: calls that follow a step are delayed until the step has ended."""

    def __init__(self, io: IoThread, runner: SimRunner, network: Network) -> None:
        self.load = Load()
        self.late_tokens = LateTokens(network, io)
        self._io = io
        self._runner = runner
        self._after: list[Callable[[float], None]] = []

    @property
    def heartbeat_at(self) -> float:
        """Always due: the host reads the load after each turn."""
        return 0.0

    def report(self, load: Load, last_message_at: float) -> None:
        self._when_due(lambda _: self._report(load, last_message_at))

    def receive(self, wait_s: float) -> list[Inbound]:
        return self._io.receive(0.0)

    def do(self, command: Command) -> None:
        self._when_due(lambda _: self._io.do(command))

    def send(self, link: str, *messages: Message) -> None:
        if len(messages) == 1 and isinstance(bundle := messages[0], Bundle):
            self._after.append(lambda stamp: self.late_tokens.put(link, bundle, stamp))
        else:
            self._when_due(lambda _: self._send(link, *messages))

    def yield_gil(self, wait_s: float) -> None:
        """Does nothing: there is no thread."""

    @property
    def transfer_counters(self) -> TransferCounters:
        return self._io.transfer_counters

    def drain(self) -> None:
        self._io.drain()

    def step_is_over(self, stamp: float) -> None:
        """Pass on the delayed calls; the step ended at `stamp`."""
        self._runner.begin()
        due, self._after = self._after, []
        for call in due:
            call(stamp)

    def skipped(self, steps: int, tokens: int, free_blocks: int, began_at: float) -> None:
        """Report steps that no turn has made; the last of them began at `began_at`."""
        counted = self.load.counters
        more = {"steps": counted["steps"] + steps, "generated_tokens": counted["generated_tokens"] + tokens}
        counters, num_steps = {**counted, **more}, self.load.steps + steps
        load = msgspec.structs.replace(self.load, steps=num_steps, free_blocks=free_blocks, counters=counters)
        self._report(load, began_at)

    def _send(self, link: str, *messages: Message) -> None:
        if not all(isinstance(message, Reserved) for message in messages):
            self.late_tokens.flush_all()  # it may end the request
        self._io.send(link, *messages)

    def _report(self, load: Load, last_message_at: float) -> None:
        self.load = load
        self._io.report(load, last_message_at)

    def _when_due(self, call: Callable[[float], None]) -> None:
        if self._runner.step_s:
            self._after.append(call)
        else:
            call(0.0)


class DelayedJournal:
    """A block journal in which the blocks that a step computes appear when the step has ended."""

    def __init__(self, journal: BlockJournal, runner: SimRunner) -> None:
        self._journal = journal
        self._runner = runner
        self._after: list[tuple[Callable[[bytes], None], bytes]] = []

    def stored(self, block_hash: bytes) -> None:
        self._note(self._journal.stored, block_hash)

    def removed(self, block_hash: bytes) -> None:
        self._note(self._journal.removed, block_hash)

    def step_is_over(self) -> bool:
        """Whether the step had changed anything."""
        due, self._after = self._after, []
        for note, block_hash in due:
            note(block_hash)
        return bool(due)

    def _note(self, note: Callable[[bytes], None], block_hash: bytes) -> None:
        if self._runner.step_s:
            self._after.append((note, block_hash))
        else:
            note(block_hash)
