"""The I/O thread of a worker: it owns the endpoint, the membership and the transfers, so that none of them waits for a
step of the model, and no step waits for them.

The worker's loop gives it work through `do` and `send`, and reads `inbox`. Messages are trusted by where they come
from: what a proxy may say is taken only from the links to proxies, everything else goes to the exchange as a peer's.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from baton.kvtransfer.blocks.events import FLUSH_EVERY_S, EventLog
from baton.kvtransfer.protocol.events import Event
from baton.kvtransfer.protocol.exchange import TransferExchange
from baton.kvtransfer.store.events import StoreEvent
from baton.node.counters import TransferCounters
from baton.node.line import Line
from baton.node.membership import Change, Membership
from baton.node.messages.base import Message
from baton.node.messages.control import Cancel, Drain, KvReplay, Load, LoadAdapter, Prefill, Registered, Reserve
from baton.worker.adapter_slots import AdapterRead
from baton.worker.constraint import GrammarCompiled

MAX_WAIT_S = 0.05
STOP_TIMEOUT_S = 5.0
NAP_S = 0.00005


@dataclass(frozen=True, slots=True)
class FromProxy:
    """A request, the end of one, or an order, over this link to a proxy."""

    link: str
    message: Prefill | Reserve | Cancel | Drain | LoadAdapter
    at: float
    """When it came in; the worker's loop takes it up between two steps."""


@dataclass(frozen=True, slots=True)
class Terminated:
    """The process got a signal to end."""


@dataclass(frozen=True, slots=True)
class IoThreadDied:
    """A bug: the worker cannot go on."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class RankLost:
    """A rank of this worker has died or is frozen: the worker cannot go on."""

    reason: str


Inbound = FromProxy | Terminated | IoThreadDied | RankLost | GrammarCompiled | AdapterRead | Event | Change | StoreEvent
Command = Callable[[TransferExchange, float], None]


class IoThread:
    """Receives, sends and transfers for one worker's loop, which calls it from the loop's own thread."""

    def __init__(
        self,
        endpoint: Line,
        membership: Membership,
        exchange: TransferExchange,
        events: EventLog,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.inbox: queue.SimpleQueue[Inbound] = queue.SimpleQueue()
        self._load, self._load_at = Load(), clock()
        self.turned_at = self._load_at
        """When the thread last turned."""
        self._kv_events = events
        self._flush_at = 0.0
        self._endpoint = endpoint
        self._membership = membership
        self._exchange = exchange
        self._clock = clock
        self._todo: deque[Command] = deque()
        self._outbox: deque[tuple[str, Message]] = deque()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="io", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def do(self, command: Command) -> None:
        """Run `command(exchange, now)` on the I/O thread, after all earlier ones."""
        self._todo.append(command)
        self._endpoint.wake()

    def send(self, link: str, *messages: Message) -> None:
        """Send messages to a proxy."""
        self._outbox.extend((link, message) for message in messages)
        self._endpoint.wake()

    def yield_gil(self, wait_s: float) -> None:
        """Leave the interpreter to the I/O thread until it has done what it was given, at most `wait_s` seconds."""
        end = self._clock() + wait_s
        while (self._todo or self._outbox) and self._thread.is_alive() and self._clock() < end:
            time.sleep(NAP_S)

    def receive(self, wait_s: float) -> list[Inbound]:
        """All that has come in, after waiting at most `wait_s` for the first of it."""
        events: list[Inbound] = []
        try:
            events.append(self.inbox.get(block=wait_s > 0, timeout=wait_s or None))
            while True:
                events.append(self.inbox.get_nowait())
        except queue.Empty:
            return events

    @property
    def unready(self) -> str:
        """See Membership."""
        return self._membership.unready

    @property
    def heartbeat_at(self) -> float:
        """When the next heartbeat is due: a load that is reported before goes out with it."""
        return self._membership.wake_at

    def report(self, load: Load, received_at: float) -> None:
        """The load for the next heartbeats; the loop last looked into its inbox before that at `received_at`."""
        self._load, self._load_at = load, received_at

    @property
    def transfer_counters(self) -> TransferCounters:
        return self._exchange.counters

    def terminate(self) -> None:
        """Say in heartbeats and to probes that this worker takes nothing new, and give the loop a Terminated, which it
        gets after its step. For a signal handler, which may have interrupted any method: it takes no lock."""
        self._membership.draining = True
        self.inbox.put(Terminated())

    def orphan(self) -> None:
        """Say in heartbeats that what started this worker is gone."""
        self._membership.orphaned = True

    def drain(self) -> None:
        """Say at once, and in each heartbeat from now on, that this worker takes nothing new."""
        self._membership.draining = True
        self._endpoint.wake()

    def stop(self) -> None:
        """Say goodbye, end the thread and close everything it owns."""
        self._stopping.set()
        self._endpoint.wake()
        self._thread.join(STOP_TIMEOUT_S)

    # -- the thread

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self.turn()
            for link, message in [*self._outbox, *self._membership.goodbyes()]:
                self._send(link, message)
            self._endpoint.linger()
        except BaseException as error:  # the worker's loop raises it
            self.inbox.put(IoThreadDied(error))
        finally:
            self._exchange.close()
            self._endpoint.close()

    def turn(self) -> None:
        """Wait for something to come in or fall due, and deal with it. The thread does nothing else."""
        wait_s = min(max(self.wake_at - self._clock(), 0.0), MAX_WAIT_S)
        inbound = self._endpoint.receive(wait_s, also=self._exchange.sockets)
        now = self.turned_at = self._clock()
        while self._outbox:  # clients wait for these; what follows may read whole chunks for their digests
            self._send(*self._outbox[0])
            self._outbox.popleft()  # only now: `yield_gil` looks whether there is more to do
        while self._todo:
            self._todo[0](self._exchange, now)
            self._todo.popleft()
        for peer, message in inbound:
            self._route(peer, message, now)
        self._exchange.tick(now)
        self._publish_events()
        self._flush_kv_events(now)
        self._membership.silent_peers = self._exchange.silent_peers
        messages, changes = self._membership.on_timer(
            now, self._load, load_age_s=max(0.0, now - self._load_at), kv_seq=self._kv_events.seq
        )
        for change in changes:
            self.inbox.put(change)
        for link, message in messages:
            self._send(link, message)

    def _send(self, link: str, message: Message) -> None:
        self._endpoint.send(link, self._membership.outgoing(link, message))

    @property
    def wake_at(self) -> float:
        """When the next turn is due, if nothing comes in."""
        now = self._clock()
        if self._todo or self._outbox:
            return now
        return min(self._membership.wake_at, self._exchange.wake_at(now))

    def _route(self, peer: str, message: Message, now: float) -> None:
        if peer not in self._membership.links:
            self._exchange.on_message(peer, message, now)
            return
        for change in self._membership.on_message(peer, message, now):
            self.inbox.put(change)
        if isinstance(message, Registered):
            for name, address in message.peers:
                self._exchange.meet(name, address, now)
        if isinstance(message, Prefill | Reserve | Cancel | Drain | LoadAdapter):
            self.inbox.put(FromProxy(peer, message, now))
        elif isinstance(message, KvReplay):
            for answer in self._kv_events.replay(message.seq):
                self._send(peer, answer)

    def _flush_kv_events(self, now: float) -> None:
        """Send new KV events to the proxies, which ask again for what is lost."""
        if now < self._flush_at:
            return
        self._flush_at = now + FLUSH_EVERY_S
        for batch in self._kv_events.flush():
            for link in self._membership.joined:
                self._send(link, batch)

    def _publish_events(self) -> None:
        for event in self._exchange.events:
            self.inbox.put(event)
        self._exchange.events.clear()
