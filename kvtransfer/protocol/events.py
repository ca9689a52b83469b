"""What the transfers of a worker report to its loop: each ends in one of these, when its blocks are touched no more."""

from __future__ import annotations

from dataclasses import dataclass

from baton.node.leg import LegKey
from baton.node.messages.control import Logprob


@dataclass(frozen=True, slots=True)
class SenderEnded:
    """The sent blocks are touched no more."""

    leg: LegKey
    ok: bool
    reason: str
    sent_blocks: int
    transfer_s: float


@dataclass(frozen=True, slots=True)
class KvArrived:
    """Every block of the transfer has arrived and is verified."""

    transfer_id: bytes
    token_id: int
    logprob: Logprob | None
    at: float
    """When that was, on this worker's clock."""
    wait_s: float
    """Since prefill drew the first token: nothing was in motion."""
    transfer_s: float
    """After that, until it had arrived."""


@dataclass(frozen=True, slots=True)
class ReceiverEnded:
    """A transfer ended without arriving; its blocks are touched no more."""

    transfer_id: bytes
    reason: str
    cancelled: bool = False
    """One of the two sides called it off, and nothing went wrong: that side answers for it."""


Event = SenderEnded | KvArrived | ReceiverEnded
