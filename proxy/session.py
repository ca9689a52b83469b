"""One request from its first byte to its last: admission, both legs of an attempt, what to do when one of them fails.

    waiting ── pick ──► dispatched ── Tokens ... ──► finished
       ▲                    │ Busy: another worker, or later        (until the deadline)
       ├────────────────────┤ client does not read                  (a new attempt when it does)
       └────────────────────┤ Failed, worker lost, tokens missing   (a new attempt that starts from the accepted tokens)
                            └ client gone, deadline                 (cancel both legs)

A session is one async generator; the dispatcher puts messages about its request into its inbox. It accepts nothing
late: the ledger takes only the next tokens, and only of the current attempt.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from baton.node.errors import BatonError, DeadlineExceeded, PeerLost
from baton.node.messages.control import (
    Busy,
    Cancel,
    Cancelled,
    DispatchBody,
    Failed,
    HandedOver,
    Prefill,
    PromptLogprobs,
    Reserve,
    Reserved,
    Tokens,
)
from baton.node.telemetry import log_event
from baton.proxy.control import LegMessage
from baton.proxy.inbox import Inbox, Turns
from baton.proxy.interface import Delta, Generation
from baton.proxy.metrics.timeline import Timeline
from baton.proxy.routing.admission import ViewOf
from baton.proxy.routing.fair_queue import Ticket
from baton.proxy.routing.ledger import Gap, Ledger
from baton.proxy.routing.model_workers import ClusterShape, Leg
from baton.proxy.routing.prompt_blocks import BlockNames, PromptBlocks
from baton.proxy.routing.router import RequestView, Route
from baton.proxy.scaling.objectives import ScaleMonitor

logger = logging.getLogger("proxy")

BUSY_PAUSE_S = 0.02
RETRY_PAUSES_S = (0.0, 0.25, 1.0)
"""After the first failed attempt, the second, and each later one: a link that breaks again and again may be well by
then."""
MAX_TOGETHER = 8
"""Of waiting messages, in one turn of a session."""
MAX_WAITING = 512
"""Messages for a client that does not read; one of a token is some 300 bytes."""


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker that this session may be using is gone."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The request's time is up."""


@dataclass(frozen=True, slots=True)
class ProxyStopping:
    """The proxy stops: the time for draining is over."""


@dataclass(frozen=True, slots=True)
class ClientBehind:
    """The client did not read for so long that the attempt has ended here."""


Event = tuple[str, LegMessage] | WorkerLost | DeadlinePassed | ProxyStopping | ClientBehind


class SessionHost(Protocol):
    """What a session needs of the dispatcher."""

    def registered(self, request_id: str, hear: Callable[[Event], None]) -> AbstractContextManager[None]:
        """Inside it, `hear` gets the messages about the request. Raises PeerLost where the proxy shuts down."""

    async def admit(self, model: str, ticket: Ticket, view_of: ViewOf, deadline: float) -> tuple[Route, ClusterShape]:
        """Wait for a route; returns it with the shape of the revision that it leads to."""

    def generation_ended(self, model: str, tenant: str, tokens: int) -> None:
        """It counted for so many tokens too few when it was admitted, or too many (negative)."""

    def latency_of(self, model: str) -> ScaleMonitor:
        """What measures the latencies of the model's requests."""

    def open_leg(self, leg: Leg, message: Prefill | Reserve) -> None:
        """Count the leg and send its message; a failure comes back as WorkerLost."""

    def prompt_computed(self, worker: str, request_id: str) -> None:
        """The leg's first token has come: its prompt waits no longer."""

    def close_leg(self, worker: str, request_id: str, *, computed: bool, cancel: Cancel | None = None) -> None:
        """The leg has ended, or is cancelled; `computed`: its prompt was, so that its blocks are there."""

    def transfer_ended(self, prefill: str, decode: str, *, ok: bool) -> None:
        """The KV came from the one to the other, or it did not."""

    def count(self, name: str, amount: int = 1) -> None: ...


class _AttemptFailed(Exception):
    """This attempt is over; `workers` are to be avoided. `counts`: it counts against the limit of attempts. `transfer`:
    the KV did not come from one of them to the other. `counter` is that of the host."""

    def __init__(
        self, reason: str, *workers: str, counts: bool, transfer: bool = False, counter: str = "retries_total"
    ) -> None:
        super().__init__(reason)
        self.workers = frozenset(workers)
        self.counts = counts
        self.counter = counter
        self.transfer = transfer


@dataclass(slots=True)
class _Attempt:
    """The legs of the current attempt that still owe a terminal message."""

    number: int
    decode: str
    prefill: str  # "" for local prefill
    open: set[str] = field(default_factory=set)
    decoding: bool = False
    """Decode has sent tokens: the prefill leg does not matter any more."""
    early: list[Tokens] = field(default_factory=list)
    """What decode has sent before all of the prompt's log probabilities have come, over another link."""
    hit_tokens: int | None = None
    """Prompt tokens that the router expects the computing worker to have; None once that worker has reported."""

    @property
    def computes(self) -> str:
        return self.prefill or self.decode


class Session:
    """One generation: admitted, dispatched, followed, and tried again where a worker fails."""

    def __init__(
        self,
        host: SessionHost,
        generation: Generation,
        timeline: Timeline,
        *,
        deadline: float,
        turn: int,
        turns: Turns,
        max_attempts: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`turn` counts requests, for round robin; `turns` are those of all sessions of the event loop."""
        self._inbox: Inbox[Event] = Inbox(turns)
        self._host = host
        self._request_id = generation.request_id
        self._generation = generation
        self._timeline = timeline
        self._deadline = deadline
        self._turn = turn
        self._max_attempts = max_attempts
        self._clock = clock
        scored = generation.sampling.prompt_logprobs is not None
        self._ledger = Ledger(generation.prompt_ids, num_scored=1 if scored else len(generation.prompt_ids))
        self._adapter = None if generation.adapter is None else generation.adapter.ref
        self._blocks = self._named(generation.prompt_ids)
        self._cached_tokens = 0
        self._admitted_tokens = 0
        """What its admission counted as; 0 before it."""
        self._namespace = b""
        """Of the last attempt: tokens of one model are not continued by another."""
        self._with_client: _Attempt | None = None
        """While the client takes what this attempt has brought."""
        self._behind = False
        """That attempt has ended here, as the client did not take it: what else comes of it is dropped."""
        self._latency = host.latency_of(generation.model)
        self._first_token_at = self._last_token_at = 0.0

    async def run(self) -> AsyncGenerator[list[Delta], None]:
        """Deltas up to the finish, in one list those that are there together. Raises the errors of
        proxy.interface.Engine.generate."""
        with self._host.registered(self._request_id, self._hear), self._accounted():
            failures = 0
            avoid: frozenset[str] = frozenset()
            transfer_failed = False
            while True:
                attempt = await self._dispatch(avoid, transfer_failed=transfer_failed)
                alarm = self._alarm()
                try:
                    while not self._ledger.finish:
                        await self._inbox.wait()
                        deltas, failure = self._read_inbox(attempt)
                        if deltas:
                            self._with_client = attempt
                            yield deltas
                            self._with_client = None
                        if failure is not None:
                            raise failure
                    return
                except _AttemptFailed as retry:
                    failures += retry.counts
                    self._timeline.fail_attempt(str(retry), busy=not retry.counts)
                    self._host.count(retry.counter)
                    log_event(
                        logger,
                        "attempt_ended",
                        level=logging.INFO if retry.counts else logging.DEBUG,
                        request=self._request_id,
                        attempt=attempt.number,
                        reason=str(retry),
                        accepted=len(self._ledger.accepted),
                    )
                    if failures >= self._max_attempts:
                        raise PeerLost(f"gave up after {failures} attempts; the last one: {retry}") from None
                    avoid = retry.workers if retry.counts else avoid | retry.workers
                    transfer_failed = retry.transfer or (transfer_failed and not retry.counts)
                    pause_s = RETRY_PAUSES_S[min(failures, len(RETRY_PAUSES_S)) - 1] if retry.counts else BUSY_PAUSE_S
                finally:
                    alarm.cancel()
                    self._close(attempt)
                self._ledger.next_attempt()
                await asyncio.sleep(pause_s)

    @contextmanager
    def _accounted(self) -> Iterator[None]:
        """At the end, what its admission counted as becomes what it was."""
        self._latency.begin(self._request_id, self._clock())
        try:
            yield
        finally:
            num_tokens = self._ledger.num_tokens - len(self._ledger.prompt_ids) if self._last_token_at else 0
            decoding_s = self._last_token_at - self._first_token_at
            self._latency.end(self._request_id, num_tokens, decoding_s, self._clock())
            if self._admitted_tokens:
                generation, ledger = self._generation, self._ledger
                self._host.generation_ended(
                    generation.model, generation.tenant, ledger.num_tokens - self._admitted_tokens
                )

    # -- an attempt

    async def _dispatch(self, avoid: frozenset[str], *, transfer_failed: bool) -> _Attempt:
        route, names = await self._admit(avoid, transfer_failed=transfer_failed)
        prefill = route.prefill.identity if route.prefill is not None else ""
        attempt = _Attempt(self._ledger.attempt, route.decode.identity, prefill, hit_tokens=route.hit_tokens)
        body = DispatchBody(
            token_ids=self._blocks.token_ids,
            prompt_len=len(self._ledger.prompt_ids),
            root=names.root,
            block_hashes=names.hashes,
            sampling=self._generation.sampling,
            num_scored=self._ledger.num_scored,
            deadline_s=max(0.0, self._deadline - self._clock()),
            priority=self._generation.priority,
            contended=route.contended,
            speculate=self._generation.speculate,
            prediction_ids=self._generation.prediction_ids or (),
            adapter=self._adapter,
        )
        self._timeline.dispatch(prefill, attempt.decode, names.hashes[0] if names.hashes else b"")
        decodes = body.sampling.max_tokens > 0
        if decodes or route.prefill is None:
            reserve = Reserve(request_id=self._request_id, attempt=attempt.number, body=body, prefill=prefill)
            self._open(attempt, attempt.decode, reserve, names)
        if route.prefill is not None:
            message = Prefill(
                request_id=self._request_id,
                attempt=attempt.number,
                body=body,
                decode=route.decode.identity if decodes else "",
                decode_address=route.decode.address if decodes else "",
            )
            self._open(attempt, prefill, message, names)
        self._report_route(route, attempt)
        return attempt

    async def _admit(self, avoid: frozenset[str], *, transfer_failed: bool) -> tuple[Route, BlockNames]:
        """A route for what is known of the sequence by now, and the names of its blocks where the route leads."""
        if len(self._blocks.token_ids) != self._ledger.num_tokens:
            self._blocks = self._named(self._ledger.token_ids())
        blocks, turn, session = self._blocks, self._turn, self._generation.session_key
        constrained, adapter = self._generation.sampling.grammar is not None, self._generation.adapter

        def view_of(shape: ClusterShape) -> RequestView | None:
            if self._has_begun() and shape.namespace != self._namespace:
                return None
            self._timeline.enter("route")
            view = blocks.under(shape).view(turn=turn, avoid=avoid, session=session)
            if transfer_failed or constrained or adapter is not None:
                view = replace(view, transfer_failed=transfer_failed, constrained=constrained, adapter=adapter)
            if self._ledger.awaits_prompt:  # what caches have gives no log probabilities
                view = replace(view, hashes=())
            self._timeline.enter("queue")
            return view

        self._timeline.enter("queue")
        ticket = self._ticket()
        route, shape = await self._host.admit(self._generation.model, ticket, view_of, self._deadline)
        self._admitted_tokens += ticket.cost_tokens
        self._namespace = shape.namespace
        self._timeline.enter("route")
        return route, blocks.under(shape)

    def _named(self, token_ids: tuple[int, ...]) -> PromptBlocks:
        """Blocks of one adapter have other names than those of another, or of the model alone."""
        lora = b"" if self._adapter is None else self._adapter.digest
        return PromptBlocks(token_ids, self._generation.cache_salt, lora)

    def _has_begun(self) -> bool:
        """The client has a part of the answer."""
        scored = self._generation.sampling.prompt_logprobs is not None and self._ledger.num_scored > 1
        return scored or bool(self._ledger.accepted)

    def _ticket(self) -> Ticket:
        generation, ledger = self._generation, self._ledger
        cost_tokens = len(ledger.prompt_ids) + generation.expected_tokens
        return Ticket(
            tenant=generation.tenant,
            priority=generation.priority,
            turn=self._turn,
            num_tokens=ledger.num_tokens,
            cost_tokens=0 if self._admitted_tokens else cost_tokens,
            refusable=ledger.attempt == 0 and not generation.follows,
        )

    def _report_route(self, route: Route, attempt: _Attempt) -> None:
        self._host.count(f"routed_{route.reason}_total")
        for role, choice in (("decode", route.decode_reason), ("prefill", route.prefill_reason)):
            if choice:
                self._host.count(f"routed_{role}_{choice}_total")
        log_event(
            logger,
            "routed",
            level=logging.DEBUG,
            request=self._request_id,
            attempt=attempt.number,
            reason=route.reason,
            prefill=attempt.prefill,
            prefill_reason=route.prefill_reason,
            decode=attempt.decode,
            decode_reason=route.decode_reason,
            tokens=self._ledger.num_tokens,
            hit_tokens=route.hit_tokens,
        )

    def _open(self, attempt: _Attempt, worker: str, message: Prefill | Reserve, names: BlockNames) -> None:
        computes = worker == attempt.computes
        leg = Leg(
            worker,
            self._request_id,
            tokens=names.num_tokens - (attempt.hit_tokens or 0) if computes else 0,
            blocks=names.num_blocks,
            sent_at=self._clock(),
            hashes=names.cacheable if computes else (),
            tenant=self._generation.tenant,
        )
        attempt.open.add(worker)
        self._host.open_leg(leg, message)

    def _close(self, attempt: _Attempt) -> None:
        """However the attempt ended: cancel the legs that are still open."""
        cancel = Cancel(request_id=self._request_id, attempt=attempt.number)
        for worker in sorted(attempt.open):
            self._host.close_leg(worker, self._request_id, computed=attempt.hit_tokens is None, cancel=cancel)
        attempt.open.clear()

    def _alarm(self) -> asyncio.TimerHandle:
        """One timer an attempt: a timeout around each wait would be a fifth of the proxy's work for a token."""
        delay_s = max(0.0, self._deadline - self._clock())
        return asyncio.get_running_loop().call_later(delay_s, self._inbox.put, DeadlinePassed())

    def _hear(self, event: Event) -> None:
        """From the dispatcher. What comes for a client that does not read is bounded: then the attempt ends, and a new
        one begins when the client has read what waits here."""
        behind = self._with_client is not None and len(self._inbox) >= MAX_WAITING
        if type(event) is not tuple or not (self._behind or behind):
            self._inbox.put(event)
        elif self._with_client is not None and not self._behind:
            self._behind = True
            self._host.count("paused_total")
            self._close(self._with_client)
            self._inbox.put(ClientBehind())

    def _read_inbox(self, attempt: _Attempt) -> tuple[list[Delta], Exception | None]:
        """Some of what has arrived, up to a report of stages, which belongs to the answer written next; and what ended
        the attempt behind it. Those deltas were accepted: no other attempt brings them again."""
        deltas = []
        try:
            for _ in range(MAX_TOGETHER):
                if self._ledger.finish or (event := self._inbox.pop()) is None:
                    break
                delta = self._on_event(attempt, event)
                if delta is not None:
                    deltas.append(delta)
                if type(event) is tuple and type(event[1]) is Tokens and event[1].stages is not None:
                    break
        except (_AttemptFailed, BatonError) as failure:
            return deltas, failure
        return deltas, None

    def _on_event(self, attempt: _Attempt, event: Event) -> Delta | None:
        if isinstance(event, DeadlinePassed):
            raise DeadlineExceeded("the request's deadline passed")
        if isinstance(event, ClientBehind):
            self._behind = False
            raise _AttemptFailed("the client did not read", counts=False, counter="resumed_total")
        if isinstance(event, ProxyStopping):
            raise PeerLost("the proxy is shutting down")
        if isinstance(event, WorkerLost):
            self._on_lost(attempt, event)
            return None
        worker, message = event
        if message.attempt != attempt.number or worker not in (attempt.decode, attempt.prefill):
            return None
        match message:
            case Tokens():
                return self._on_tokens(attempt, worker, message)
            case PromptLogprobs():
                return self._on_prompt_logprobs(attempt, worker, message)
            case HandedOver():
                if self._ledger.awaits_prompt:
                    raise _AttemptFailed("log probabilities of the prompt are missing", worker, counts=True)
                self._timeline.handed_over(message.sent_bytes, message.transfer_s)
                self._host.transfer_ended(attempt.prefill, attempt.decode, ok=True)
                self._settle(attempt, worker)
            case Cancelled():
                self._settle(attempt, worker)
            case Busy():
                self._settle(attempt, worker)
                raise _AttemptFailed(f"{worker} is busy: {message.reason}", worker, counts=False, counter="busy_total")
            case Failed() if not (worker == attempt.prefill and self._has_prompt(attempt)):
                self._settle(attempt, worker)
                self._on_failed(attempt, worker, message)
            case Failed():
                self._settle(attempt, worker)
            case Reserved():
                pass
        return None

    def _has_prompt(self, attempt: _Attempt) -> bool:
        """The prefill leg is not needed any more."""
        return attempt.decoding and not self._ledger.awaits_prompt

    def _on_prompt_logprobs(self, attempt: _Attempt, worker: str, message: PromptLogprobs) -> Delta | None:
        if worker != attempt.computes:
            return None
        try:
            entries = self._ledger.accept_prompt(message)
        except Gap as gap:
            raise _AttemptFailed(str(gap), worker, counts=True) from None
        early: list[Tokens] = []
        if not self._ledger.awaits_prompt:
            early, attempt.early = attempt.early, early
        deltas = [delta for each in early if (delta := self._on_tokens(attempt, attempt.decode, each)) is not None]
        if not entries and not deltas:
            return None
        return Delta(
            tuple(token for delta in deltas for token in delta.ids),
            tuple(logprob for delta in deltas for logprob in delta.logprobs),
            self._ledger.finish,
            self._cached_tokens,
            entries,
        )

    def _on_tokens(self, attempt: _Attempt, worker: str, message: Tokens) -> Delta | None:
        attempt.decoding = attempt.decoding or worker == attempt.decode
        if self._ledger.awaits_prompt:
            if worker == attempt.computes:  # its entries came over the same link, before
                raise _AttemptFailed("log probabilities of the prompt are missing", worker, counts=True)
            attempt.early.append(message)
            return None
        if not self._ledger.accepted:
            self._cached_tokens = message.cached_tokens
            if not self._first_token_at:
                self._first_token_at = self._clock()
                computed = len(self._ledger.prompt_ids) - message.cached_tokens
                self._latency.first_token(self._request_id, computed, self._first_token_at)
        if worker == attempt.computes and attempt.hit_tokens is not None:
            self._count_hit(attempt.hit_tokens, message.cached_tokens)
            attempt.hit_tokens = None
            self._host.prompt_computed(worker, self._request_id)
        try:
            ids, logprobs = self._ledger.accept(message)
        except Gap as gap:
            raise _AttemptFailed(str(gap), worker, counts=True) from None
        if message.finish:
            self._last_token_at = self._clock()
            self._settle(attempt, worker)
        if not ids and not self._ledger.finish:
            return None
        if message.stages is not None:
            self._timeline.report(message.stages)
        accepted = min(message.accepted_prediction, len(ids))
        return Delta(ids, logprobs, message.finish, self._cached_tokens, accepted_prediction=accepted)

    def _count_hit(self, predicted: int, actual: int) -> None:
        """In tokens of the prompt: what the router foresaw, and what the worker that computed it found."""
        predicted = min(predicted, len(self._ledger.prompt_ids))
        self._host.count("kv_hit_predicted_tokens_total", predicted)
        self._host.count("kv_hit_actual_tokens_total", actual)
        self._host.count("kv_hit_missed_tokens_total", max(0, predicted - actual))
        self._host.count("kv_hit_unforeseen_tokens_total", max(0, actual - predicted))

    def _on_failed(self, attempt: _Attempt, worker: str, message: Failed) -> None:
        if message.retryable and message.transfer and attempt.prefill:
            self._host.transfer_ended(attempt.prefill, attempt.decode, ok=False)
            pair = attempt.prefill, attempt.decode
            raise _AttemptFailed(f"{worker}: {message.reason}", *pair, counts=True, transfer=True)
        if not message.retryable and message.reason == "deadline":
            raise DeadlineExceeded("the request's deadline passed")
        # Never the client's fault: the proxy has checked the request, so what a worker refuses was damaged on its way,
        # or belongs to a worker of another version.
        raise _AttemptFailed(f"{worker}: {message.reason}", worker, counts=True)

    def _on_lost(self, attempt: _Attempt, lost: WorkerLost) -> None:
        if lost.worker not in attempt.open:
            return
        self._settle(attempt, lost.worker)
        if lost.worker == attempt.prefill and self._has_prompt(attempt):
            return
        raise _AttemptFailed(f"{lost.worker} was lost: {lost.reason}", lost.worker, counts=True)

    def _settle(self, attempt: _Attempt, worker: str) -> None:
        attempt.open.discard(worker)
        self._host.close_leg(worker, self._request_id, computed=attempt.hit_tokens is None)
