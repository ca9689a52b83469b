"""All transfers of one worker: passes messages, ended movements and timers to the machines of the transfers.

It carries out what the machines of `transfer.py` ask for. It has no thread and no clock: the I/O thread passes it
messages and the current time. A worker may send and receive. Blocks are only numbers here; their owners are known to
the block manager, in another thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain

from baton.kvtransfer.planes.base import IoDone, Plane
from baton.kvtransfer.protocol.events import Event, KvArrived, ReceiverEnded, SenderEnded
from baton.kvtransfer.protocol.pairs import Pairs, PeerTransport
from baton.kvtransfer.protocol.receiver import Incoming, Receiver
from baton.kvtransfer.protocol.sender import Sender
from baton.kvtransfer.protocol.tables import ReceiverTable, Receiving, SenderTable, Sending
from baton.kvtransfer.protocol.transfer import (
    POLL_S,
    Action,
    Arrived,
    CancelIo,
    DigestsOf,
    Ended,
    PostReceive,
    PostSend,
    SendMessage,
    State,
    Timing,
)
from baton.node.counters import TransferCounters
from baton.node.errors import SettingsError
from baton.node.leg import LegKey
from baton.node.messages.base import Message
from baton.node.messages.control import Logprob, Refused
from baton.node.messages.transfer import (
    Abort,
    Aborted,
    Accept,
    Ack,
    Finish,
    Grant,
    Hello,
    Offer,
    Renew,
    Renewed,
    Valid,
    Validate,
    Welcome,
)

LOOK_AT_PAIRS_S = 30.0


@dataclass(frozen=True, slots=True)
class ChunkLimits:
    """How large a chunk may be, and how many of a transfer are in flight."""

    blocks: int
    """Most blocks in an offer."""
    pulled_blocks: int = 0
    """The same where the receiver pulls, if that is more."""
    window: int = 8
    """Most chunks of a transfer that are accepted and have not landed."""


class TransferExchange:
    """All transfers of one worker, in both directions."""

    def __init__(
        self,
        identity: str,
        namespace: bytes,
        planes: Sequence[Plane],
        digests_of: DigestsOf,
        wire: PeerTransport,
        chunks: ChunkLimits,
        timing: Timing | None = None,
    ) -> None:
        """`planes` come in the order of preference."""
        self.counters = TransferCounters()
        self.events: list[Event] = []
        self._planes = tuple(planes)
        self._digests_of = digests_of
        self._wire = wire
        self._chunks = chunks
        self._timing = timing or Timing()
        self._pairs = Pairs(identity, namespace, planes, wire)
        self._senders = SenderTable()
        self._receivers = ReceiverTable()
        self._lost: list[str] = []
        self._look_at_pairs_at = 0.0

    def meet(self, peer: str, address: str, now: float) -> None:
        """Make the pair with a worker to which KV may go later. Called by the I/O thread."""
        with suppress(SettingsError):  # a transfer to it will end with the reason
            self._pairs.meet(peer, address, now)

    # ---- called by the worker's loop

    def open_sender(self, leg: LegKey, peer: str, address: str, deadline: float, now: float) -> None:
        """A prompt will be computed whose KV goes to `peer` at `address`."""
        if self._senders.of_leg(leg) is not None:  # a replay of a leg whose transfer has ended
            self.events.append(SenderEnded(leg, False, "this leg was sent before", 0, 0.0))
            return
        chunk = partial(self._chunk_of, peer)
        machine = Sender(self._digests_of, chunk_blocks=chunk, timing=self._timing, now=now, deadline=deadline)
        sending = Sending(leg, peer, machine)
        self._senders.add(sending)
        try:
            self._pairs.greet(peer, address, now)
        except SettingsError as error:  # the address is a peer's text, and may be none
            self._run_sender(sending, sending.machine.abort(str(error), now), now)
            return
        if (grant := self._senders.take_grant(leg, peer)) is not None:
            self._on_grant(peer, grant, now)

    def _chunk_of(self, peer: str) -> int:
        """Most blocks in an offer: what is sent must come in time over any link, what is pulled costs messages."""
        plane = self._pairs.plane_of(peer)
        pulled = plane is not None and plane.pulls
        return max(self._chunks.blocks, self._chunks.pulled_blocks) if pulled else self._chunks.blocks

    def blocks_computed(self, leg: LegKey, blocks: Sequence[int], sums: Mapping[int, bytes], now: float) -> None:
        """The first len(blocks) blocks of the sequence are final. `sums`: checksums known already, by block."""
        if (sending := self._senders.of_leg(leg)) is not None:
            self._run_sender(sending, sending.machine.on_blocks(blocks, sums, now), now)

    def token_drawn(self, leg: LegKey, token_id: int, logprob: Logprob | None, now: float) -> None:
        """All blocks are final; the first token goes after them."""
        if (sending := self._senders.of_leg(leg)) is not None:
            self._run_sender(sending, sending.machine.on_token(token_id, logprob, now), now)

    def cancel_sender(self, leg: LegKey, reason: str, now: float) -> None:
        """This KV is not needed any more. SenderEnded follows when nothing reads its blocks."""
        if (sending := self._senders.of_leg(leg)) is not None:
            self._run_sender(sending, sending.machine.abort(reason, now, cancelled=True), now)

    def open_receiver(self, incoming: Incoming, now: float) -> None:
        plane = self._pairs.plane_of(incoming.peer)
        if plane is None:
            self._receivers.waiting[incoming.transfer_id] = incoming
            return
        machine = Receiver(
            incoming,
            self._digests_of,
            self._pairs.landings(incoming.peer),
            pulls=plane.pulls,
            window=self._chunks.window,
            timing=self._timing,
        )
        receiving = Receiving(incoming.peer, machine, plane)
        self._receivers.add(receiving)
        self._run_receiver(receiving, machine.start(now), now)

    def cancel_receiver(self, transfer_id: bytes, reason: str, now: float) -> None:
        """This KV is not needed any more. ReceiverEnded follows when nothing writes to its blocks."""
        if (
            not self._end_waiting(transfer_id, reason)
            and (receiving := self._receivers.of_transfer(transfer_id)) is not None
        ):
            self._run_receiver(receiving, receiving.machine.abort(reason, now, cancelled=True), now)

    def _end_waiting(self, transfer_id: bytes, reason: str) -> bool:
        if self._receivers.waiting.pop(transfer_id, None) is None:
            return False
        self.events.append(ReceiverEnded(transfer_id, reason))
        return True

    # ---- called for messages

    def on_message(self, peer: str, message: Message, now: float) -> None:
        """A message of another worker. What fits no transfer of this peer's is answered or dropped, never raised."""
        match message:
            case Hello():
                self._on_hello(peer, message, now)
            case Welcome():
                self.counters.unexpected_messages += not self._pairs.on_welcome(peer, message, now)
            case Refused():
                self.counters.pairs_refused += 1
                self._lose(peer, f"refused: {message.reason}", now)
            case Grant():
                self._on_grant(peer, message, now)
            case Renew():
                for transfer_id in message.transfer_ids:
                    self._on_renew(peer, transfer_id, message, now)
            case Accept() | Validate() | Ack():
                if not self._to_sender(peer, message.transfer_id, message, now):
                    self._wire.send(peer, Abort(transfer_id=message.transfer_id, reason="unknown transfer"))
            case Offer() | Valid() | Finish() | Renewed():
                if not self._to_receiver(peer, message.transfer_id, message, now):
                    self._wire.send(peer, Abort(transfer_id=message.transfer_id, reason="unknown transfer"))
            case Abort() | Aborted():
                known = self._to_sender(peer, message.transfer_id, message, now) or self._to_receiver(
                    peer, message.transfer_id, message, now
                )
                if not known and isinstance(message, Abort):
                    self._wire.send(peer, Aborted(transfer_id=message.transfer_id))
            case _:
                self.counters.unexpected_messages += 1

    def tick(self, now: float) -> None:
        """Advance the planes and every timer that is due."""
        for plane in self._planes:
            while ended := plane.poll():  # what ended makes room for more, which may end at once
                for done in ended:
                    self._on_io_done(done, now)
        for sending in list(self._senders.live.values()):
            self._tick_sender(sending, now)
        for peer in self._pairs.tend(now):
            self._end_senders(peer, "the decode worker does not answer", now)
        for receiving in list(self._receivers.live.values()):
            self._tick_receiver(receiving, now)
        self._senders.forget_ended(now)
        self._receivers.forget_ended(now)
        self._forget_idle_pairs(now)
        for incoming in self._receivers.overdue(now):
            self._end_waiting(incoming.transfer_id, "the prefill worker never said hello")
        while self._lost:
            self._lose(self._lost.pop(), "peer lost", now)

    def wake_at(self, now: float) -> float:
        """When `tick` must be called at the latest, if nothing else happens."""
        pending = any(plane.pending for plane in self._planes)
        if not self.in_motion:  # most of the time of most workers
            return now + POLL_S if pending else float("inf")
        soon = (
            pending
            or any(s.machine.state is State.STOPPING for s in self._senders.live.values())
            or any(r.machine.state is State.STOPPING for r in self._receivers.live.values())
        )
        times = chain(
            (s.machine.wake_at for s in self._senders.live.values()),
            (r.machine.wake_at for r in self._receivers.live.values()),
            (i.deadline for i in self._receivers.waiting.values()),
            (self._pairs.due_at,),
            (now + self._timing.poll_s,) if soon else (),
        )
        return min(times, default=float("inf"))

    @property
    def in_motion(self) -> int:
        """Transfers that still hold blocks."""
        return len(self._receivers.waiting) + len(self._senders.live) + len(self._receivers.live)

    @property
    def silent_peers(self) -> tuple[str, ...]:
        """Decode workers that do not answer this one."""
        return self._pairs.silent()

    @property
    def sockets(self) -> list[object]:
        """What to wait on besides the endpoint."""
        return [socket for plane in self._planes for socket in plane.sockets()]

    def close(self) -> None:
        for plane in self._planes:
            plane.close()

    # ---- pairs

    def _on_hello(self, peer: str, hello: Hello, now: float) -> None:
        if not self._pairs.on_hello(peer, hello, now):
            self.counters.pairs_refused += 1
            return
        for incoming in self._receivers.waiting_for(peer):
            del self._receivers.waiting[incoming.transfer_id]
            self.open_receiver(incoming, now)

    def _lose(self, peer: str, reason: str, now: float) -> None:
        """End everything that involves `peer`."""
        self._end_senders(peer, reason, now)
        for incoming in self._receivers.waiting_for(peer):
            self._end_waiting(incoming.transfer_id, reason)
        for receiving in [r for r in self._receivers.live.values() if r.peer == peer]:
            self._run_receiver(receiving, receiving.machine.abort(reason, now), now)
        self._pairs.forget(peer)

    def _end_senders(self, peer: str, reason: str, now: float) -> None:
        for sending in [s for s in self._senders.live.values() if s.peer == peer]:
            self._run_sender(sending, sending.machine.abort(reason, now), now)

    def _forget_idle_pairs(self, now: float) -> None:
        if now < self._look_at_pairs_at:
            return
        self._look_at_pairs_at = now + LOOK_AT_PAIRS_S
        busy = {s.peer for s in self._senders.live.values()} | {r.peer for r in self._receivers.live.values()}
        for peer in set(self._pairs.idle(now)) - busy:
            self._lose(peer, "idle", now)
            self._wire.disconnect(peer)

    # ---- machines

    def _on_io_done(self, done: IoDone, now: float) -> None:
        transfer_id = done.key.transfer_id
        if done.sending and (sending := self._senders.of_transfer(transfer_id)) is not None:
            self._run_sender(sending, sending.machine.on_io_done(done.key, done.ok, now), now)
        elif not done.sending and (receiving := self._receivers.of_transfer(transfer_id)) is not None:
            self._run_receiver(receiving, receiving.machine.on_io_done(done.key, done.ok, now, done.digest), now)

    def _on_grant(self, peer: str, grant: Grant, now: float) -> None:
        leg = LegKey(grant.request_id, grant.attempt)
        sending = self._senders.of_leg(leg)
        if sending is None:  # the proxy's Prefill is still under way
            self._senders.keep_grant(leg, peer, grant, now)
            if self._senders.awaits_prompt(grant.transfer_id, peer, now):
                self._wire.send(peer, Renewed(transfer_id=grant.transfer_id))
        elif sending.peer == peer:
            self._senders.bind(grant.transfer_id, sending)
            self._run_sender(sending, sending.machine.on_message(grant, now), now)
        else:
            self.counters.unexpected_messages += 1

    def _on_renew(self, peer: str, transfer_id: bytes, renew: Renew, now: float) -> None:
        """It may come before the prompt, which waits for the worker's step: the transfer is known by its grant then."""
        if self._to_sender(peer, transfer_id, renew, now):
            return
        if self._senders.awaits_prompt(transfer_id, peer, now):
            self._wire.send(peer, Renewed(transfer_id=transfer_id))
        else:
            self._wire.send(peer, Abort(transfer_id=transfer_id, reason="unknown transfer"))

    def _to_sender(self, peer: str, transfer_id: bytes, message: Message, now: float) -> bool:
        sending = self._senders.of_transfer(transfer_id)
        if sending is None or sending.peer != peer or sending.machine.transfer_id != transfer_id:
            return False
        if isinstance(message, Accept) and self._pairs.plane_of(peer) is None:
            return True  # it has overtaken the Welcome that says over which plane; it will be repeated
        self._run_sender(sending, sending.machine.on_message(message, now), now)
        return True

    def _to_receiver(self, peer: str, transfer_id: bytes, message: Message, now: float) -> bool:
        receiving = self._receivers.of_transfer(transfer_id)
        if receiving is None or receiving.peer != peer:
            return False
        self._run_receiver(receiving, receiving.machine.on_message(message, now), now)
        return True

    def _run_sender(self, sending: Sending, actions: list[Action], now: float) -> None:
        plane = self._pairs.plane_of(sending.peer)
        transfer_id = sending.machine.transfer_id
        for action in actions:
            match action:
                case SendMessage():
                    self._wire.send(sending.peer, action.message)
                case PostSend() if plane is not None:
                    sending.plane = plane
                    plane.post_send(sending.peer, action.key, action.blocks)
                case CancelIo():
                    if sending.plane is not None and transfer_id is not None:
                        sending.plane.cancel(transfer_id)
                    self._settle_sender(sending, now)
                case Ended():
                    self._sender_ended(sending, action, now)

    def _settle_sender(self, sending: Sending, now: float) -> None:
        plane, transfer_id = sending.plane, sending.machine.transfer_id
        if plane is None or transfer_id is None or plane.idle(transfer_id):
            self._run_sender(sending, sending.machine.on_idle(now), now)

    def _sender_ended(self, sending: Sending, ended: Ended, now: float) -> None:
        self._senders.end(sending, now + self._timing.forget_s)
        transfer_s = now - sending.machine.started_at if ended.ok else 0.0
        if ended.ok:
            self.counters.transfers_sent += 1
            self.counters.sent_blocks += sending.machine.offered_blocks
            self.counters.transfer_seconds += transfer_s
        else:
            self._count_end(ended)
        self.events.append(SenderEnded(sending.leg, ended.ok, ended.reason, sending.machine.offered_blocks, transfer_s))

    def _count_end(self, ended: Ended) -> None:
        if ended.cancelled:
            self.counters.transfers_cancelled += 1
        else:
            self.counters.transfers_failed += 1

    def _run_receiver(self, receiving: Receiving, actions: list[Action], now: float) -> None:
        plane, transfer_id = receiving.plane, receiving.machine.transfer_id
        for action in actions:
            match action:
                case SendMessage():
                    if not self._wire.send(receiving.peer, action.message):
                        self._lost.append(receiving.peer)
                case PostReceive():
                    self.counters.digest_retries += action.key.retry > 0
                    plane.post_receive(receiving.peer, action.key, action.source, action.blocks)
                case CancelIo():
                    plane.cancel(transfer_id)
                    self._settle_receiver(receiving, now)
                case Arrived():
                    self._receiver_over(receiving, now)
                    self.counters.transfers_received += 1
                    self.counters.received_blocks += receiving.machine.num_blocks
                    arrived = action.token_id, action.logprob, now, action.wait_s, action.transfer_s
                    self.events.append(KvArrived(transfer_id, *arrived))
                case Ended():
                    self._receiver_over(receiving, now)
                    self._count_end(action)
                    self.events.append(ReceiverEnded(transfer_id, action.reason, action.cancelled))

    def _settle_receiver(self, receiving: Receiving, now: float) -> None:
        if receiving.plane.idle(receiving.machine.transfer_id):
            self._run_receiver(receiving, receiving.machine.on_idle(now), now)

    def _receiver_over(self, receiving: Receiving, now: float) -> None:
        self._receivers.end(receiving, now + self._timing.forget_s)

    def _tick_sender(self, sending: Sending, now: float) -> None:
        if sending.machine.state is State.STOPPING:
            self._settle_sender(sending, now)
        elif now >= sending.machine.wake_at:
            self._run_sender(sending, sending.machine.on_timer(now), now)

    def _tick_receiver(self, receiving: Receiving, now: float) -> None:
        if receiving.machine.state is State.STOPPING:
            self._settle_receiver(receiving, now)
        elif now >= receiving.machine.wake_at:
            self._run_receiver(receiving, receiving.machine.on_timer(now), now)
