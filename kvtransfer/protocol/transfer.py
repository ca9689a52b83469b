"""One request's KV in motion: the two halves of the transfer protocol, as state machines without IO.

A machine is called with what happened (`on_message`, `on_io_done`, `on_timer`, ...) and returns what is to be done: a
list of actions for the owner of the sockets and the plane. It reads no clock, holds no socket and touches no block.

    Sender (prefill)                                   Receiver (decode)
      opened, computing        <── Grant ──────────      blocks held, receive-side lease begins
                               ─── Renewed ────────►     where there is nothing to offer yet
      blocks computed          ─── Offer(seq) ─────►     (held back while `window` chunks are in flight)
                               <── Renew ──────────      every quarter of the lease
      computing, or sending    ─── Renewed ────────►     ... and answered, so the link is not cut
      PostSend                 <── Accept(seq) ────      PostReceive first, then the credit
      bytes                    ═════════════════════►    copied, digest compared; on a mismatch one Accept(seq, retry)
                               <── Validate(seq) ──      only on planes that pull: the copy is over
                               ─── Valid(seq) ─────►     ... and the lease held, so the chunk has landed
      last block, first token  ─── Finish ─────────►
                               <── Ack ────────────      all landed: Arrived, decoding may begin
      CancelIo .. Ended

Rules that make it hold:
- The receiver writes its own memory, so it alone decides when its blocks are free: after CancelIo and `on_idle`.
- A waiting peer retransmits its last message; every handler is idempotent; a transfer ends at its deadline or before.
- A receiver that hears nothing for `stall_renewals` renewals gives up, and so does one whose accepted chunks do not
  land while no other chunk of the peer does. It counts renewals, not seconds: a process that stood still itself blames
  no peer for that.
- The sender's lease ends `lease_s` after the receiver's last message; it never says Valid after that.
- Abort may come from either side at any time and is answered with Aborted, also by a peer that never knew the
  transfer. It is sent once: a peer that missed it retransmits or renews something, and is answered with it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from baton.kvtransfer.planes.base import ChunkKey
from baton.node.messages.base import Message
from baton.node.messages.control import Logprob

POLL_S = 0.001


@dataclass(frozen=True, slots=True)
class Timing:
    """The durations of the protocol, in seconds."""

    lease_s: float = 3.0
    resend_s: float = 0.05
    """First repetition of an unanswered message; doubles up to `resend_max_s`."""
    resend_max_s: float = 1.0
    stall_renewals: int = 4
    """Renewals in a row without an answer, or without a landed chunk, after which a transfer is given up."""
    chunk_s: float = 10.0
    """An accepted chunk must have landed by then."""
    forget_s: float = 20.0
    """How long an ended transfer is remembered, to answer late messages."""
    poll_s: float = POLL_S
    """When to poll a plane again that has no readable socket, while transfers are live."""

    @property
    def renew_s(self) -> float:
        """Between two renewals of a lease."""
        return self.lease_s / 4


@dataclass(frozen=True, slots=True)
class SendMessage:
    """Send `message` to the peer."""

    message: Message


@dataclass(frozen=True, slots=True)
class PostSend:
    key: ChunkKey
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PostReceive:
    key: ChunkKey
    source: tuple[int, ...]
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CancelIo:
    """Stop the plane's operations of this transfer, and call `on_idle` as soon as none can touch a block."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """Receiver: every block is there and verified. The blocks belong to the sequence from now on."""

    token_id: int
    logprob: Logprob | None
    wait_s: float
    """Since the first token was drawn: nothing was in motion."""
    transfer_s: float
    """After that, until now."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The last action of a machine, once: its blocks are touched no more. `ok`: the KV was handed over whole."""

    ok: bool
    reason: str = ""
    cancelled: bool = False
    """Not ok, but nothing went wrong: it was not needed any more."""


Action = SendMessage | PostSend | PostReceive | CancelIo | Arrived | Ended
DigestsOf = Callable[[Sequence[Sequence[int]]], list[bytes]]
"""Of several chunks, each given by its blocks: a GPU is asked once for all."""


class State(Enum):
    OPEN = auto()
    DONE = auto()
    """Handed over; late messages are still answered."""
    STOPPING = auto()
    """CancelIo was asked for; blocks may still be touched."""
    CLOSED = auto()


@dataclass(slots=True)
class Repeater:
    """When to say something again: first after `resend_s`, then doubling."""

    timing: Timing
    at: float = float("inf")
    pause_s: float = 0.0

    def start(self, now: float) -> None:
        self.pause_s = self.timing.resend_s
        self.at = now + self.pause_s

    def due(self, now: float) -> bool:
        if now < self.at:
            return False
        self.pause_s = min(self.pause_s * 2, self.timing.resend_max_s)
        self.at = now + self.pause_s
        return True
