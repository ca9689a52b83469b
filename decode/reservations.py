"""Sequences whose KV another worker computes and sends: their blocks are held, and a transfer fills them.

A reservation ends once: its KV has arrived, the transfer has ended without it, or it is cancelled. Blocks that a
transfer may still write into are quarantined until the I/O thread says that it has ended.
"""

from __future__ import annotations

import secrets

from baton.kvtransfer.protocol.events import KvArrived, ReceiverEnded
from baton.kvtransfer.protocol.receiver import Incoming
from baton.worker.parts import Parts
from baton.worker.sequence import Sequence


class Reservations:
    """The transfers to one worker that are expected or on their way."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.by_transfer: dict[bytes, Sequence] = {}  # by transfer id

    def __len__(self) -> int:
        return len(self.by_transfer)

    def open(self, sequence: Sequence, prefill: str) -> None:
        """Let worker `prefill` fill the blocks of `sequence` behind its cached prefix."""
        table = sequence.table
        first_missing = sequence.cached_tokens // self._parts.layout.block_tokens
        incoming = Incoming(
            transfer_id=secrets.token_bytes(16),
            leg=sequence.leg,
            peer=prefill,
            first_block=first_missing,
            blocks=tuple(table.blocks[first_missing:]),
            deadline=sequence.deadline,
        )
        sequence.incoming = incoming
        self.by_transfer[incoming.transfer_id] = sequence
        self._parts.io.do(lambda exchange, now: exchange.open_receiver(incoming, now))

    def cancel(self, sequence: Sequence, incoming: Incoming) -> None:
        """Its blocks go back; those of the transfer when that has ended."""
        transfer_id = incoming.transfer_id
        del self.by_transfer[transfer_id]
        sequence.table.quarantine_from(incoming.first_block, transfer_id)
        self._parts.io.do(lambda exchange, now: exchange.cancel_receiver(transfer_id, "cancelled", now))

    def arrived(self, event: KvArrived) -> Sequence | None:
        """The sequence that has its blocks now. None: it was cancelled while the last bytes came; nothing writes into
        its blocks any more."""
        sequence = self.by_transfer.pop(event.transfer_id, None)
        if sequence is None:
            self._parts.manager.end_quarantine(event.transfer_id)
            return None
        sequence.incoming = None
        return sequence

    def ended(self, event: ReceiverEnded) -> Sequence | None:
        """The sequence whose KV does not come; None: it was cancelled before."""
        self._parts.manager.end_quarantine(event.transfer_id)
        sequence = self.by_transfer.pop(event.transfer_id, None)
        if sequence is not None:
            sequence.incoming = None
        return sequence
