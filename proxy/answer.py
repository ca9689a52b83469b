"""What the messages of an attempt's legs mean: new tokens for the client, a leg that has ended, or the attempt's end.

One answer is read over all attempts. Nothing late is accepted: the ledger takes only the next tokens, and only of the
current attempt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from baton.node.errors import DeadlineExceeded
from baton.node.messages.control import (
    Busy,
    Cancelled,
    Failed,
    HandedOver,
    PromptLogprobs,
    Reserved,
    Tokens,
)
from baton.proxy.attempt import AttemptFailed, AttemptLegs
from baton.proxy.control import LegMessage
from baton.proxy.interface import Delta
from baton.proxy.metrics.timeline import Timeline
from baton.proxy.routing.ledger import Gap, Ledger
from baton.proxy.scaling.objectives import ScaleMonitor
from baton.proxy.session_host import WorkerLost


class AnswerReader:
    """Reads workers' messages into deltas and keeps the ledger. Its latencies go to the model's monitor."""

    def __init__(
        self,
        request_id: str,
        ledger: Ledger,
        timeline: Timeline,
        latency: ScaleMonitor,
        clock: Callable[[], float],
    ) -> None:
        self._request_id = request_id
        self._ledger = ledger
        self._timeline = timeline
        self._latency = latency
        self._clock = clock
        self._cached_tokens = 0
        self._first_token_at = self._last_token_at = 0.0

    def begin(self) -> None:
        """The request waits for its first token."""
        self._latency.begin(self._request_id, self._clock())

    def end(self) -> None:
        """The request has ended, in whatever way."""
        num_tokens = len(self._ledger.accepted) if self._last_token_at else 0
        decoding_s = self._last_token_at - self._first_token_at
        self._latency.end(self._request_id, num_tokens, decoding_s, self._clock())

    def on_message(self, legs: AttemptLegs, worker: str, message: LegMessage) -> Delta | None:
        """What is new for the client. Raises AttemptFailed where another attempt is needed, and DeadlineExceeded."""
        if message.attempt != legs.number or not legs.has(worker):
            return None
        match message:
            case Tokens():
                return self._on_tokens(legs, worker, message)
            case PromptLogprobs():
                return self._on_prompt_logprobs(legs, worker, message)
            case HandedOver():
                if self._ledger.awaits_prompt:
                    raise AttemptFailed("log probabilities of the prompt are missing", worker, counts=True)
                self._timeline.handed_over(message.sent_bytes, message.transfer_s)
                legs.transfer_ended(ok=True)
                legs.settle(worker)
            case Cancelled():
                legs.settle(worker)
            case Busy():
                legs.settle(worker)
                raise AttemptFailed(f"{worker} is busy: {message.reason}", worker, counts=False, counter="busy_total")
            case Failed():
                legs.settle(worker)
                if not (worker == legs.prefill and self._has_prompt(legs)):
                    _fail(legs, worker, message)
            case Reserved():
                pass
        return None

    def on_lost(self, legs: AttemptLegs, lost: WorkerLost) -> None:
        """Raises AttemptFailed where the attempt needs that worker."""
        if not legs.owes(lost.worker):
            return
        legs.cancel(lost.worker)
        if lost.worker == legs.prefill and self._has_prompt(legs):
            return
        raise AttemptFailed(f"{lost.worker} was lost: {lost.reason}", lost.worker, counts=True)

    def _has_prompt(self, legs: AttemptLegs) -> bool:
        """The prefill leg is not needed any more."""
        return legs.decoding and not self._ledger.awaits_prompt

    def _on_prompt_logprobs(self, legs: AttemptLegs, worker: str, message: PromptLogprobs) -> Delta | None:
        if worker != legs.computes:
            return None
        try:
            entries = self._ledger.accept_prompt(message)
        except Gap as gap:
            raise AttemptFailed(str(gap), worker, counts=True) from None
        early: list[Tokens] = []
        if not self._ledger.awaits_prompt:
            early, legs.early = legs.early, early
        deltas = [delta for each in early if (delta := self._on_tokens(legs, legs.decode, each)) is not None]
        if not entries and not deltas:
            return None
        return Delta(
            tuple(token for delta in deltas for token in delta.ids),
            tuple(logprob for delta in deltas for logprob in delta.logprobs),
            self._ledger.finish,
            self._cached_tokens,
            entries,
        )

    def _on_tokens(self, legs: AttemptLegs, worker: str, message: Tokens) -> Delta | None:
        ledger = self._ledger
        legs.decoding = legs.decoding or worker == legs.decode
        if ledger.awaits_prompt:
            if worker == legs.computes:  # its entries came over the same link, before
                raise AttemptFailed("log probabilities of the prompt are missing", worker, counts=True)
            legs.early.append(message)
            return None
        if not ledger.accepted:
            self._cached_tokens = message.cached_tokens
            if not self._first_token_at:
                self._first_token_at = self._clock()
                computed = len(ledger.prompt_ids) - message.cached_tokens
                self._latency.first_token(self._request_id, computed, self._first_token_at)
        if worker == legs.computes:
            legs.prompt_computed(len(ledger.prompt_ids), message.cached_tokens)
        try:
            ids, logprobs = ledger.accept(message)
        except Gap as gap:
            raise AttemptFailed(str(gap), worker, counts=True) from None
        if message.finish:
            self._last_token_at = self._clock()
            legs.settle(worker)
        if not ids and not ledger.finish:
            return None
        if message.stages is not None:
            self._timeline.report(message.stages)
        accepted = min(message.accepted_prediction, len(ids))
        return Delta(ids, logprobs, message.finish, self._cached_tokens, accepted_prediction=accepted)


def _fail(legs: AttemptLegs, worker: str, message: Failed) -> NoReturn:
    """Raises what a failed leg means for the request."""
    if message.retryable and message.transfer and legs.prefill:
        legs.transfer_ended(ok=False)
        pair = legs.prefill, legs.decode
        raise AttemptFailed(f"{worker}: {message.reason}", *pair, counts=True, transfer=True)
    if not message.retryable and message.reason == "deadline":
        raise DeadlineExceeded("the request's deadline passed")
    # Never the client's fault: the proxy has checked the request, so what a worker refuses was damaged on its way,
    # or belongs to a worker of another version.
    raise AttemptFailed(f"{worker}: {message.reason}", worker, counts=True)
