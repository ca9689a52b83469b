"""Which transfers a worker has, in each direction: live ones, ended ones that late messages name, and early grants.

A table only finds transfers: it advances no machine and sends nothing. Of an ended transfer it forgets nothing before
the time that its caller names, so that a repeated message is answered as the first was.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from baton.kvtransfer.planes.base import Plane
from baton.kvtransfer.protocol.receiver import Incoming, Receiver
from baton.kvtransfer.protocol.sender import Sender
from baton.node.leg import LegKey
from baton.node.messages.transfer import Grant

MAX_EARLY_GRANTS = 4096
PROMPT_LATE_S = 60.0
"""A grant waits at most so long for its prompt, which the worker's loop takes up after the step that it is at."""


@dataclass(slots=True)
class Sending:
    """A transfer to `peer`, live or ended."""

    leg: LegKey
    peer: str
    machine: Sender
    plane: Plane | None = None
    """Where something was posted: it says when that is over, even after the pair was forgotten."""


@dataclass(slots=True)
class Receiving:
    """A transfer from `peer`, live or ended."""

    peer: str
    machine: Receiver
    plane: Plane


@dataclass(frozen=True, slots=True)
class _EarlyGrant:
    """A grant that came before its prompt."""

    peer: str
    grant: Grant
    since: float


class SenderTable:
    """Transfers that this worker sends, by leg and by transfer id, and grants that came before their prompts."""

    def __init__(self) -> None:
        self.live: dict[LegKey, Sending] = {}
        self._by_leg: dict[LegKey, Sending] = {}
        self._by_transfer: dict[bytes, Sending] = {}  # those that were granted
        self._ended: deque[tuple[float, Sending]] = deque()  # remembered until then, in order
        self._early_grants: dict[LegKey, _EarlyGrant] = {}  # the oldest first
        self._early_legs: dict[bytes, LegKey] = {}  # of the same, by transfer id

    def add(self, sending: Sending) -> None:
        self._by_leg[sending.leg] = self.live[sending.leg] = sending

    def of_leg(self, leg: LegKey) -> Sending | None:
        return self._by_leg.get(leg)

    def of_transfer(self, transfer_id: bytes) -> Sending | None:
        return self._by_transfer.get(transfer_id)

    def bind(self, transfer_id: bytes, sending: Sending) -> None:
        """`sending` has this id from now on, unless another has it."""
        self._by_transfer.setdefault(transfer_id, sending)

    def end(self, sending: Sending, forget_at: float) -> None:
        """No longer live; call with times that do not decrease."""
        del self.live[sending.leg]
        self._ended.append((forget_at, sending))

    def forget_ended(self, now: float) -> None:
        while self._ended and now >= self._ended[0][0]:
            _, sending = self._ended.popleft()
            del self._by_leg[sending.leg]
            self._by_transfer.pop(sending.machine.transfer_id or b"", None)

    def keep_grant(self, leg: LegKey, peer: str, grant: Grant, now: float) -> None:
        """Keep it for the prompt that is still under way; of too many the oldest is dropped. Repeated: no effect."""
        known = self._early_grants.get(leg)
        if known is not None and (known.peer, known.grant) == (peer, grant):
            return
        self._drop_early(leg)
        while len(self._early_grants) >= MAX_EARLY_GRANTS:
            self._drop_early(next(iter(self._early_grants)))
        self._early_grants[leg] = _EarlyGrant(peer, grant, now)
        self._early_legs[grant.transfer_id] = leg

    def awaits_prompt(self, transfer_id: bytes, peer: str, now: float) -> bool:
        """Whether this peer granted the transfer and its prompt may still come."""
        leg = self._early_legs.get(transfer_id)
        early = self._early_grants.get(leg) if leg is not None else None
        return early is not None and early.peer == peer and now - early.since < PROMPT_LATE_S

    def take_grant(self, leg: LegKey, peer: str) -> Grant | None:
        """The grant that came early for this leg; None where it was of another peer, and is dropped."""
        early = self._drop_early(leg)
        return early.grant if early is not None and early.peer == peer else None

    def _drop_early(self, leg: LegKey) -> _EarlyGrant | None:
        early = self._early_grants.pop(leg, None)
        if early is not None:
            self._early_legs.pop(early.grant.transfer_id, None)
        return early


class ReceiverTable:
    """Transfers that this worker receives, by transfer id, and those whose peer has not said Hello yet."""

    def __init__(self) -> None:
        self.live: dict[bytes, Receiving] = {}
        self.waiting: dict[bytes, Incoming] = {}
        self._by_transfer: dict[bytes, Receiving] = {}
        self._ended: deque[tuple[float, Receiving]] = deque()  # remembered until then, in order

    def add(self, receiving: Receiving) -> None:
        transfer_id = receiving.machine.transfer_id
        self._by_transfer[transfer_id] = self.live[transfer_id] = receiving

    def of_transfer(self, transfer_id: bytes) -> Receiving | None:
        return self._by_transfer.get(transfer_id)

    def end(self, receiving: Receiving, forget_at: float) -> None:
        """No longer live; call with times that do not decrease."""
        del self.live[receiving.machine.transfer_id]
        self._ended.append((forget_at, receiving))

    def forget_ended(self, now: float) -> None:
        while self._ended and now >= self._ended[0][0]:
            _, receiving = self._ended.popleft()
            del self._by_transfer[receiving.machine.transfer_id]

    def waiting_for(self, peer: str) -> list[Incoming]:
        return [incoming for incoming in self.waiting.values() if incoming.peer == peer]

    def overdue(self, now: float) -> list[Incoming]:
        """Those that wait past their deadline."""
        return [incoming for incoming in self.waiting.values() if now >= incoming.deadline]
