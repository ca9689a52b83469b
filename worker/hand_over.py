"""Prompts that a worker computes for others: their transfers, and the leases on their blocks until these have ended.

A leg's transfer is opened when the prompt is taken on, blocks are offered as steps complete them, and with the first
token the leg is handed over: from then on its blocks are leased, under the leg's name, until the I/O thread says that
the transfer touches them no more. It plans no step and knows no order of prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.kvtransfer.protocol.events import SenderEnded
from baton.models.batch import Drawn
from baton.node.leg import LegKey
from baton.node.messages.control import Cancel, Failed, HandedOver, Prefill
from baton.worker.in_flight import InFlightStep, InFlightSteps, StepPart
from baton.worker.parts import Parts
from baton.worker.sequence import Sequence, cancel_matches, transfer_failed
from baton.worker.stopping import finish_of

HAND_OVER_S = 0.001
"""While the device is at a step, the loop leaves the interpreter to a hand-over so long before it launches the next."""


@dataclass(slots=True)
class _Sending:
    """A leg whose blocks the transfer still reads."""

    link: str
    awaited: bool
    """The proxy awaits the outcome."""


class HandOvers:
    """The prompts of one worker that go to others; `steps` are its launched ones."""

    def __init__(self, parts: Parts, steps: InFlightSteps) -> None:
        self._parts = parts
        self._steps = steps
        self._block_tokens = parts.layout.block_tokens
        self._sending: dict[LegKey, _Sending] = {}
        self._begun = False  # a hand-over, since `yield_gil` was called

    @property
    def idle(self) -> bool:
        """Whether no transfer reads a block any more."""
        return not self._sending

    def has(self, leg: LegKey) -> bool:
        """Whether the leg was computed, and its transfer has not ended."""
        return leg in self._sending

    def open(self, sequence: Sequence, message: Prefill) -> None:
        """The prompt was taken on."""
        leg, peer, address, deadline = sequence.leg, message.decode, message.decode_address, sequence.deadline
        self._parts.io.do(lambda exchange, now: exchange.open_sender(leg, peer, address, deadline, now))

    def begin_checksums(self, step: InFlightStep) -> None:
        """A step was launched that may complete blocks to be handed over."""
        completed = [block for part in step.parts if part.sequence.hands_over for block in self._completed(part)]
        if completed:
            step.read_checksums = self._parts.checksums.begin(completed)

    def _completed(self, part: StepPart) -> list[int]:
        """Blocks that are final when the step has computed this part, and were not before."""
        sequence, end, size = part.sequence, part.sequence.num_launched, self._block_tokens
        return sequence.table.blocks[(end - part.length) // size : None if end == sequence.num_tokens else end // size]

    def offer(self, sequence: Sequence, checksums: dict[int, bytes]) -> None:
        """A part of the prompt is computed: its full blocks are final."""
        self._offer_blocks(sequence, sequence.num_computed // self._block_tokens, checksums)

    def _offer_blocks(self, sequence: Sequence, num_blocks: int, checksums: dict[int, bytes]) -> None:
        leg, blocks = sequence.leg, tuple(sequence.table.blocks[:num_blocks])
        own = {block: checksums[block] for block in blocks if block in checksums}
        self._parts.io.do(lambda exchange, now: exchange.blocks_computed(leg, blocks, own, now))

    def complete(self, sequence: Sequence, token: Drawn, checksums: dict[int, bytes]) -> bool:
        """The prompt is computed: its first token goes to the proxy at once, and after the KV to the other worker.

        False if the token breaks the sequence's grammar: then nothing was sent."""
        (token_id,) = token.token_ids  # a prompt's last row is no draft: one token follows it
        logprob = token.logprobs[0] if token.logprobs else None
        num_blocks = len(sequence.table.blocks)
        sequence.append(token_id, logprob)
        if sequence.broke_grammar:
            return False
        finish = finish_of(
            token_id, sequence.sampling, sequence.num_generated, sequence.num_tokens, self._parts.max_model_len
        )
        stages = sequence.times.prefilled(self._parts.clock())
        self._parts.io.send(sequence.link, sequence.unsent_tokens(finish, stages))
        if finish:
            self._cancel_sender(sequence.leg, "finished at its first token")
        else:
            leg = sequence.leg
            self._offer_blocks(sequence, num_blocks, checksums)
            self._parts.io.do(lambda exchange, now: exchange.token_drawn(leg, token_id, logprob, now))
        self._parts.prefixes.used(sequence)
        self._lease(sequence, awaited=not finish)
        self._begun = True
        return True

    def yield_gil(self) -> None:
        """Called when a step was taken in: leave the interpreter to the hand-overs that it has begun, if another step
        keeps the device busy meanwhile."""
        if self._begun and self._steps:
            self._parts.io.yield_gil(HAND_OVER_S)
        self._begun = False

    def give_up(self, sequence: Sequence) -> None:
        """The leg ends before its prompt was computed."""
        self._cancel_sender(sequence.leg, "cancelled")
        self._lease(sequence, awaited=False)

    def cancel(self, link: str, message: Cancel) -> None:
        """End what the message names of the link's transfers."""
        for leg, sending in self._sending.items():
            if sending.awaited and sending.link == link and cancel_matches(message, leg):
                sending.awaited = False
                self._cancel_sender(leg, "cancelled")

    def proxy_lost(self, link: str) -> None:
        """The proxy at that link awaits nothing more."""
        for leg, sending in self._sending.items():
            if sending.awaited and sending.link == link:
                self._cancel_sender(leg, "this worker lost its proxy")

    def on_ended(self, event: SenderEnded) -> None:
        """The transfer of a computed prompt has ended."""
        if (sending := self._sending.pop(event.leg, None)) is not None:
            self._parts.manager.end_lease(_lease_key(event.leg))
            if sending.awaited:
                self._parts.io.send(sending.link, self._outcome(event))

    def _outcome(self, event: SenderEnded) -> HandedOver | Failed:
        if not event.ok:
            return transfer_failed(event.leg, event.reason)
        return HandedOver(
            request_id=event.leg.request_id,
            attempt=event.leg.attempt,
            sent_bytes=event.sent_blocks * self._parts.layout.block_bytes,
            transfer_s=event.transfer_s,
        )

    def _lease(self, sequence: Sequence, *, awaited: bool) -> None:
        """Its blocks are leased until SenderEnded, and kept until no step computes it."""
        self._parts.manager.lease(sequence.table.blocks, _lease_key(sequence.leg))
        self._sending[sequence.leg] = _Sending(sequence.link, awaited)
        self._steps.release(sequence)

    def _cancel_sender(self, leg: LegKey, reason: str) -> None:
        self._parts.io.do(lambda exchange, now: exchange.cancel_sender(leg, reason, now))


def _lease_key(leg: LegKey) -> bytes:
    return f"{leg.request_id}/{leg.attempt}".encode()
