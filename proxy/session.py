"""One request from its first byte to its last: admission, both legs of an attempt, what to do when one of them fails.

    waiting ── pick ──► dispatched ── Tokens ... ──► finished
       ▲                    │ Busy: another worker, or later        (until the deadline)
       ├────────────────────┤ client does not read                  (a new attempt when it does)
       └────────────────────┤ Failed, worker lost, tokens missing   (a new attempt that starts from the accepted tokens)
                            └ client gone, deadline                 (cancel both legs)

A session is one async generator; the dispatcher puts messages about its request into its inbox. What they mean is read
in `answer`, and both legs are kept in `attempt`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from baton.node.errors import BatonError, DeadlineExceeded, PeerLost
from baton.node.messages.control import DispatchBody, Prefill, Reserve, Tokens
from baton.node.telemetry import log_event
from baton.proxy.answer import AnswerReader
from baton.proxy.attempt import AttemptFailed, AttemptLegs
from baton.proxy.inbox import Inbox, Turns
from baton.proxy.interface import Delta, Generation
from baton.proxy.metrics.timeline import Timeline
from baton.proxy.routing.fair_queue import Ticket
from baton.proxy.routing.ledger import Ledger
from baton.proxy.routing.model_workers import ClusterShape
from baton.proxy.routing.prompt_blocks import BlockNames, PromptBlocks
from baton.proxy.routing.router import RequestView, Route
from baton.proxy.session_host import (
    ClientBehind,
    DeadlinePassed,
    Event,
    ProxyStopping,
    SessionHost,
    WorkerLost,
)

logger = logging.getLogger("proxy")

BUSY_PAUSE_S = 0.02
RETRY_PAUSES_S = (0.0, 0.25, 1.0)
"""After the first failed attempt, the second, and each later one: a link that breaks again and again may be well by
then."""
MAX_TOGETHER = 8
"""Of waiting messages, in one turn of a session."""
MAX_WAITING = 512
"""Messages for a client that does not read; one of a token is some 300 bytes."""


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
        latency = host.latency_of(generation.model)
        self._answer = AnswerReader(self._request_id, self._ledger, timeline, latency, clock)
        self._adapter = None if generation.adapter is None else generation.adapter.ref
        self._blocks = self._named(generation.prompt_ids)
        self._admitted_tokens = 0
        """What its admission counted as; 0 before it."""
        self._namespace = b""
        """Of the last attempt: tokens of one model are not continued by another."""
        self._with_client: AttemptLegs | None = None
        """While the client takes what this attempt has brought."""
        self._behind = False
        """That attempt has ended here, as the client did not take it: what else comes of it is dropped."""

    async def run(self) -> AsyncGenerator[list[Delta], None]:
        """Deltas up to the finish, in one list those that are there together. Raises the errors of
        proxy.interface.Engine.generate."""
        with self._host.registered(self._request_id, self._hear), self._accounted():
            failures = 0
            avoid: frozenset[str] = frozenset()
            transfer_failed = False
            while True:
                legs = await self._dispatch(avoid, transfer_failed=transfer_failed)
                alarm = self._alarm()
                try:
                    while not self._ledger.finish:
                        await self._inbox.wait()
                        deltas, failure = self._read_inbox(legs)
                        if deltas:
                            self._with_client = legs
                            yield deltas
                            self._with_client = None
                        if failure is not None:
                            raise failure
                    return
                except AttemptFailed as retry:
                    failures += retry.counts
                    self._timeline.fail_attempt(str(retry), busy=not retry.counts)
                    self._host.count(retry.counter)
                    log_event(
                        logger,
                        "attempt_ended",
                        level=logging.INFO if retry.counts else logging.DEBUG,
                        request=self._request_id,
                        attempt=legs.number,
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
                    legs.close()
                self._ledger.next_attempt()
                await asyncio.sleep(pause_s)

    @contextmanager
    def _accounted(self) -> Iterator[None]:
        """At the end, what its admission counted as becomes what it was."""
        self._answer.begin()
        try:
            yield
        finally:
            self._answer.end()
            if self._admitted_tokens:
                generation, ledger = self._generation, self._ledger
                self._host.generation_ended(
                    generation.model, generation.tenant, ledger.num_tokens - self._admitted_tokens
                )

    # -- an attempt

    async def _dispatch(self, avoid: frozenset[str], *, transfer_failed: bool) -> AttemptLegs:
        route, names = await self._admit(avoid, transfer_failed=transfer_failed)
        legs = AttemptLegs(self._host, self._request_id, self._ledger.attempt, route)
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
        self._timeline.dispatch(legs.prefill, legs.decode, names.hashes[0] if names.hashes else b"")
        decodes = body.sampling.max_tokens > 0
        if decodes or route.prefill is None:
            reserve = Reserve(request_id=self._request_id, attempt=legs.number, body=body, prefill=legs.prefill)
            legs.open(legs.decode, reserve, names, self._generation.tenant, self._clock())
        if route.prefill is not None:
            message = Prefill(
                request_id=self._request_id,
                attempt=legs.number,
                body=body,
                decode=route.decode.identity if decodes else "",
                decode_address=route.decode.address if decodes else "",
            )
            legs.open(legs.prefill, message, names, self._generation.tenant, self._clock())
        self._report_route(route, legs)
        return legs

    async def _admit(self, avoid: frozenset[str], *, transfer_failed: bool) -> tuple[Route, BlockNames]:
        """A route for what is known of the sequence by now, and the names of its blocks where the route leads."""
        if len(self._blocks.token_ids) != self._ledger.num_tokens:
            self._blocks = self._named(self._ledger.token_ids())
        blocks, turn, session = self._blocks, self._turn, self._generation.session_key
        constrained, adapter = self._generation.sampling.grammar is not None, self._generation.adapter

        def view_of(shape: ClusterShape) -> RequestView | None:
            self._inbox.discard(WorkerLost)  # the route is chosen now, among the workers that are members
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

    def _report_route(self, route: Route, legs: AttemptLegs) -> None:
        self._host.count(f"routed_{route.reason}_total")
        for role, choice in (("decode", route.decode_reason), ("prefill", route.prefill_reason)):
            if choice:
                self._host.count(f"routed_{role}_{choice}_total")
        log_event(
            logger,
            "routed",
            level=logging.DEBUG,
            request=self._request_id,
            attempt=legs.number,
            reason=route.reason,
            prefill=legs.prefill,
            prefill_reason=route.prefill_reason,
            decode=legs.decode,
            decode_reason=route.decode_reason,
            tokens=self._ledger.num_tokens,
            hit_tokens=route.hit_tokens,
        )

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
            self._with_client.close()
            self._inbox.put(ClientBehind())

    def _read_inbox(self, legs: AttemptLegs) -> tuple[list[Delta], Exception | None]:
        """Some of what has arrived, up to a report of stages, which belongs to the answer written next; and what ended
        the attempt behind it. Those deltas were accepted: no other attempt brings them again."""
        deltas = []
        try:
            for _ in range(MAX_TOGETHER):
                if self._ledger.finish or (event := self._inbox.pop()) is None:
                    break
                delta = self._on_event(legs, event)
                if delta is not None:
                    deltas.append(delta)
                if type(event) is tuple and type(event[1]) is Tokens and event[1].stages is not None:
                    break
        except (AttemptFailed, BatonError) as failure:
            return deltas, failure
        return deltas, None

    def _on_event(self, legs: AttemptLegs, event: Event) -> Delta | None:
        match event:
            case (worker, message):
                return self._answer.on_message(legs, worker, message)
            case WorkerLost():
                self._answer.on_lost(legs, event)
                return None
            case ClientBehind():
                self._behind = False
                raise AttemptFailed("the client did not read", counts=False, counter="resumed_total")
            case DeadlinePassed():
                raise DeadlineExceeded("the request's deadline passed")
            case ProxyStopping():
                raise PeerLost("the proxy is shutting down")
